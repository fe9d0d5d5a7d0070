"""Seeded mutants: a copy of a module with one change that its tests have to notice."""

import inspect
import types
from collections.abc import Callable

import pytest


def mutated(module: types.ModuleType, old: str, new: str) -> types.ModuleType:
    """Returns a fresh module whose source is `module`'s with `old`, found once, made `new`."""
    source = inspect.getsource(module)
    if source.count(old) != 1:
        raise ValueError(f"{old!r} occurs {source.count(old)} times in {module.__name__}, not once")
    if old == new:
        raise ValueError(f"{old!r} is its own replacement: that is no mutant")
    fresh = types.ModuleType(module.__name__)
    fresh.__file__ = module.__file__
    fresh.__package__ = module.__package__
    code = compile(source.replace(old, new), f"<mutant of {module.__file__}>", "exec")
    exec(code, fresh.__dict__)
    return fresh


def assert_killed(
    check: Callable[[types.ModuleType], None], module: types.ModuleType, old: str, new: str
) -> None:
    """Asserts that `check`, which passes on `module`, raises AssertionError on the mutant."""
    mutant = mutated(module, old, new)
    with pytest.raises(AssertionError):
        check(mutant)
