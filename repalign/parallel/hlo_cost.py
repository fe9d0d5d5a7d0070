"""What a compiled program does on one device: products, memory traffic and communication.

XLA's own ``cost_analysis()`` counts the body of a loop once, however often it runs. Here every
instruction of the compiled text counts as often as the loops around it run it.

What is counted
* FLOPs: two for each multiply-add of a dot, a convolution (positions in padding or between dilated
  elements left out) or a library call for one of them, and whatever a kernel's cost estimate says.
  Elementwise work is not counted.
* HBM bytes: what each fusion, copy, slice or other instruction outside fusions reads and writes,
  with the padding of the tiles; VMEM is free, a slice costs its own size and an update in place
  only what it updates.
* Collectives: by kind and by the mesh axes they run along, the bytes given to each and the bytes
  that a device has to send for it by a ring algorithm.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from repalign.parallel.hlo_text import Computation, Instruction, Program, Shape, parse, trip_count

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "iota", "opt-barrier", "add-dependency", "domain", "get-dimension-size",
}  # fmt: skip
_FREE_CALLS = {
    "AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollectiveStart",
    "AsyncCollectiveDone", "ZeroCrop", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape",
}  # fmt: skip


class Collective(NamedTuple):
    """Communication of one instruction, once.

    Attributes:
        kind: one of `COLLECTIVES`.
        axes: the mesh axes along which it runs, joined by ``+``; ``?`` if they cannot be told.
        group: partitions that take part together (one group of several alike).
        bytes: what a device puts in: its own share before an all-gather, its operand otherwise.
        sent: what a device has to send in a ring: 2 (n-1)/n of the bytes for an all-reduce, n-1
            times them for an all-gather, (n-1)/n for reduce-scatter and all-to-all, all of them
            for a permutation.
        source: the operation of the model it comes from.
    """

    kind: str
    axes: str
    group: tuple[int, ...]
    bytes: int
    sent: float
    source: str


class Operation(NamedTuple):
    """One instruction and how often a step runs it; FLOPs and bytes are of one run."""

    name: str
    count: int
    flops: float
    hbm_bytes: float
    collective: Collective | None = None


class Cost(NamedTuple):
    """A step on one device.

    Attributes:
        operations: whatever costs anything.
        notes: what could not be counted, in words; empty if everything was.
    """

    operations: tuple[Operation, ...]
    notes: tuple[str, ...]

    @property
    def flops(self) -> float:
        """Floating-point operations of products, loops counted."""
        return float(sum(one.count * one.flops for one in self.operations))

    @property
    def hbm_bytes(self) -> float:
        """Bytes read from and written to HBM, loops counted."""
        return float(sum(one.count * one.hbm_bytes for one in self.operations))

    @property
    def collectives(self) -> tuple[Operation, ...]:
        """The operations that communicate."""
        return tuple(one for one in self.operations if one.collective is not None)


def cost(text: str, *, mesh: Mapping[str, int] | None = None) -> Cost:
    """Returns what a compiled program does on one device.

    Args:
        text: of the compiled program (``compiled.as_text()``).
        mesh: sizes of the mesh axes, outermost first, to name the axes of collectives.
    """
    program = parse(text)
    notes: list[str] = []
    walk = _Walk(program, dict(mesh or {}), notes)
    operations = tuple(walk.computation(program.computations[program.entry], 1))
    return Cost(operations, tuple(dict.fromkeys(notes)))


class _Walk(NamedTuple):
    """Goes through a program from the entry; `notes` collects what it cannot count."""

    program: Program
    mesh: dict[str, int]
    notes: list[str]

    def computation(self, computation: Computation, count: int) -> Iterator[Operation]:
        """Yields the operations of a computation that runs ``count`` times."""
        seen: set[str] = set()
        for one in computation.instructions.values():
            yield from self._instruction(computation, one, count, seen)

    def _instruction(
        self, computation: Computation, one: Instruction, count: int, seen: set[str]
    ) -> Iterator[Operation]:
        computations = self.program.computations
        kind = one.opcode.removesuffix("-start")
        if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
            return
        if one.opcode == "while":
            trips = trip_count(self.program, computation, one)
            if trips is None:
                self.notes.append(f"{one.name}: number of iterations unknown, counted once")
            body = computations[one.called("body")]
            yield from self.computation(body, count * (1 if trips is None else trips))
        elif one.opcode == "conditional":
            names = [*re.findall(r"%([\w.-]+)", one.attribute("branch_computations"))]
            names += [one.called(f"{side}_computation") for side in ("true", "false")]
            branches = [list(self.computation(computations[name], count)) for name in names if name]
            yield from max(branches, key=lambda ops: sum(op.flops + op.hbm_bytes for op in ops))
        elif one.opcode == "call":
            yield from self.computation(computations[one.called("to_apply")], count)
        elif one.opcode == "async-start":
            yield from self.computation(computations[one.called()], count)
        elif kind in COLLECTIVES:
            yield Operation(one.name, count, 0, 0, self._collective(computation, one, kind))
        elif one.opcode == "fusion":
            inner = computations[one.called()]
            moved = self._fusion_bytes(computation, one, inner)
            yield Operation(one.name, count, self._fused_flops(inner), moved)
            yield from self._fused_collectives(inner, count, seen)
        else:
            flops, moved = self._plain(computation, one)
            if flops or moved:
                yield Operation(one.name, count, flops, moved)

    # Products.

    def _flops(self, computation: Computation, one: Instruction) -> float:
        if one.opcode == "dot":
            return _dot_flops(
                _operand(computation, one, 0),
                one.shapes[0],
                _numbers(one.attribute("lhs_contracting_dims")),
            )
        if one.opcode == "convolution":
            shapes = (_operand(computation, one, 0), _operand(computation, one, 1), one.shapes[0])
            return _convolution_flops(one, *shapes)
        return 0.0

    def _fused_flops(self, computation: Computation) -> float:
        total = 0.0
        for one in computation.instructions.values():
            total += self._flops(computation, one)
            if one.opcode == "fusion":
                total += self._fused_flops(self.program.computations[one.called()])
            elif one.opcode == "custom-call":
                total += self._custom_call(computation, one)[0]
        return total

    def _custom_call(self, computation: Computation, one: Instruction) -> tuple[float, int | None]:
        """Returns FLOPs and bytes of a library call or kernel; None for bytes it does not state."""
        target = one.attribute("custom_call_target").strip('"')
        estimate = re.search(r'"cost_estimate":(\{[^{}]*\})', one.attributes)
        if estimate:
            stated = json.loads(estimate[1])
            return float(stated["flops"]), int(stated["bytes_accessed"])
        contracting = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
        if contracting:
            axes = _numbers(contracting[1].replace('"', ""))
            return _dot_flops(_operand(computation, one, 0), one.shapes[0], axes), None
        if one.attribute("dim_labels") and "conv" in target.lower():
            shapes = (_operand(computation, one, 0), _operand(computation, one, 1), one.shapes[0])
            if "Forward" in target:
                return _convolution_flops(one, *shapes), None
        if target not in _FREE_CALLS:
            self.notes.append(f"custom call {target!r} states no cost: its FLOPs are not counted")
        return 0.0, None

    # Memory.

    def _plain(self, computation: Computation, one: Instruction) -> tuple[float, int]:
        """Returns FLOPs and bytes of an instruction outside fusions."""
        flops, stated = self._flops(computation, one), None
        if one.opcode == "custom-call":
            if one.attribute("custom_call_target").strip('"') in _FREE_CALLS:
                return 0.0, 0
            flops, stated = self._custom_call(computation, one)
        if stated is not None:
            return flops, stated
        operands = [computation.instructions[name].shapes for name in one.operands]
        written = _in_hbm(one.shapes)
        if one.opcode == "copy-start":  # Returns destination, source and a flag.
            return 0.0, _in_hbm(one.shapes[:1]) + _in_hbm(operands[0])
        if one.opcode in ("slice-start", "dynamic-slice-start"):
            result = one.shapes[-2:-1]
            return 0.0, _in_hbm(result) + (_size(result) if _in_hbm(operands[0]) else 0)
        if one.opcode in ("slice", "dynamic-slice", "gather"):
            return flops, written + (_size(one.shapes) if _in_hbm(operands[0]) else 0)
        if one.opcode == "dynamic-update-slice":
            return flops, _in_hbm(operands[1]) + (_size(operands[1]) if written else 0)
        return flops, written + sum(map(_in_hbm, operands))

    def _fusion_bytes(
        self, computation: Computation, fusion: Instruction, inner: Computation
    ) -> int:
        total = 0
        for number, name in enumerate(fusion.operands):
            full = _in_hbm(computation.instructions[name].shapes)
            if full and number in inner.parameters:
                total += min(self._read(inner, inner.parameters[number], full), full)
        root = inner.instructions[inner.root]
        parts = root.operands if root.opcode == "tuple" else (root.name,)
        if len(parts) != len(fusion.shapes):
            return total + _in_hbm(fusion.shapes)
        for shape, part in zip(fusion.shapes, parts, strict=True):
            written = _in_hbm((shape,))
            update = self._updated(inner, part)
            total += written if update is None else min(update, written)
        return total

    def _read(self, computation: Computation, name: str, full: int) -> int:
        """Returns the bytes of a fusion's parameter that its users read."""
        total = 0
        for user in computation.users[name]:
            first = user.operands[0] == name
            if user.opcode in ("dynamic-slice", "slice", "gather") and first:
                total += _size(user.shapes)
            elif user.opcode == "bitcast":
                total += self._read(computation, user.name, full)
            elif user.opcode == "fusion":
                inner = self.program.computations[user.called()]
                for number, operand in enumerate(user.operands):
                    if operand == name and number in inner.parameters:
                        total += self._read(inner, inner.parameters[number], full)
            elif not (user.opcode == "dynamic-update-slice" and first):
                return full
        return total

    def _updated(self, computation: Computation, name: str) -> int | None:
        """Returns the bytes that an update in place writes; None if a result is written whole."""
        one = computation.instructions[name]
        while one.opcode == "bitcast":
            one = computation.instructions[one.operands[0]]
        if one.opcode == "fusion":
            inner = self.program.computations[one.called()]
            return self._updated(inner, inner.root)
        if one.opcode != "dynamic-update-slice":
            return None
        return _size(computation.instructions[one.operands[1]].shapes)

    # Communication.

    def _fused_collectives(
        self, computation: Computation, count: int, seen: set[str]
    ) -> Iterator[Operation]:
        """Yields the collectives of a fusion.

        A TPU program spreads one collective over several fusions (start, progress, end), each of
        which holds it in full under the same channel: it counts once in ``seen``.
        """
        for one in computation.instructions.values():
            kind = one.opcode.removesuffix("-start")
            if one.opcode == "fusion":
                inner = self.program.computations[one.called()]
                yield from self._fused_collectives(inner, count, seen)
            elif kind in COLLECTIVES:
                channel = one.attribute("channel_id") or one.name
                if channel in seen:
                    continue
                seen.add(channel)
                if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                yield Operation(one.name, count, 0, 0, self._collective(computation, one, kind))

    def _collective(self, computation: Computation, one: Instruction, kind: str) -> Collective:
        given = sum(
            shape.bytes for name in one.operands for shape in computation.instructions[name].shapes
        )
        pairs = one.attribute("source_target_pairs")
        if pairs:
            group, axes = _pairs(pairs, self.mesh)
            size = 2
        else:
            group = replica_group(one.attribute("replica_groups"), math.prod(self.mesh.values()))
            if one.attribute("replica_groups").startswith("mesh"):
                group = replica_group(
                    one.attributes.partition("replica_groups=")[2], math.prod(self.mesh.values())
                )
            axes = axes_of(group, self.mesh)
            size = len(group)
        share = (size - 1) / size if size else 0.0
        factor = {
            "all-reduce": 2 * share,
            "all-gather": size - 1,
            "reduce-scatter": share,
            "all-to-all": share,
            "ragged-all-to-all": share,
        }
        sent = given * (factor[kind] if kind in factor else 1)
        source = re.search(r'op_name="([^"]*)"', one.attributes)
        return Collective(kind, axes, group, given, sent, source[1] if source else "")


