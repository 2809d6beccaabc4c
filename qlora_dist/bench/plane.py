"""Memory and speed in one picture: each point where it lies, ours joined by the line that nothing of ours beats."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from matplotlib.transforms import Bbox, IdentityTransform

from qlora_dist.bench.spots import OURS, Spot, frontier

SIZE_IN, DPI = (10.0, 6.4), 150
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.6, "legend.frameon": False, "axes.axisbelow": True,
}  # fmt: skip
OUR_COLOUR = "#c1272d"
COLOURS = ("#1f5aa6", "#2e8b57", "#8a5a00", "#6a3d9a", "#008b8b", "#555555", "#b15928", "#33557a", "#777733", "#9b2d7a")
MARKERS = "sD^vPX<>ph"
TICKS = (0.1, 0.2, 0.5, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 141, 192, 256)
# Where a label may stand, as steps from its point: beside it, above, below, then further away.
DIRECTIONS = ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
DISTANCES = (9, 18, 30, 44, 60, 80)
# From here on a thin line joins them.
FAR = 12


def draw_plane(
    path: Path,
    spots: Sequence[Spot],
    title: str,
    x_label: str,
    y_label: str,
    ceilings: Sequence[tuple[str, float]] = (),
) -> None:
    """Write the PNG. `ceilings`: names and tokens/s of horizontal lines."""
    with rc_context(STYLE):
        figure = Figure(figsize=SIZE_IN, dpi=DPI)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _scale(axes, spots, [height for _, height in ceilings])
        _series(axes, spots)
        for name, height in ceilings:
            axes.axhline(height, color="#999999", linestyle="--", linewidth=1)
            axes.annotate(
                f"{name}: {height:,.0f}", (0.005, height), xycoords=("axes fraction", "data"), xytext=(0, 3),
                textcoords="offset points", fontsize=9, color="#666666",
            )  # fmt: skip
        axes.set_title(title, loc="left", fontsize=12, pad=12)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9.5, columnspacing=1.2
        )
        figure.set_layout_engine("constrained")
        canvas.draw()
        # The layout is final now, and so is what the labels are placed against.
        figure.set_layout_engine("none")
        _labels(axes, canvas, spots)
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.print_png(path)


def _scale(axes: Axes, spots: Sequence[Spot], heights: Sequence[float]) -> None:
    widths = [spot.gib for spot in spots]
    heights = [*heights, *(spot.tokens_per_second for spot in spots)]
    axes.set_xscale("log")
    axes.set_xlim(min(widths) / 1.25, max(widths) * 1.35)
    axes.set_ylim(0, max(heights) * 1.12)
    near = [tick for tick in TICKS if min(widths) / 1.25 <= tick <= max(widths) * 1.35]
    # Where all points have nearly the same memory, theirs are the numbers.
    axes.xaxis.set_major_locator(FixedLocator(_apart(near if len(near) > 1 else sorted(widths))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _apart(ticks: Sequence[float]) -> list[float]:
    """Ticks whose numbers do not run into each other on a logarithmic axis."""
    shown: list[float] = []
    for tick in ticks:
        if not shown or tick / shown[-1] >= 1.12:
            shown.append(tick)
    return shown


def _series(axes: Axes, spots: Sequence[Spot]) -> None:
    ours = [spot for spot in spots if spot.series == OURS]
    if ours:
        front = frontier(ours)
        axes.plot(
            [s.gib for s in front], [s.tokens_per_second for s in front], color=OUR_COLOUR, linewidth=1.8, zorder=3
        )
        axes.plot(
            [s.gib for s in ours], [s.tokens_per_second for s in ours], "o", color=OUR_COLOUR, markersize=7, zorder=4,
            label=OURS,
        )  # fmt: skip
    for position, (name, colour) in enumerate(_colours(spots).items()):
        theirs = [spot for spot in spots if spot.series == name != OURS]
        if theirs:
            axes.plot(
                [s.gib for s in theirs], [s.tokens_per_second for s in theirs], MARKERS[position % len(MARKERS)],
                color=colour, markersize=7, zorder=3, label=name,
            )  # fmt: skip


def _colours(spots: Sequence[Spot]) -> dict[str, str]:
    others = dict.fromkeys(spot.series for spot in spots if spot.series != OURS)
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(others)} | {OURS: OUR_COLOUR}


def _labels(axes: Axes, canvas: FigureCanvasAgg, spots: Sequence[Spot]) -> None:
    """Write each spot's label in the nearest place that is free of spots, labels, lines and the border."""
    renderer, inside, colours = canvas.get_renderer(), axes.get_window_extent(), _colours(spots)
    points_to_pixels = DPI / 72
    taken = [_around(axes.transData.transform((spot.gib, spot.tokens_per_second)), 7) for spot in spots]
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    front = frontier([spot for spot in spots if spot.series == OURS])
    line = [axes.transData.transform((spot.gib, spot.tokens_per_second)) for spot in front]
    for start, end in itertools.pairwise(line):
        steps = max(int(abs(end - start).max() // 8), 1)
        taken += [_around(start + (end - start) * step / steps, 3) for step in range(steps + 1)]
    for spot in sorted(spots, key=lambda spot: (spot.series != OURS, -spot.tokens_per_second)):
        if not spot.label:
            continue
        x, y = axes.transData.transform((spot.gib, spot.tokens_per_second))
        text = axes.text(0, 0, spot.label, fontsize=9, color=colours[spot.series], transform=None, zorder=5)
        size = text.get_window_extent(renderer)
        box = Bbox.null()
        for distance in DISTANCES:
            for right, up in DIRECTIONS:
                left = x + right * distance * points_to_pixels - size.width * (1 - right) / 2
                low = y + up * distance * points_to_pixels - size.height * (1 - up) / 2
                box = Bbox.from_bounds(left, low, size.width, size.height)
                if _free(box, taken, inside):
                    break
            else:
                continue
            break
        # A label that finds no place at all stands in the last one tried: crowded, and still there.
        text.set_position((box.x0, box.y0 + size.height * 0.2))
        taken.append(box)
        near = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
        if math.dist((x, y), near) > FAR * points_to_pixels:
            axes.add_artist(
                Line2D(*zip((x, y), near, strict=True), color="#888888", linewidth=0.7, transform=IdentityTransform())
            )


def _around(at: Any, reach: float) -> Bbox:
    x, y = at
    return Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)


def _free(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> bool:
    within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
    return within and not any(box.overlaps(other) for other in taken)
