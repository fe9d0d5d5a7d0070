import numpy as np
import pytest

from repalign.data.captioned_shapes import (
    BACKGROUNDS,
    COLORS,
    FACTORS,
    SHAPES,
    SIZES,
    VOCABULARY,
    captioned_shapes,
    captions,
    render,
    tokenize,
)
from repalign.registry import UserError


def test_examples_are_a_function_of_seed_and_split():
    first, same = (captioned_shapes(20, seed=1, views=2) for _ in range(2))
    for name, column in first.arrays.items():
        np.testing.assert_array_equal(column, same.arrays[name])
    other = captioned_shapes(20, seed=1, split="test")
    assert (first.arrays["factors"] != other.arrays["factors"]).any()
    assert first.columns["image"].shape == (32, 32, 3)
    # The second view shows the same factors, drawn elsewhere.
    assert (first.arrays["image"] != first.arrays["second_image"]).any()


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi * 0.85**2),
        ("ring", np.pi * (0.92**2 - 0.48**2)),
        ("square", 1.5**2),
        ("cross", 2 * 1.9 * 0.56 - 0.56**2),
        ("triangle", 3 * np.sqrt(3) / 4),
        ("star", 5 * 0.45 * np.sin(np.pi / 5)),
    ],
)
def test_drawn_area_and_colors(shape, area):
    factors = np.array([[SHAPES.index(shape), 0, 2, 1, 1, 0]] * 2, np.int32)
    images = render(
        factors, orientation=np.array([0.0, 1.0]), center=np.full((2, 2), 0.5), size=64
    ).astype(float)
    ground, color = np.array(BACKGROUNDS["black"]), np.array(COLORS["red"])
    cover = ((images - ground) / (color - ground)).mean((1, 2))
    np.testing.assert_allclose(cover, area * SIZES["large"] ** 2, rtol=0.03)
    np.testing.assert_array_equal(images[0, 0, 0], ground)
    assert (images == color).all(-1).any()


def test_captions_say_the_factors():
    source = captioned_shapes(30, seed=0)
    texts = captions(source.arrays["factors"])
    row = dict(zip(FACTORS, source.arrays["factors"][4], strict=True))
    for name, index in row.items():
        assert FACTORS[name][index] in texts[4].split()
    words = [VOCABULARY[token] for token in source.arrays["tokens"][4] if token]
    assert " ".join(words) == texts[4]
    with pytest.raises(UserError, match="'rad' is unknown. Did you mean 'red'"):
        tokenize(["a rad star"])


def test_held_out_pairs_are_only_in_their_split():
    held_out = (("star", "red"), ("circle", "blue"))
    pairs = {
        split: {
            (SHAPES[shape], tuple(COLORS)[color])
            for shape, color in captioned_shapes(
                400, seed=0, size=4, held_out=held_out, split=split
            ).arrays["factors"][:, :2]
        }
        for split in ("train", "test", "held_out")
    }
    assert pairs["held_out"] == set(held_out)
    assert not pairs["train"] & set(held_out) and not pairs["test"] & set(held_out)
    assert len(pairs["train"]) == 46


def test_mistakes_are_named():
    with pytest.raises(UserError, match="no combination"):
        captioned_shapes(4, seed=0, split="held_out")
    with pytest.raises(UserError, match="Did you mean 'star'"):
        captioned_shapes(4, seed=0, held_out=(("stra", "red"),))
    with pytest.raises(UserError, match="Did you mean 'train'"):
        captioned_shapes(4, seed=0, split="trein")
    with pytest.raises(UserError, match="views=3"):
        captioned_shapes(4, seed=0, views=3)
