"""The reference page of the losses: their docstrings, and what the compiler says they cost."""

import collections.abc
import importlib
import inspect
import json
import pathlib
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

import repalign.losses
from repalign.listing import listing
from repalign.registry import resolve

BATCHES = (1024, 8192)
"""Batch sizes at which the cost is taken: eight times the batch shows how memory grows."""

# Sizes of the axes that signatures name; a variadic axis (``*event``) stands for the given ones.
_AXES: Mapping[str, tuple[int, ...]] = types.MappingProxyType(
    {
        "dim": (128,),
        "classes": (1000,),
        "clusters": (1024,),
        "prototypes": (1024,),
        "queue": (65_536,),
        "tokens": (49,),
        "patches": (49,),
        "locations": (49,),
        "queries": (49,),
        "keys": (49,),
        "pixels": (192,),
        "heads": (4,),
        "views": (2,),
        "teacher_views": (2,),
        "student_views": (2,),
        "samples": (16,),
        "context": (128,),
        "horizons": (4,),
        "transforms": (4,),
        "common": (128,),
        "salient": (32,),
        "a_dim": (128,),
        "b_dim": (128,),
        "new_dim": (128,),
        "old_dim": (64,),
        "words": (1024,),
        "tiles": (4,),
        "invariant_dim": (64,),
        "equivariant_dim": (64,),
        "student_dim": (128,),
        "teacher_dim": (128,),
        "*event": (28, 28, 1),
        "*patches": (7, 7),
        "*tokens": (49,),
        "*features": (128,),
        "*center": (1,),
        "*shape": (128,),
        "*rest": (128,),
        "*x_shape": (128,),
        "*y_shape": (128,),
    }
)

# Values of hyper-parameters that have no default, by name.
_VALUES: Mapping[str, Any] = types.MappingProxyType(
    {
        "temperature": 0.1,
        "scale": 10.0,
        "bias": -10.0,
        "logit_scale": 2.6,
        "margin": 1.0,
        "kappa": 16.0,
        "dataset_size": 12_000,
        "off_diagonal": 1.0,
        "diagonal": 1.0,
    }
)


class Cost(NamedTuple):
    """What a loss and its gradient take on this platform, as its compiler states it.

    Attributes:
        flops: operations at the smaller batch; bodies of loops and eigenvalue problems count once.
        mebibytes: temporary memory at each of `BATCHES`.
    """

    flops: float
    mebibytes: tuple[float, ...]


def loss_cost(function: Callable[..., Any]) -> Cost | None:
    """Compiles value and gradient of a loss for inputs that its signature describes; runs nothing.

    Returns None for what is no function of arrays alone: a loss that takes a critic or another
    loss.
    """
    mebibytes, flops = [], 0.0
    for batch in BATCHES:
        inputs = _inputs(function, batch)
        if inputs is None:
            return None
        arrays, constants = inputs

        def total(floating: Any, others: Any, constants: Any = constants) -> Array:
            output = function(**floating, **others, **constants)
            leaves = [leaf for leaf in jax.tree.leaves(output) if jnp.issubdtype(leaf, jnp.inexact)]
            return sum(jnp.sum(leaf) for leaf in leaves)

        floating = {name: value for name, value in arrays.items() if _is_floating(value)}
        others = {name: value for name, value in arrays.items() if name not in floating}
        compiled = jax.jit(jax.value_and_grad(total)).lower(floating, others).compile()
        if batch == BATCHES[0]:
            flops = compiled.cost_analysis()["flops"]
        mebibytes.append(compiled.memory_analysis().temp_size_in_bytes / 2**20)
    return Cost(flops, tuple(mebibytes))


def loss_costs() -> list[dict[str, Any]]:
    """Returns the cost of every loss, a row each; minutes of compilation."""
    rows = []
    for path, _ in listing("losses"):
        function = resolve(path)
        if not inspect.isfunction(function) or ".batch_statistics." in path:
            continue
        cost = loss_cost(function)
        if cost is None:
            continue
        rows.append(
            {
                "loss": path,
                "gflop": cost.flops / 1e9,
                **{
                    f"mebibytes_at_{batch}": value
                    for batch, value in zip(BATCHES, cost.mebibytes, strict=True)
                },
                "platform": jax.default_backend(),
                "jax": jax.__version__,
            }
        )
    return rows


