"""Plots of a run as inline SVG: matplotlib's, a few KB each where a scripted library brings megabytes.

Colours are names of CSS variables, so that the page they stand in decides between light and dark.
"""

import html
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

SIZE_IN = (4.3, 2.5)
MOST_POINTS = 600
# Colours that occur nowhere else, and what the SVG says in their place.
INK, FAINT = "#010101", "#020202"
SERIES = ("#030301", "#030302", "#030303")
CSS = {INK: "var(--ink)", FAINT: "var(--faint)"} | {c: f"var(--series-{n})" for n, c in enumerate(SERIES, 1)}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8.5, "axes.edgecolor": FAINT,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": FAINT, "grid.alpha": 0.35, "grid.linewidth": 0.5, "lines.linewidth": 1.4, "legend.frameon": False,
    "figure.constrained_layout.use": True,
}  # fmt: skip
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One line of a plot; `faint` draws it behind the others, `dots` marks its points."""

    label: str
    points: Points
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """One plot.

    Attributes:
        log: a logarithmic y axis where the values differ by more than a factor of 5.
        unit: where set, the y axis counts in k, M and so on of it.
        marks: x positions of vertical lines, for restarts.
    """

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    y_label: str = ""
    log: bool = False
    unit: str | None = None
    from_zero: bool = False
    marks: Sequence[float] = field(default_factory=tuple)


def draw(chart: Chart) -> str:
    """The plot as an <svg> element with no id, script or address in it that could clash or be asked for."""
    with rc_context(STYLE):
        figure = Figure(figsize=SIZE_IN)
        axes = figure.add_subplot()
        shown = [line for line in chart.lines if line.points]
        for number, line in enumerate(shown):
            x, y = zip(*thin(line.points), strict=True)
            few = line.dots or len(x) < 3
            axes.plot(
                x, y, label=line.label, color=SERIES[number % len(SERIES)], marker="o" if few else None, markersize=3,
                alpha=0.35 if line.faint else 1.0, linewidth=0.8 if line.faint else 1.4,
            )  # fmt: skip
        for mark in chart.marks:
            axes.axvline(mark, color=SERIES[2], linestyle="--", linewidth=0.9)
        values = [y for line in shown for _, y in line.points]
        if chart.log and min(values) > 0 and max(values) > 5 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
            if chart.unit is not None:
                axes.yaxis.set_major_formatter(EngFormatter(chart.unit))
            if chart.from_zero:
                axes.set_ylim(bottom=0, top=1.05 * max(max(values), 1e-12))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=chart.x_label in ("step", "round")))
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        if len(shown) > 1:
            # Above the plot, where no line can run through it.
            axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=len(shown), borderpad=0)
        text = io.StringIO()
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return _inline(text.getvalue(), chart.title)


def thin(points: Points) -> Points:
    """At most `MOST_POINTS` points, each the mean of its neighbours; the last one stays as it is."""
    if len(points) <= MOST_POINTS:
        return points
    group = -(-len(points) // (MOST_POINTS - 1))
    parts = [points[at : at + group] for at in range(0, len(points), group)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
    return [*means, points[-1]]


def smooth(points: Points) -> Points:
    """The mean of each point and its neighbours, a fifteenth of the points to either side at most."""
    totals = [0.0, *itertools.accumulate(y for _, y in points)]
    smoothed, reach = [], max(1, len(points) // 15)
    for at, (x, _) in enumerate(points):
        # Fewer neighbours near the ends, as many on both sides: a steep start stays where it is.
        side = min(reach, at, len(points) - 1 - at)
        smoothed.append((x, (totals[at + side + 1] - totals[at - side]) / (2 * side + 1)))
    return smoothed


def _inline(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{html.escape(title)}"', svg, count=1)
    for colour, variable in CSS.items():
        svg = svg.replace(colour, variable)
    return svg.replace("font: 8.5px 'sans-serif'", "font: 8.5px sans-serif")
