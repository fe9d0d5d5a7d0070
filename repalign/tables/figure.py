"""One picture of a table: curves with their spread over seeds, and samples of every row."""

import functools
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib.figure
import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from repalign.tables.table import Curve, Evaluation

# Okabe and Ito's palette, which colour-blind readers can tell apart, darker colours first.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#333333", "#8C6D31")
_INK = "#222222"
_FAINT = "#8a8a8a"


def pool_seeds(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps at which every seed has a finite value, and mean and standard deviation over seeds.

    The deviation has n - 1 in the denominator, and is zero for a single seed.
    """
    finite = [curve.steps[np.isfinite(curve.values)] for curve in curves]
    steps = functools.reduce(np.intersect1d, finite)
    values = np.stack([curve.values[np.isin(curve.steps, steps)] for curve in curves])
    spread = values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(steps))
    return steps, values.mean(axis=0), spread


def spread_labels(positions: Sequence[float], gap: float, lowest: float) -> list[float]:
    """Moves positions apart until neighbours are at least ``gap`` away, keeping their order.

    Labels that collide form a block that is centred on its members' mean; none goes below
    ``lowest``.
    """
    order = [int(index) for index in np.argsort(positions, kind="stable")]
    positions = list(positions)
    for rank, index in enumerate(order):
        positions[index] = max(positions[index], lowest + rank * gap)
    blocks: list[tuple[float, list[int]]] = []  # (centre, members)
    for index in order:
        centre, members = positions[index], [index]
        while blocks:
            below, others = blocks[-1]
            if centre - below >= gap * (len(members) + len(others)) / 2:
                break
            blocks.pop()
            members = others + members
            centre = float(np.mean([positions[member] for member in members]))
        blocks.append((centre, members))
    moved = [0.0] * len(positions)
    for centre, members in blocks:
        for i, member in enumerate(members):
            moved[member] = centre + (i - (len(members) - 1) / 2) * gap
    return moved


def tile(images: UInt8[np.ndarray, "count height width channels"], columns: int) -> np.ndarray:
    """Images side by side, ``columns`` in a line, with white gaps; what is left over is dropped."""
    _, height, width, channels = images.shape
    gap = max(1, round(0.06 * height))
    lines = len(images) // columns
    canvas = np.full(
        (lines * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8
    )
    for i in range(lines * columns):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = images[i]
    return canvas


def save_figure(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    metric: str,
    *,
    samples: Mapping[str, UInt8[np.ndarray, "count height width channels"]] | None = None,
    samples_per_row: int = 8,
    scale: Literal["linear", "log"] = "linear",
    dpi: int = 160,
) -> None:
    """Writes a PNG: ``metric`` against steps on the left, samples of each row on the right.

    A line is the mean over seeds, its band one standard deviation to each side (drawn where it is
    positive on a logarithmic axis), and the label at its end the row's title.

    Args:
        path: the file to write.
        evaluation: the table; rows without finite values of the metric are left out.
        metric: a recorded metric, not a derived column.
        samples: images by row title, uint8 in 0 .. 255 with one or three channels; without any,
            the curves take the whole width.
        samples_per_row: images beside each other; each row of the table gets up to two lines.
        scale: of the vertical axis.
        dpi: pixels an inch.

    Raises:
        ValueError: no row has values of the metric, or samples of an unknown row.
    """
    curves = {
        row: [
            evaluation.results[row][seed].curves[metric]
            for seed in evaluation.seeds
            if seed in evaluation.results[row] and metric in evaluation.results[row][seed].curves
        ]
        for row in evaluation.rows
    }
    curves = {row: found for row, found in curves.items() if found and len(pool_seeds(found)[0])}
    if not curves:
        raise ValueError(f"no row of {evaluation.experiment!r} has values of {metric!r}.")
    samples = samples or {}
    unknown = set(samples) - set(evaluation.table.rows)
    if unknown:
        raise ValueError(f"samples of rows that the table does not have: {sorted(unknown)}.")
    colours = {row: _COLOURS[i % len(_COLOURS)] for i, row in enumerate(evaluation.table.rows)}
    pictures = {
        row: samples[row] for row in evaluation.rows if row in samples and len(samples[row])
    }

    figure = matplotlib.figure.Figure(figsize=(11.5 if pictures else 6.8, 4.6), facecolor="white")
    FigureCanvasAgg(figure)
    _draw_curves(figure, evaluation, curves, metric, scale, colours, 0.6 if pictures else 0.98)
    if pictures:
        _draw_samples(figure, pictures, samples_per_row, colours, 0.63)
    figure.savefig(path, dpi=dpi, format="png")


def _draw_curves(
    figure: matplotlib.figure.Figure,
    evaluation: Evaluation,
    curves: Mapping[str, Sequence[Curve]],
    metric: str,
    scale: str,
    colours: Mapping[str, str],
    right: float,
) -> None:
    """Fills the figure from its left edge to ``right``, the labels of the lines included."""
    bottom, top = 0.12, 0.86
    axes = figure.add_axes((0.5 / figure.get_figwidth(), bottom, right / 2, top - bottom))
    axes.set_yscale(scale)
    ends = {}
    lowest, highest = np.inf, -np.inf
    for row, found in curves.items():
        steps, mean, spread = pool_seeds(found)
        low = mean - spread
        if scale == "log":
            low = np.where(low > 0, low, np.nan)
        axes.fill_between(steps, low, mean + spread, color=colours[row], alpha=0.18, linewidth=0)
        axes.plot(steps, mean, color=colours[row], linewidth=1.9, solid_capstyle="round")
        axes.plot(steps[-1:], mean[-1:], "o", color=colours[row], markersize=4.5, clip_on=False)
        ends[row] = (steps[-1], mean[-1])
        lowest, highest = min(lowest, mean.min()), max(highest, mean.max())
    axes.set_xlim(0, max(max(step for step, _ in ends.values()), 1))
    headings = {column.name: column.heading for column in evaluation.table.columns}
    title = headings[metric] if metric in headings else metric.replace("_", " ")
    axes.set_title(title, loc="left", fontsize=11, color=_INK, pad=16)
    if len(evaluation.seeds) > 1:
        note = f"mean and standard deviation over {len(evaluation.seeds)} seeds"
        axes.text(0, 1.02, note, transform=axes.transAxes, fontsize=8, color=_FAINT)
    axes.set_xlabel("steps", color=_INK, fontsize=9)
    if scale == "log":
        wide = highest > 10 * lowest
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if wide else MaxNLocator(6))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(colors=_FAINT, labelcolor=_INK, labelsize=8.5, length=3)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)

    # Labels stand beside the ends of their lines, moved apart where lines end close together, and
    # the axes take the width that the labels and the numbers of the vertical axis leave.
    texts = {row: textwrap.fill(row, 32) for row in ends}
    lines = max(text.count("\n") + 1 for text in texts.values())
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = spread_labels(
        [float(to_axes.transform(end)[1]) for end in ends.values()],
        gap=0.015 + 0.042 * lines,
        lowest=0.03,
    )
    labels = [
        axes.annotate(
            texts[row],
            xy=(1.0, height),
            xytext=(8, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colours[row],
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
        for row, height in zip(ends, heights, strict=True)
    ]
    figure.canvas.draw()
    pixels = figure.bbox.width
    label_width = max(label.get_window_extent().width for label in labels) / pixels
    left = (axes.bbox.x0 - axes.get_tightbbox().x0) / pixels + 0.01
    axes.set_position((left, bottom, right - label_width - 0.02 - left, top - bottom))


def _draw_samples(
    figure: matplotlib.figure.Figure,
    pictures: Mapping[str, np.ndarray],
    samples_per_row: int,
    colours: Mapping[str, str],
    left: float,
) -> None:
    """Stacks titled grids of one width from the top, as large as the right part allows."""
    inches_wide, inches_high = figure.get_size_inches()
    title, space = 0.26, 0.08  # inches above and below a grid
    grids = {}
    for row, images in pictures.items():
        columns = min(samples_per_row, len(images))
        grids[row] = tile(images[: 2 * columns], columns)
    ratios = [grid.shape[0] / grid.shape[1] for grid in grids.values()]
    available = 0.95 * inches_high - (title + space) * len(grids)
    width = min((0.985 - left) * inches_wide, available / sum(ratios))
    top = 0.97 * inches_high
    for (row, grid), ratio in zip(grids.items(), ratios, strict=True):
        top -= title + width * ratio
        box = (left, top / inches_high, width / inches_wide, width * ratio / inches_high)
        axes = figure.add_axes(box)
        axes.imshow(
            grid.squeeze(-1) if grid.shape[-1] == 1 else grid,
            cmap="gray",
            vmin=0,
            vmax=255,
            interpolation="nearest",
            aspect="auto",
        )
        axes.set_axis_off()
        axes.set_title(row, loc="left", fontsize=9, color=colours[row], pad=4)
        top -= space