def replica_group(text: str, partitions: int) -> tuple[int, ...]:
    """Returns the first group of ``replica_groups``: ids of partitions.

    The printed forms are ``{{0,1},{2,3}}``, ``[2,2]<=[4]`` (an iota, perhaps transposed: ``[2,2]<=
    [2,2]T(1,0)``) and ``mesh['a'=2,'b'=2] {'b'}`` (the groups along the named axes of a mesh of all
    partitions; ``'b':(2)4`` names part of an axis: 4 entries, of which 2 come before).
    """
    if text.startswith("mesh["):
        return _mesh_group(text)
    if text.startswith("["):
        shape, ids = _iota(text)
        return tuple(int(one) for one in ids.reshape(shape)[0])
    first = re.match(r"\{\{([\d,]+)\}", text)
    return tuple(int(one) for one in first[1].split(",")) if first else tuple(range(partitions))


def axes_of(group: tuple[int, ...], mesh: Mapping[str, int]) -> str:
    """Returns the mesh axes along which the members of a group differ, joined by ``+``."""
    if not mesh or max(group, default=0) >= math.prod(mesh.values()):
        return "?"
    places = np.stack(np.unravel_index(np.asarray(group), tuple(mesh.values())))
    differ = (places != places[:, :1]).any(axis=1)
    return "+".join(name for name, one in zip(mesh, differ, strict=True) if one)


