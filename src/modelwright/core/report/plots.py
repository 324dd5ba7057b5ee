"""Plots for a page: matplotlib's SVG, with text as text and colours that follow the page's light or dark theme.

A plot is a plain dictionary, so it lies in the json of a step and is drawn when a page is made:
{"kind": "line", "title", "x", "y", "series": {name: [[x, y], ...]}, "bands": {name: [[x, low, high], ...]}}
{"kind": "scatter", "title", "x", "y", "series": {name: [[x, y], ...]}}
{"kind": "bars", "title", "y", "groups": [...], "series": {name: [...]}, "intervals": {name: [[low, high], ...]}}
{"kind": "histogram", "title", "x", "y", "series": {name: [value, ...]}}
{"kind": "heat", "title", "x", "y", "columns": [...], "rows": [...], "values": [[...]]}, None for an empty cell
{"kind": "image", "title", "values": [[0..1, ...], ...]}, rows of grey values
{"kind": "panels", "title", "plots": [...]}: small multiples of the above
`line: {"at", "name"}` draws a level to compare with, `note` stands under the plot, `log: "x" | "y" | "xy"` sets scales.
"""

import io
import math
import re
import zlib
from html import escape
from typing import Any

SIZE = (5.6, 3.3)  # inches
# Colours that stand for variables of the page: each is used for one thing only and is replaced in the SVG.
_VARIABLES = {
    "#010203": "var(--ink)",
    "#010204": "var(--dim)",
    "#010205": "var(--line)",
    "#010206": "var(--card)",
    **{f"#01020{i + 7:x}": f"var(--c{i})" for i in range(6)},
}
_INK, _DIM, _GRID, _CARD, *_COLOURS = _VARIABLES
_MARKERS = "os^Dvp"
_STYLE: dict[Any, Any] = {  # matplotlib types each key as a literal
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _DIM,
    "ytick.color": _DIM,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.labelcolor": _DIM,
    "svg.hashsalt": "modelwright",  # the same plot gives the same bytes
}


def draw(plot: dict[str, Any]) -> str:
    """The plot as a <figure> with its caption and a note."""
    note = f'<p class="note">{escape(str(plot["note"]))}</p>' if plot.get("note") else ""
    if plot["kind"] == "panels":
        inner = "".join(f"<div><h4>{escape(str(p['title']))}</h4>{_svg(p)}</div>" for p in plot["plots"])
        return f'<figure class="wide"><figcaption>{escape(str(plot["title"]))}</figcaption><div class="panels">{inner}</div>{note}</figure>'
    wide = ' class="wide"' if len(plot.get("columns", ())) > 16 else ""
    return f"<figure{wide}><figcaption>{escape(str(plot['title']))}</figcaption>{_svg(plot)}{note}</figure>"


