"""What a config can name: every public function of the families, with its summary."""

import importlib
import inspect
import pkgutil

from repalign.registry import public_names
from repalign.train.config import experiment_files, load_experiment

KINDS = {kind: kind for kind in ("experiments", "losses", "quantizers", "metrics", "models")}


def listing(kind: str) -> list[tuple[str, str]]:
    """Returns (name as a config writes it, docstring's first line) of every entry of a kind."""
    if kind == "experiments":
        entries = []
        for key in experiment_files():
            module = load_experiment(key)
            variants = ", ".join(module.VARIANTS)
            entries.append((key, f"{_summary(module)} Variants: {variants}."))
        return entries
    package = importlib.import_module(f"repalign.{kind}")
    entries = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"repalign.{kind}.{info.name}")
        for name in sorted(public_names(module)):
            entries.append((f"{kind}.{info.name}.{name}", _summary(getattr(module, name))))
    return entries


def _summary(documented: object) -> str:
    return (inspect.getdoc(documented) or "").split("\n\n")[0].replace("\n", " ")