def _mesh_group(text: str) -> tuple[int, ...]:
    head, _, rest = text.partition("]")
    sizes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", head)]
    used = re.search(r"\{([^{}]*)\}", rest)
    parts = {
        name: (int(before or 1), int(size or 0))
        for name, before, size in re.findall(
            r"'([^']+)'(?::\((\d+)\)(\d+))?", used[1] if used else ""
        )
    }
    places: list[np.ndarray] = []
    for name, size in sizes:
        before, count = parts[name] if name in parts else (1, 1)
        count = count or size
        places.append(np.arange(count) * (size // (before * count)))
    ids = np.ravel_multi_index(np.meshgrid(*places, indexing="ij"), [size for _, size in sizes])
    listed = re.match(r",? ?device_ids=\(?(\[[^)]*\](?:T\([\d,]+\))?)\)?", rest)
    if listed:
        ids = _iota(listed[1])[1].reshape(-1)[ids]
    return tuple(int(one) for one in np.ravel(ids))


def _iota(text: str) -> tuple[tuple[int, ...], np.ndarray]:
    match = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text)
    shape = _numbers(match[1])
    reshape = _numbers(match[2]) if match[2] else shape
    ids = np.arange(math.prod(reshape)).reshape(reshape)
    return shape, ids.transpose(_numbers(match[3])) if match[3] else ids


def _pairs(text: str, mesh: Mapping[str, int]) -> tuple[tuple[int, ...], str]:
    """Returns one pair of a permutation that moves, and the axes along which any pair moves."""
    pairs = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", text)]
    moving = [pair for pair in pairs if pair[0] != pair[1]] or pairs[:1]
    names = {name for pair in moving for name in axes_of(pair, mesh).split("+")}
    return moving[0], "+".join(name for name in (*mesh, "?") if name in names)


def _dot_flops(left: Shape, out: Shape, contracting: tuple[int, ...]) -> float:
    return 2.0 * out.elements * math.prod(left.sizes[axis] for axis in contracting)


def _convolution_flops(one: Instruction, left: Shape, kernel: Shape, out: Shape) -> float:
    """Counts the multiply-adds between real elements, as XLA's HloCostAnalysis does."""
    inputs, rest = one.attribute("dim_labels").split("_")
    kernels, outputs = rest.split("->")
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", one.attribute("window")))
    spatial = sorted(letter for letter in inputs if letter.isdigit())

    def entries(name: str, default: int) -> list[int]:
        return [int(n) for n in window[name].split("x")] if name in window else [default] * 9

    pads = [part.split("_") for part in window["pad"].split("x")] if "pad" in window else None
    total = 2.0 * kernel.sizes[kernels.index("i")]
    total *= out.sizes[outputs.index("b")] * out.sizes[outputs.index("f")]
    for axis, letter in enumerate(spatial):
        size = left.sizes[inputs.index(letter)]
        steps = out.sizes[outputs.index(letter)]
        taps = kernel.sizes[kernels.index(letter)]
        low = int(pads[axis][0]) if pads else 0
        place = (
            np.arange(steps)[:, None] * entries("stride", 1)[axis]
            + np.arange(taps) * entries("rhs_dilate", 1)[axis]
            - low
        )
        holes = entries("lhs_dilate", 1)[axis]
        total *= int(np.count_nonzero((place % holes == 0) & (place >= 0) & (place < size * holes)))
    return total


def _operand(computation: Computation, one: Instruction, index: int) -> Shape:
    return computation.instructions[one.operands[index]].shapes[0]


def _in_hbm(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.stored_bytes for shape in shapes if shape.space == 0)


def _size(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.stored_bytes for shape in shapes)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(one) for one in text.strip("{}").split(",") if one.strip())