def _svg(plot: dict[str, Any]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(_size(plot), layout="constrained")
        _DRAW[plot["kind"]](figure.add_subplot(), plot)
        figure.patch.set_alpha(0)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        FigureCanvasSVG(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return _themed(out.getvalue(), str(plot["title"]))


def _size(plot: dict[str, Any]) -> tuple[float, float]:
    if plot["kind"] == "heat":
        rows, columns = len(plot["rows"]), len(plot["columns"])
        return max(SIZE[0], min(11.0, 0.34 * columns + 1.5)), max(1.6, min(8.0, 0.32 * rows + 1.2))
    if plot["kind"] == "image":
        return SIZE[0], max(0.6, min(6.0, SIZE[0] * len(plot["values"]) / max(1, len(plot["values"][0]))))
    if plot["kind"] == "bars":
        return max(SIZE[0], min(11.0, 0.16 * len(plot["groups"]) * len(plot["series"]))), SIZE[1]
    return SIZE


def _themed(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    head, _, rest = svg.partition(">")
    view = re.search(r'viewBox="([^"]*)"', head)
    box = view.group(1) if view else "0 0 400 240"
    width = float(box.split()[2])
    open_tag = f'<svg viewBox="{box}" role="img" aria-label="{escape(title)}" style="max-width:{width * 1.4:.0f}px"'
    prefix = f"p{zlib.crc32(svg.encode())}"  # several plots stand on one page, and ids must differ
    rest = re.sub(r'id="([^"]+)"', rf'id="{prefix}\1"', rest)
    rest = re.sub(r'(xlink:href="#|url\(#)([^")]+)', rf"\1{prefix}\2", rest).replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        rest = rest.replace(colour, variable)
    rest = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", rest)
    return open_tag + ">" + rest


def number(v: float) -> str:
    """A short number: 1.2M, 250k, 0.31."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(v) >= size:
            return f"{v / size:.3g}{unit}"
    return f"{v:.3g}"


def _plain(text: Any) -> str:
    """Text that matplotlib shows as it stands: a dollar begins no formula."""
    return str(text).replace("$", r"\$")


def _finish(axes: Any, plot: dict[str, Any], names: list[str]) -> None:
    axes.set_xlabel(_plain(plot.get("x", "")))
    axes.set_ylabel(_plain(plot.get("y", "")))
    if "x" in str(plot.get("log", "")):
        axes.set_xscale("log")
    if "y" in str(plot.get("log", "")):
        axes.set_yscale("log")
    if "line" in plot:
        axes.axhline(plot["line"]["at"], color=_INK, linestyle=(0, (4, 3)), linewidth=1, label=_plain(plot["line"]["name"]))
    if len(names) > 1 or "line" in plot:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=3, fontsize=8.5, borderaxespad=0, handlelength=1.6)
    if not plot.get("log"):
        _short_numbers(axes)


def _short_numbers(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

    for axis in (axes.xaxis, axes.yaxis):
        if isinstance(axis.get_major_formatter(), ScalarFormatter):
            axis.set_major_locator(MaxNLocator(6, min_n_ticks=3))
            low, high = axis.get_view_interval()
            if max(abs(low), abs(high)) >= 10_000:
                axis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))


def _points(series: list[Any]) -> tuple[list[float], list[float]]:
    good = [(float(a), float(b)) for a, b, *_ in series if a is not None and b is not None and math.isfinite(float(b))]
    return [a for a, _ in good], [b for _, b in good]


def _line(axes: Any, plot: dict[str, Any]) -> None:
    for i, (name, series) in enumerate(plot["series"].items()):
        xs, ys = _points(series)
        colour, again = _COLOURS[i % 6], i >= 6
        few = len(xs) <= 40
        style = {
            "linestyle": (0, (5, 3)) if again else "-",
            "linewidth": 1.7,
            "marker": _MARKERS[i % 6] if few else None,
            "markersize": 3.5,
        }
        axes.plot(xs, ys, color=colour, label=_plain(name), **style)
        if band := plot.get("bands", {}).get(name):
            axes.fill_between([b[0] for b in band], [b[1] for b in band], [b[2] for b in band], color=colour, alpha=0.18, linewidth=0)
    _finish(axes, plot, list(plot["series"]))


def _scatter(axes: Any, plot: dict[str, Any]) -> None:
    for i, (name, series) in enumerate(plot["series"].items()):
        axes.scatter(*_points(series), s=12, color=_COLOURS[i % 6], marker=_MARKERS[i % 6], alpha=0.75, label=_plain(name), linewidths=0)
    _finish(axes, plot, list(plot["series"]))


def _bars(axes: Any, plot: dict[str, Any]) -> None:
    groups, n = [_plain(g) for g in plot["groups"]], len(plot["series"])
    width = 0.8 / max(n, 1)
    for j, (name, values) in enumerate(plot["series"].items()):
        at = [i - 0.4 + width * (j + 0.5) for i in range(len(groups))]
        heights = [math.nan if v is None else float(v) for v in values]
        axes.bar(at, heights, width * 0.92, color=_COLOURS[j % 6], alpha=1.0 if j < 6 else 0.55, label=_plain(name))
        if spans := plot.get("intervals", {}).get(name):
            below = [max(0.0, h - s[0]) if s else 0.0 for h, s in zip(heights, spans, strict=True)]
            above = [max(0.0, s[1] - h) if s else 0.0 for h, s in zip(heights, spans, strict=True)]
            axes.errorbar(at, heights, yerr=[below, above], fmt="none", ecolor=_INK, elinewidth=1, capsize=2.5)
    every = max(1, math.ceil(len(groups) / 40))
    longest = max(map(len, groups), default=0)
    tilt = longest * len(groups) > 60
    axes.set_xticks(range(0, len(groups), every), groups[::every], rotation=35 if tilt else 0, ha="right" if tilt else "center")
    axes.grid(axis="x", visible=False)
    _finish(axes, plot, list(plot["series"]))


def _histogram(axes: Any, plot: dict[str, Any]) -> None:
    for i, (name, values) in enumerate(plot["series"].items()):
        good = [float(v) for v in values if v is not None and math.isfinite(float(v))]
        axes.hist(good, bins=plot.get("bins", 30), color=_COLOURS[i % 6], alpha=0.6, label=_plain(name))
    _finish(axes, plot, list(plot["series"]))


def _heat(axes: Any, plot: dict[str, Any]) -> None:
    rows, columns = [_plain(r) for r in plot["rows"]], [_plain(c) for c in plot["columns"]]
    values = [[math.nan if v is None else float(v) for v in row] for row in plot["values"]]
    known = [v for row in values for v in row if math.isfinite(v)]
    low, high = min(0.0, *known) if known else 0.0, max(known, default=1.0)
    for i, row in enumerate(values):
        for j, v in enumerate(row):
            if math.isfinite(v):
                share = (v - low) / ((high - low) or 1)
                axes.add_patch(_cell(j, i, 0.06 + 0.94 * share))
                if len(columns) <= 16 and len(rows) <= 24:
                    label = f"{v:.2g}" if v == 0 or abs(v) >= 0.005 else "~0"
                    axes.text(j, i, label, ha="center", va="center", fontsize=8, color=_CARD if share > 0.55 else _INK)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    across, down = max(1, math.ceil(len(columns) / 32)), max(1, math.ceil(len(rows) / 24))
    tilt = max(map(len, columns), default=0) * len(columns) > 70
    axes.set_xticks(range(0, len(columns), across), columns[::across], rotation=35 if tilt else 0, ha="right" if tilt else "center")
    axes.set_yticks(range(0, len(rows), down), rows[::down])
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel(_plain(plot.get("x", "")))
    axes.set_ylabel(_plain(plot.get("y", "")))


def _cell(x: int, y: int, share: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, facecolor=_COLOURS[0], alpha=min(1.0, share), linewidth=0)


def _image(axes: Any, plot: dict[str, Any]) -> None:
    axes.imshow(plot["values"], cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect=plot.get("aspect", "equal"))
    axes.set_axis_off()


_DRAW = {"line": _line, "scatter": _scatter, "bars": _bars, "histogram": _histogram, "heat": _heat, "image": _image}
