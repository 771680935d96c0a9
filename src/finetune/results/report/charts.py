"""Charts as SVG: text stays text, and colors are CSS variables of the page, which has a light and a dark theme."""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns about its cache folder

import matplotlib  # noqa: E402
from markupsafe import Markup  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: E402

from finetune.wording import clean  # noqa: E402

# The page's CSS variables, and the placeholder colors that matplotlib draws with.
COLORS = ("ink", "quiet", "line", "first", "second", "good", "bad", "warn")
INK, QUIET, GRID, FIRST, SECOND, GOOD, BAD, WARN = (f"#00000{number}" for number in range(1, 9))
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "axes.facecolor": "none",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.fontsize": 10.5,
    "figure.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
# In points, which equal CSS pixels on a page 390 wide; on wider pages text is at least as large.
WIDTH, HEIGHT = 322, 200
MOST_MARKERS, MOST_LETTERS = 30, 24
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve; `thin` for a noisy one drawn behind others."""

    label: str
    points: Points
    color: str = FIRST
    thin: bool = False


def in_words(what: str, points: Points) -> str:
    """Describe a curve for screen readers."""
    if not points:
        return f"{what}: not recorded."
    (first_step, first), (last_step, last) = points[0], points[-1]
    ends = f"{first:.4g} at step {first_step:,} to {last:.4g} at step {last_step:,}"
    finite = [value for _, value in points if math.isfinite(value)]
    return f"{what}: from {ends}" + (f", least {min(finite):.4g}, most {max(finite):.4g}." if finite else ".")


def curves(name: str, title: str, description: str, lines: Iterable[Line], best: tuple[float, float] | None) -> Markup:
    """Draw curves over steps and mark `best` (step, value). `name`, letters only, is the SVG's id."""
    with _style(name):
        figure = Figure((WIDTH / 72, HEIGHT / 72), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        for line in (line for line in lines if line.points):
            look: dict[str, Any] = {"linewidth": 1.1, "alpha": 0.6} if line.thin else {"ms": 3.5}
            marker = "" if line.thin or len(line.points) > MOST_MARKERS else "o"
            axes.plot(
                *zip(*line.points, strict=True), color=line.color, label=_short(line.label), marker=marker, **look
            )
        if best is not None:
            axes.plot(*best, "o", color=GOOD, ms=9, markerfacecolor="none", markeredgewidth=2, label="best")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        labels = axes.get_legend_handles_labels()[1]
        if len(labels) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=4 if len("".join(labels)) < 36 else 2)
        return _svg(figure, name, title, description)


def histogram(name: str, title: str, description: str, edges: list[int], counts: list[int], limit: int) -> Markup:
    """Draw rows by length. The last bar may cover longer rows than its width; `limit` is drawn if it is in range."""
    with _style(name):
        figure = Figure((WIDTH / 72, HEIGHT / 72), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        width = edges[1] - edges[0]
        axes.bar(edges[:-1], counts, width=0.9 * width, align="edge", color=FIRST)
        axes.set_xlabel("tokens")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        shown = edges[-2] + width
        if edges[-1] > shown:
            longer = f"{edges[-2]:,} to {edges[-1] - 1:,}"
            axes.annotate(longer, (shown, counts[-1]), (0, 4), textcoords="offset points", ha="right", fontsize=10)
        if edges[0] <= limit <= shown:
            axes.axvline(limit, color=WARN, linestyle="--")
            axes.annotate(
                "limit", (limit, 1), (-4, -2), ("data", "axes fraction"), "offset points", ha="right", va="top"
            )
        return _svg(figure, name, title, description)


@contextmanager
def _style(name: str) -> Iterator[None]:
    """Use matplotlib's defaults and STYLE, ignoring the user's matplotlibrc."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": name})  # the same run gives the same bytes
        yield


def _short(label: str) -> str:
    """Shorten a label so that the legend leaves room for the curves."""
    label = clean(label)
    return label if len(label) <= MOST_LETTERS else f"{label[: MOST_LETTERS - 1]}…"


def _svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """Return the figure as inline SVG: no size, unique ids, a title and a description, colors as CSS variables."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    # Group ids repeat in every chart, and a <style> would apply to the whole page.
    drawn = re.sub(
        r'<metadata>.*?</metadata>|<style.*?</style>| id="[\w.]+_\d+"', "", stream.getvalue(), flags=re.DOTALL
    )
    drawn = re.sub("#00000([1-8])", lambda found: f"var(--{COLORS[int(found[1]) - 1]})", drawn)
    head = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {1} {2}"'
        ' id="{0}" role="img" aria-labelledby="{0}-title {0}-desc">'
        '<title id="{0}-title">{3}</title><desc id="{0}-desc">{4}</desc>'
    ).format(name, WIDTH, HEIGHT, clean(title), clean(description))
    return head + Markup(drawn.split("<svg", 1)[1].split(">", 1)[1])
