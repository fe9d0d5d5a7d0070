"""Captioned shapes: small RGB images drawn from known factors, each with a caption.

Labelled factors without a download: disentanglement (the factors), image-text alignment (the
captions), compositional generalisation (held-out combinations) and contrastive learning (two views
that share what they show). An example is a pure function of (seed, index).
"""

import numpy as np
from jaxtyping import Float, Int, UInt8

from repalign.data.sources import ArraySource
from repalign.registry import UserError, nearest

SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
COLORS = {
    "red": (214, 48, 49),
    "green": (39, 174, 96),
    "blue": (41, 98, 255),
    "yellow": (241, 196, 15),
    "purple": (142, 68, 173),
    "orange": (230, 126, 34),
    "cyan": (0, 188, 212),
    "pink": (255, 118, 170),
}
SIZES = {"small": 0.17, "medium": 0.25, "large": 0.35}
"""Circumscribed radius as a share of the image's side."""
BACKGROUNDS = {"black": (16, 16, 16), "gray": (120, 120, 120), "white": (240, 240, 240)}
VERTICAL = ("top", "middle", "bottom")
HORIZONTAL = ("left", "center", "right")

FACTORS = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "vertical": VERTICAL,
    "horizontal": HORIZONTAL,
    "background": tuple(BACKGROUNDS),
}
"""The categorical factors and their values; an example's ``factors`` are indices in this order."""

_WORDS = sorted({"a", "on", "at", "the", *(word for words in FACTORS.values() for word in words)})
VOCABULARY = ("<pad>", *_WORDS)
_TOKEN = {word: index for index, word in enumerate(VOCABULARY)}

CAPTION_LENGTH = 10
"""Tokens of every caption: ``a large red star on gray at the top left``."""

_SUPERSAMPLING = 3

Factors = Int[np.ndarray, "examples 6"]
Combination = tuple[str, str]


def captions(factors: Factors) -> list[str]:
    """Returns the texts, e.g. ``a large red star on gray at the top left``."""
    texts = []
    for row in factors:
        value = {name: FACTORS[name][index] for name, index in zip(FACTORS, row, strict=True)}
        texts.append(
            f"a {value['size']} {value['color']} {value['shape']} on {value['background']} "
            f"at the {value['vertical']} {value['horizontal']}"
        )
    return texts


def tokenize(texts: list[str]) -> Int[np.ndarray, "texts length"]:
    """Returns token ids in ``VOCABULARY``, padded with 0 to ``CAPTION_LENGTH``.

    Raises:
        UserError: a word is not in the vocabulary, or a text is too long.
    """
    tokens = np.zeros((len(texts), CAPTION_LENGTH), np.int32)
    for row, text in enumerate(texts):
        words = text.split()
        if len(words) > CAPTION_LENGTH:
            raise UserError(f"caption {text!r} has more than {CAPTION_LENGTH} words.")
        for column, word in enumerate(words):
            if word not in _TOKEN:
                raise UserError(f"caption word {word!r} is unknown. {nearest(word, _WORDS)}")
            tokens[row, column] = _TOKEN[word]
    return tokens


def _distance(
    shape: int, x: Float[np.ndarray, "n s s"], y: Float[np.ndarray, "n s s"]
) -> Float[np.ndarray, "n s s"]:
    """Returns a function below 0 inside the shape of circumscribed radius 1 around the origin."""
    match SHAPES[shape]:
        case "circle":
            return x**2 + y**2 - 0.85**2
        case "ring":
            return np.abs(np.hypot(x, y) - 0.7) - 0.22
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.75
        case "cross":
            across = np.minimum(np.abs(x), np.abs(y)) - 0.28
            return np.maximum(across, np.maximum(np.abs(x), np.abs(y)) - 0.95)
        case "triangle":
            sides = (0.5 * x + sign * np.sqrt(0.75) * y for sign in (-1, 1))
            return np.maximum(-x, np.maximum(*sides)) - 0.5
        case _:
            # A five-pointed star: the edge between the outer radius 1 and the inner radius 0.45.
            radius = np.hypot(x, y)
            sector = np.abs(np.mod(np.arctan2(y, x), 2 * np.pi / 5) - np.pi / 5)
            across, along = radius * np.sin(sector), radius * np.cos(sector)
            tip = np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
            notch = np.array([0.45, 0.0])
            normal = np.array([tip[1] - notch[1], notch[0] - tip[0]])
            return (along - notch[0]) * normal[0] + (across - notch[1]) * normal[1]


