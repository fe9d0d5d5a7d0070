"""Reads the text of a compiled XLA program: computations, instructions, shapes, trip counts.

Only what a cost needs is kept. The text is what ``compiled.as_text()`` of jax returns for CPU, TPU
and GPU; the grammar followed is the one that XLA's own printer writes (openxla/xla,
``xla/hlo/ir/hlo_instruction.cc`` and ``xla/shape_util.cc``).
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128, "f4e2m1fn": 4, "f8e3m4": 8, "f8e4m3": 8, "f8e4m3b11fnuz": 8,
    "f8e4m3fn": 8, "f8e4m3fnuz": 8, "f8e5m2": 8, "f8e5m2fnuz": 8, "f8e8m0fnu": 8, "token": 0,
    "opaque": 0,
}  # fmt: skip
"""Bits of an element by XLA's name of its type."""

_LEAF = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_SAME_VALUE = ("bitcast", "convert", "copy", "reshape")


class Shape(NamedTuple):
    """An array: element type, sizes, order of the axes in memory, first tile, memory space.

    Space 0 is HBM; a TPU's VMEM is 1, its flags and scalar memory 2 to 4, the host's memory 5.
    """

    dtype: str
    sizes: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        return -(-self.elements * BITS[self.dtype] // 8)

    @property
    def stored_bytes(self) -> int:
        """Bytes with the padding of the tiles in which a TPU stores an array."""
        order = self.minor_to_major or tuple(reversed(range(len(self.sizes))))
        sizes = [self.sizes[axis] for axis in reversed(order)]
        tile = self.tile[-len(sizes) :] if sizes else ()
        for place, unit in enumerate(reversed(tile), start=1):
            sizes[-place] = -(-sizes[-place] // unit) * unit
        return -(-math.prod(sizes) * BITS[self.dtype] // 8)


class Instruction(NamedTuple):
    """One instruction: the arrays it returns, its operands by name, and the rest as text."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    argument: str
    attributes: str

    def attribute(self, name: str) -> str:
        """Returns the value of ``name=...``, or nothing: up to the next blank or comma outside
        brackets."""
        match = re.search(rf"(?<!\w){name}=", self.attributes)
        return "" if match is None else _upto(self.attributes, match.end(), " ,")

    def called(self, name: str = "calls") -> str:
        """Returns the name of the computation that the attribute names, or nothing."""
        return self.attribute(name).removeprefix("%")


class Computation(NamedTuple):
    """Instructions by name, in order; the root's name; names of parameters; users by name."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str
    parameters: Mapping[int, str]
    users: Mapping[str, list[Instruction]]


class Program(NamedTuple):
    """A compiled module: its computations by name, and which of them is run."""

    computations: Mapping[str, Computation]
    entry: str


class Carried(NamedTuple):
    """A number in a loop: entry ``index`` of the loop's state plus ``offset``."""

    index: int
    offset: int


Number = int | Carried | None
"""What is known of an integer: its value, which entry of a loop's state it is, or nothing."""


def parse(text: str) -> Program:
    """Parses the text of a compiled program.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    body: dict[str, Instruction] = {}
    entry = name = root = ""
    for line in text.splitlines():
        if not name:
            header = _HEADER.match(line)
            if header:
                name, body, root = header[2], {}, ""
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = _computation(name, body, root)
            name = ""
        elif start := _INSTRUCTION.match(line):
            body[start[2]] = _instruction(start[2], line[start.end() :])
            root = start[2] if start[1] else root
    if entry not in computations:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY.")
    return Program(computations, entry)


def trip_count(program: Program, caller: Computation, loop: Instruction) -> int | None:
    """Returns how often a ``while`` runs its body; None if the text does not say.

    Either XLA has noted it (``known_trip_count``), or the condition compares a counter with a
    number, the body adds a number to the counter and the counter starts at a number.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations[loop.called("condition")]
    body = program.computations[loop.called("body")]
    compare, at, parameters = _follow(program, condition, condition.root, {})
    if compare.opcode != "compare":
        return None
    sides = [value(program, at, operand, parameters) for operand in compare.operands]
    directions = compare.attribute("direction")
    if isinstance(sides[0], int):
        sides.reverse()
        directions = directions.translate(str.maketrans("LG", "GL"))
    counter, bound = sides
    if not isinstance(counter, Carried):
        return None
    if isinstance(bound, Carried):
        bound = _initial(program, caller, loop, bound)
    start = _initial(program, caller, loop, counter)
    state = body.instructions[body.root]
    after = value(program, body, state.operands[counter.index], {}) if state.operands else None
    if not (isinstance(bound, int) and isinstance(start, int) and isinstance(after, Carried)):
        return None
    steps = {
        "LT": (bound - start, after.offset),
        "LE": (bound - start + 1, after.offset),
        "GT": (start - bound, -after.offset),
        "GE": (start - bound + 1, -after.offset),
    }
    if directions not in steps:
        return None
    distance, stride = steps[directions]
    if after.index != counter.index or stride <= 0:
        return None
    return max(-(-distance // stride), 0)


def value(
    program: Program, computation: Computation, name: str, parameters: Mapping[int, Number]
) -> Number:
    """Returns an integer of a computation: a constant, or one that a loop carries; else None.

    ``parameters`` are those of a computation that another one calls.
    """
    instruction, computation, parameters = _follow(program, computation, name, parameters)
    operands = instruction.operands
    match instruction.opcode:
        case "constant":
            return (
                int(instruction.argument) if re.fullmatch(r"-?\d+", instruction.argument) else None
            )
        case "parameter":
            return parameters.get(int(instruction.argument))
        case "get-tuple-element":
            source = computation.instructions[operands[0]]
            index = int(instruction.attribute("index"))
            if source.opcode == "tuple":
                return value(program, computation, source.operands[index], parameters)
            return Carried(index, 0) if source.opcode == "parameter" else None
        case "add" | "subtract":
            left, right = (value(program, computation, one, parameters) for one in operands)
            if isinstance(left, int) and isinstance(right, Carried):
                left, right = right, left
            if not isinstance(right, int) or left is None:
                return None
            right = right if instruction.opcode == "add" else -right
            return (
                left + right if isinstance(left, int) else left._replace(offset=left.offset + right)
            )
    return None


def _follow(
    program: Program, computation: Computation, name: str, parameters: Mapping[int, Number]
) -> tuple[Instruction, Computation, Mapping[int, Number]]:
    """Goes through copies, and into fusions and calls, to what computes a value."""
    instruction = computation.instructions[name]
    while True:
        if instruction.opcode in _SAME_VALUE:
            instruction = computation.instructions[instruction.operands[0]]
            continue
        if instruction.opcode == "get-tuple-element":
            source = computation.instructions[instruction.operands[0]]
            if source.opcode not in ("fusion", "call"):
                return instruction, computation, parameters
            index, instruction = int(instruction.attribute("index")), source
        elif instruction.opcode in ("fusion", "call"):
            index = None
        else:
            return instruction, computation, parameters
        inner = program.computations[
            instruction.called()
            if instruction.opcode == "fusion"
            else instruction.called("to_apply")
        ]
        parameters = {
            number: value(program, computation, operand, parameters)
            for number, operand in enumerate(instruction.operands)
        }
        computation, instruction = inner, inner.instructions[inner.root]
        if index is not None:
            instruction = inner.instructions[instruction.operands[index]]


def _initial(
    program: Program, caller: Computation, loop: Instruction, carried: Carried
) -> int | None:
    """Returns what an entry of a loop's state is before the first iteration."""
    state = caller.instructions[loop.operands[0]]
    if state.opcode != "tuple":
        return None
    start = value(program, caller, state.operands[carried.index], {})
    return start + carried.offset if isinstance(start, int) else None


def _computation(name: str, body: dict[str, Instruction], root: str) -> Computation:
    users: dict[str, list[Instruction]] = {one: [] for one in body}
    for instruction in body.values():
        for operand in dict.fromkeys(instruction.operands):
            users[operand].append(instruction)
    parameters = {int(one.argument): one.name for one in body.values() if one.opcode == "parameter"}
    return Computation(name, body, root, parameters, users)


def _instruction(name: str, text: str) -> Instruction:
    """Reads ``TYPE OPCODE(OPERANDS), ATTRIBUTES``."""
    kind = _upto(text, 0, " ")
    opcode, _, _ = text[len(kind) + 1 :].partition("(")
    start = len(kind) + 1 + len(opcode)
    argument = _upto(text, start, ",")[1:-1]
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(argument))
    return Instruction(
        name, _shapes(kind), opcode, operands, argument, text[start + len(argument) + 2 :]
    )


def _shapes(text: str) -> tuple[Shape, ...]:
    """Returns the arrays of a type; those of nested tuples one after the other."""
    shapes = []
    for dtype, sizes, layout in _LEAF.findall(text):
        order, _, tiling = layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", tiling)
        space = re.search(r"S\((\d+)\)", tiling)
        shapes.append(
            Shape(
                dtype,
                tuple(int(size.strip().removeprefix("<=")) for size in sizes.split(",") if size),
                tuple(int(axis) for axis in order.split(",") if axis.strip().isdigit()),
                tuple(int(size) for size in tile[1].split(",")) if tile else (),
                int(space[1]) if space else 0,
            )
        )
    return tuple(shapes)


def _upto(text: str, start: int, ends: str) -> str:
    """Returns the text from ``start`` to the first of ``ends`` outside brackets and quotes."""
    depth, quoted = 0, False
    for place in range(start, len(text)):
        letter = text[place]
        if letter == '"' and text[place - 1] != "\\":
            quoted = not quoted
        if quoted:
            continue
        if depth == 0 and letter in ends:
            return text[start:place]
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
            if depth < 0:
                return text[start:place]
    return text[start:]
