"""Finds parameters that every device holds whole although the mesh was to split them.

An array whose axes do not divide, or a module that the rules have never heard of, costs memory on
every device and says nothing. Hence a run, and its plan, begin with `check_replication`.
"""

from typing import NamedTuple

import jax

from repalign.parallel.rules import DEFAULT_RULES, LOGICAL_AXES, NONE, ShardingRules, path_name
from repalign.registry import UserError
from repalign.typing import PyTree


class Replicated(NamedTuple):
    """An array that no axis of the mesh splits: its path, its shape and its bytes."""

    path: str
    shape: tuple[int, ...]
    size: int


class Audit(NamedTuple):
    """How many bytes of parameters there are, and those that every device holds by accident.

    Attributes:
        total: bytes of all parameters, counted once.
        replicated: the arrays, largest first.
    """

    total: int
    replicated: tuple[Replicated, ...]

    @property
    def share(self) -> float:
        """The share of the bytes, in [0, 1]."""
        return sum(array.size for array in self.replicated) / self.total if self.total else 0.0


def audit(
    params: PyTree, shardings: PyTree, *, replicas: bool, rules: ShardingRules = DEFAULT_RULES
) -> Audit:
    """Lists the parameters that are split over none of the mesh axes that the rules name.

    Left out, because no accident: arrays smaller than ``rules.smallest``, and everything if those
    mesh axes have one device.

    Args:
        params: arrays or shapes.
        shardings: a `jax.sharding.NamedSharding` for each.
        replicas: whether a leading axis counts replicas of several seeds.
        rules: that the shardings were made by.
    """
    splitting = {getattr(rules, name) for name in LOGICAL_AXES} - {NONE}
    total, replicated = 0, []
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        name, size = path_name(path), leaf.size * leaf.dtype.itemsize
        total += size
        used = {axis for entry in sharding.spec for axis in _names(entry)}
        split = bool(used & splitting) or all(sharding.mesh.shape[axis] == 1 for axis in splitting)
        if not split and not rules.is_small(name, leaf.shape, replicas=replicas):
            replicated.append(Replicated(name, tuple(leaf.shape), size))
    return Audit(total, tuple(sorted(replicated, key=lambda array: -array.size)))


def check_replication(
    params: PyTree, shardings: PyTree, *, replicas: bool, rules: ShardingRules = DEFAULT_RULES
) -> Audit:
    """Returns the audit.

    Raises:
        UserError: more than ``rules.max_replicated`` of the bytes are replicated; the text names
            the largest arrays and what to do.
    """
    found = audit(params, shardings, replicas=replicas, rules=rules)
    if found.share <= rules.max_replicated:
        return found
    mesh = jax.tree.leaves(shardings)[0].mesh
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    largest = ", ".join(f"{array.path} {array.shape}" for array in found.replicated[:3])
    raise UserError(
        f"{found.share:.1%} of the parameter bytes lie whole on every device of the mesh {sizes}, "
        f"and {rules.max_replicated:.1%} may: no axis of them divides, or no rule names them. "
        f"Largest: {largest}. Choose a mesh whose sizes divide theirs, or allow it by "
        f"--config.mesh.rules.max_replicated={found.share + 0.005:.2f}."
    )


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