def render(
    factors: Factors,
    *,
    orientation: Float[np.ndarray, " examples"],
    center: Float[np.ndarray, "examples 2"],
    size: int = 32,
) -> UInt8[np.ndarray, "examples size size 3"]:
    """Draws the shapes, antialiased by 3 x 3 samples per pixel.

    Args:
        factors: indices into ``FACTORS``.
        orientation: rotation in radians.
        center: (row, column) of the centre as shares of the side.
        size: height and width.
    """
    samples = size * _SUPERSAMPLING
    grid = (np.arange(samples, dtype=np.float32) + 0.5) / samples
    radii = np.array(list(SIZES.values()), np.float32)[factors[:, 2]]
    foreground = np.array(list(COLORS.values()), np.float32)[factors[:, 1]]
    background = np.array(list(BACKGROUNDS.values()), np.float32)[factors[:, 5]]
    images = np.empty((len(factors), size, size, 3), np.uint8)
    cosine, sine = (f(orientation).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    for shape in range(len(SHAPES)):
        # Chunks bound the supersampled planes to a few tens of megabytes.
        rows = np.flatnonzero(factors[:, 0] == shape)
        for chosen in np.array_split(rows, -(-len(rows) // 256) or 1):
            if not len(chosen):
                continue
            scale = radii[chosen, None, None]
            down = (grid[None, :, None] - center[chosen, 0, None, None].astype(np.float32)) / scale
            right = (grid[None, None, :] - center[chosen, 1, None, None].astype(np.float32)) / scale
            turned_x = cosine[chosen] * right + sine[chosen] * down
            turned_y = cosine[chosen] * down - sine[chosen] * right
            inside = (_distance(shape, turned_x, turned_y) < 0).astype(np.float32)
            blocks = (len(chosen), size, _SUPERSAMPLING, size, _SUPERSAMPLING)
            cover = inside.reshape(blocks).mean((2, 4))[..., None]
            color, ground = (c[chosen, None, None] for c in (foreground, background))
            images[chosen] = np.rint(cover * color + (1 - cover) * ground).astype(np.uint8)
    return images


def _pairs(held_out: tuple[Combination, ...], split: str) -> Int[np.ndarray, "pairs 2"]:
    for shape, color in held_out:
        if shape not in SHAPES:
            raise UserError(f"held_out: no shape {shape!r}. {nearest(shape, SHAPES)}")
        if color not in COLORS:
            raise UserError(f"held_out: no color {color!r}. {nearest(color, COLORS)}")
    held = {(SHAPES.index(shape), tuple(COLORS).index(color)) for shape, color in held_out}
    every = [(s, c) for s in range(len(SHAPES)) for c in range(len(COLORS))]
    pairs = [pair for pair in every if (pair in held) == (split == "held_out")]
    if not pairs:
        raise UserError(f"captioned_shapes: split {split!r} has no combination of shape and color.")
    return np.array(pairs)


def captioned_shapes(
    examples: int,
    *,
    seed: int,
    size: int = 32,
    held_out: tuple[Combination, ...] = (),
    split: str = "train",
    views: int = 1,
) -> ArraySource:
    """Returns a source of captioned shapes, drawn at once (0.2 to 0.6 ms an image).

    Columns: ``image`` uint8 [size, size, 3]; with ``views=2`` also ``second_image``, the same
    factors with another orientation and another place within the same third of the image;
    ``factors`` int32 [6] (indices into ``FACTORS``), ``orientation`` float32 (radians), ``center``
    float32 [2], ``label`` int32 (the shape), ``tokens`` int32 [CAPTION_LENGTH] (the caption).

    Args:
        seed: examples of two seeds, or of two splits, are drawn independently.
        held_out: (shape, color) pairs, e.g. ``(("star", "red"),)``, that only the split
            ``"held_out"`` shows; ``"train"`` and ``"test"`` show all others.
        split: ``"train"``, ``"test"`` or ``"held_out"``.
        views: 1 or 2.

    Raises:
        UserError: unknown split, pair or number of views, or no example to draw.
    """
    splits = ("train", "test", "held_out")
    if split not in splits:
        raise UserError(f"captioned_shapes: no split {split!r}. {nearest(split, splits)}")
    if views not in (1, 2) or examples < 1:
        raise UserError(f"captioned_shapes: views={views} must be 1 or 2, examples={examples} > 0.")
    rng = np.random.default_rng((seed, splits.index(split)))
    pairs = _pairs(held_out, split)
    factors = np.empty((examples, len(FACTORS)), np.int32)
    factors[:, :2] = pairs[rng.integers(len(pairs), size=examples)]
    for column, values in list(enumerate(FACTORS.values()))[2:]:
        factors[:, column] = rng.integers(len(values), size=examples)

    def draw() -> dict[str, np.ndarray]:
        orientation = rng.uniform(0, 2 * np.pi, examples).astype(np.float32)
        thirds = np.array([0.28, 0.5, 0.72])[factors[:, 3:5]]
        center = (thirds + rng.uniform(-0.05, 0.05, (examples, 2))).astype(np.float32)
        image = render(factors, orientation=orientation, center=center, size=size)
        return {"image": image, "orientation": orientation, "center": center}

    first = draw()
    columns = {
        **first,
        "factors": factors,
        "label": factors[:, 0].copy(),
        "tokens": tokenize(captions(factors)),
    }
    if views == 2:
        columns["second_image"] = draw()["image"]
    return ArraySource(columns)
