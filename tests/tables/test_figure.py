import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest
from PIL import Image

from repalign.tables.figure import pool_seeds, save_figure, spread_labels, tile
from repalign.tables.table import Curve, Result, Table, evaluate


def test_pool_seeds_keeps_the_steps_that_every_seed_has():
    first = Curve(np.array([1, 2, 3, 4]), np.array([1.0, 2.0, 3.0, np.nan]))
    second = Curve(np.array([2, 3, 4]), np.array([4.0, 3.0, 1.0]))
    steps, mean, spread = pool_seeds([first, second])
    np.testing.assert_array_equal(steps, [2, 3])
    np.testing.assert_allclose(mean, [3.0, 3.0])
    np.testing.assert_allclose(spread, [np.sqrt(2), 0.0])
    np.testing.assert_array_equal(pool_seeds([second])[2], np.zeros(3))


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.8, 0.52, 0.5], [0.8, 0.56, 0.46]),
        ([0.5, 0.55, 0.6], [0.45, 0.55, 0.65]),
        ([0.0, 0.05], [0.05, 0.15]),
    ],
)
def test_spread_labels(positions, expected):
    np.testing.assert_allclose(spread_labels(positions, 0.1, 0.05), expected)


def test_tile_places_images_in_reading_order():
    images = np.stack([np.full((20, 20, 1), value, np.uint8) for value in (10, 20, 30, 40, 50)])
    canvas = tile(images, 2)
    assert canvas.shape == (41, 41, 1)  # the fifth image is left over
    assert [canvas[y, x, 0] for y, x in ((0, 0), (0, 40), (40, 0), (40, 40))] == [10, 20, 30, 40]
    assert (canvas[20] == 255).all()


def make_evaluation(scale=1.0):
    table = Table(
        paper=0, rows={"SiT": "baseline", "SiT + REPA": "repa"}, columns=("fid",), seeds=2
    )
    steps = np.arange(0, 500, 100)
    results = {
        row: {
            seed: Result({"fid": Curve(steps, scale * (5.0 * np.exp(-steps / 200) * gain + seed))})
            for seed in range(2)
        }
        for row, gain in (("SiT", 1.0), ("SiT + REPA", 0.5))
    }
    return evaluate(table, results, experiment="repa")


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def has_colour(picture, colour):
    return bool((picture == np.array(colour)).all(-1).any())


BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def test_a_figure_shows_every_row_and_its_samples_and_leaves_no_global_state(tmp_path):
    settings = dict(matplotlib.rcParams)
    samples = {"SiT": np.full((3, 8, 8, 3), (12, 200, 34), np.uint8)}
    save_figure(tmp_path / "figure.png", make_evaluation(), "fid", samples=samples, dpi=80)
    picture = pixels(tmp_path / "figure.png")
    assert picture.shape == (368, 920, 3)
    curves, grid = picture[:, :552], picture[:, 552:]
    assert has_colour(curves, BLUE) and has_colour(curves, ORANGE)
    assert has_colour(grid, (12, 200, 34)) and not has_colour(curves, (12, 200, 34))
    assert (picture[[0, -1]] == 255).all() and (picture[:, [0, -1]] == 255).all()
    assert matplotlib.pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_a_logarithmic_axis_without_samples(tmp_path, scale):
    save_figure(tmp_path / "figure.png", make_evaluation(scale), "fid", scale="log", dpi=80)
    picture = pixels(tmp_path / "figure.png")
    assert has_colour(picture, BLUE) and has_colour(picture, ORANGE)


def test_what_cannot_be_drawn_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no row of 'repa' has values of 'loss'"):
        save_figure(tmp_path / "figure.png", make_evaluation(), "loss")
    with pytest.raises(ValueError, match="the table does not have"):
        samples = {"DiT": np.zeros((1, 8, 8, 1), np.uint8)}
        save_figure(tmp_path / "figure.png", make_evaluation(), "fid", samples=samples)