def losses_page(costs: list[Mapping[str, Any]]) -> str:
    """Returns docs/losses/README.md: an index, then every loss with signature and docstring.

    Args:
        costs: rows of `loss_costs`; a loss without one shows none.
    """
    by_path = {row["loss"]: row for row in costs}
    index, body = [], []
    for info in pkgutil.iter_modules(repalign.losses.__path__):
        if info.name == "batch_statistics":  # What losses are made of, not losses.
            continue
        module = importlib.import_module(f"repalign.losses.{info.name}")
        functions = {
            name: function
            for name, function in inspect.getmembers(module, inspect.isfunction)
            if function.__module__ == module.__name__ and not name.startswith("_")
        }
        links = ", ".join(f"[`{name}`](#{name})" for name in functions)
        index.append(f"* **[{info.name}](#{info.name})**: {links}")
        body += [f"## {info.name}", "", _markdown(inspect.getdoc(module) or ""), ""]
        for name, function in functions.items():
            path = f"losses.{info.name}.{name}"
            body += [f"### {name}", "", f"`{path}{_signature(function)}`", ""]
            body += [_markdown(inspect.getdoc(function) or ""), ""]
            if path in by_path:
                body += [_cost_line(by_path[path]), ""]
    return "\n".join([_HEAD, *index, "", *body]).rstrip() + "\n"


_HEAD = f"""# Losses

Every loss is a pure function of arrays: hyper-parameters are keywords, the result is one value an
example unless a line says otherwise, and masks, gradients that stop and deviations from published
code are stated. Name one in a config (`"term": "losses.contrastive.nt_xent"`) or call it. This page
is made from the docstrings by `make docs`.

Cost is of the value and the gradient, as XLA states it for a CPU: operations at a batch of
{BATCHES[0]:,} (bodies of loops and eigenvalue problems count once), and temporary memory there and
at {BATCHES[1]:,}. Sizes: width 128, 49 tokens, 2 views, 1,024 prototypes, 1,000 classes, a queue of
65,536. [Time and memory beside other libraries](peers.md) is a page of its own.
"""


def read_costs(path: pathlib.Path) -> list[Mapping[str, Any]]:
    """Reads the rows that ``repalign bench losses --format json`` wrote."""
    return json.loads(path.read_text())


def _cost_line(row: Mapping[str, Any]) -> str:
    memory = " / ".join(f"{row[f'mebibytes_at_{batch}']:,.1f}" for batch in BATCHES)
    return f"*Cost*: {row['gflop']:.3g} GFLOP; {memory} MiB."


def _signature(function: Callable[..., Any]) -> str:
    """The signature without annotations: names and defaults."""
    signature = inspect.signature(function)
    bare = [
        parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def _markdown(docstring: str) -> str:
    """Turns a docstring into Markdown: double back-quotes become single, sections become lists."""
    lines, section = [], False
    for line in docstring.replace("``", "`").splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Attributes):", line):
            section = True
            lines.append(f"*{line[:-1]}*")
            lines.append("")
        elif section and re.match(r"    \S", line):
            lines.append(f"* {line.strip()}")
        elif section and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            section = section and not line
            lines.append(line)
    return "\n".join(lines)


def _inputs(
    function: Callable[..., Any], batch: int
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Returns arrays (as shapes) and constants for the parameters that have no default."""
    hints = typing.get_type_hints(function, include_extras=True)
    arrays, constants = {}, {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty:
            continue
        name, hint = parameter.name, hints[parameter.name]
        if name == "key":
            constants[name] = jax.random.key(0)
        elif name in _VALUES:
            constants[name] = _VALUES[name]
        elif (value := _array(hint, batch)) is not None:
            arrays[name] = value
        else:
            return None
    return (arrays, constants) if any(map(_is_floating, arrays.values())) else None


def _array(hint: Any, batch: int) -> Any:
    """Returns the shape and dtype that an annotation stands for, a list of two for a sequence."""
    if hasattr(hint, "dim_str"):
        shape: tuple[int, ...] = ()
        for axis in hint.dim_str.split():
            if axis in ("batch", "images", "texts"):
                shape += (batch,)
            elif axis.isdigit():
                shape += (int(axis),)
            elif axis in _AXES:
                shape += _AXES[axis]
            else:
                return None
        kinds = {"Float": jnp.float32, "Num": jnp.float32, "Bool": jnp.bool_}
        kind = hint.__name__.split("[")[0]
        return jax.ShapeDtypeStruct(shape, kinds[kind] if kind in kinds else jnp.int32)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is collections.abc.Sequence:
        one = _array(inner[0], batch)
        return None if one is None else [one, one]
    if origin in (typing.Union, types.UnionType):
        found = [_array(each, batch) for each in inner]
        return next((each for each in found if each is not None), None)
    return None


def _is_floating(value: Any) -> bool:
    return all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(value))
