"""Plots as inline SVG: lines, bars, heat maps. No library, no network; colours follow the page's light or dark theme.

A plot is a plain dictionary, so it lies in the json of a step and is drawn when a page is made:
{"kind": "line", "title", "x", "y", "series": {name: [[x, y], ...]}}
{"kind": "bars", "title", "y", "groups": [...], "series": {name: [...]}}
{"kind": "heat", "title", "x", "y", "columns": [...], "rows": [...], "values": [[...]]}, None for an empty cell
"""

import math
from html import escape
from typing import Any

W, H, LEFT, RIGHT, TOP, BOTTOM = 520, 300, 62, 14, 14, 50


def draw(plot: dict[str, Any]) -> str:
    """The plot as a <figure> with its legend and a caption."""
    body, names = {"line": _line, "bars": _bars, "heat": _heat}[plot["kind"]](plot)
    legend = "".join(f'<span><i class="{_class("c", i)}"></i>{escape(n)}</span>' for i, n in enumerate(names)) if len(names) > 1 else ""
    return (
        f"<figure><figcaption>{escape(plot['title'])}</figcaption>{body}"
        + (f'<div class="legend">{legend}</div>' if legend else "")
        + (f'<p class="note">{escape(plot["note"])}</p>' if plot.get("note") else "")
        + "</figure>"
    )


def _class(kind: str, i: int) -> str:
    return f"{kind}{i % 6}" + " again" * (i > 5)  # six colours; the next six series are dashed and paler


def ticks(low: float, high: float, want: int = 5) -> list[float]:
    """Round tick positions that cover [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1)
    raw = (high - low) / want
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    found = [round((first + i) * step, 12) for i in range(want + 3)]
    return [t for i, t in enumerate(found) if i == 0 or found[i - 1] < high - step * 1e-6]


def number(v: float) -> str:
    """A short number: 1.2M, 250k, 0.31."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(v) >= size:
            return f"{v / size:.3g}{unit}"
    return f"{v:.3g}"


def _labels(values: list[float]) -> list[str]:
    """Short numbers that differ from each other."""
    short = [number(v) for v in values]
    for digits in range(4, 9):
        if len(set(short)) == len(short):
            break
        short = [f"{v:.{digits}g}" for v in values]
    return short


def _text(kind: str, x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _below(x: float, y: float, words: str, tilt: bool) -> str:
    """A label under the axis; a long one is tilted."""
    if not tilt:
        return _text("tick", x, y, words)
    return f'<text class="tick" transform="translate({x:.1f} {y - 6:.1f}) rotate(-35)" text-anchor="end">{escape(words)}</text>'


def _axes(x: str, y: str, bottom: float, height: float) -> str:
    up = f'<text class="axis" transform="translate(15 {(TOP + bottom) / 2:.1f}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
    return _text("axis", (LEFT + W - RIGHT) / 2, height - 8, x) + up


def _frame(xs: list[tuple[float, str]], ys: list[tuple[float, str]], x: str, y: str) -> str:
    grid = "".join(f'<line class="grid" x1="{LEFT}" x2="{W - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>' for py, _ in ys)
    left = "".join(_text("tick", LEFT - 8, py + 4, label, "end") for py, label in ys)
    below = "".join(_text("tick", px, H - BOTTOM + 18, label) for px, label in xs)
    return grid + left + below + _axes(x, y, H - BOTTOM, H)


def _svg(body: str, title: str, height: int = H) -> str:
    return f'<svg viewBox="0 0 {W} {height}" role="img" aria-label="{escape(title)}">{body}</svg>'


def _scale(low: float, high: float, start: float, end: float) -> Any:
    return lambda v: start + (v - low) / ((high - low) or 1) * (end - start)


def _line(p: dict[str, Any]) -> tuple[str, list[str]]:
    points = [(float(a), float(b)) for s in p["series"].values() for a, b in s if math.isfinite(b)]
    if not points:
        return _svg("", p["title"]), list(p["series"])
    ty = ticks(min(b for _, b in points), max(b for _, b in points))
    tx = ticks(min(a for a, _ in points), max(a for a, _ in points))
    high_x = max(a for a, _ in points)
    sx, sy = _scale(tx[0], high_x, LEFT, W - RIGHT), _scale(ty[0], ty[-1], H - BOTTOM, TOP)
    body = _frame(
        [(sx(t), n) for t, n in zip(tx, _labels(tx), strict=True) if t <= high_x],
        [(sy(t), n) for t, n in zip(ty, _labels(ty), strict=True)],
        p["x"],
        p["y"],
    )
    for i, (name, series) in enumerate(p["series"].items()):
        good = [(sx(a), sy(b), a, b) for a, b in series if math.isfinite(b)]
        body += f'<polyline class="{_class("s", i)}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b, *_ in good)}"/>'
        body += "".join(
            f'<circle class="{_class("d", i)}" cx="{a:.1f}" cy="{b:.1f}" r="3"><title>{escape(name)}: {number(u)}, {v:.4g}</title></circle>'
            for a, b, u, v in good
        )
    return _svg(body, p["title"]), list(p["series"])


def _bars(p: dict[str, Any]) -> tuple[str, list[str]]:
    values = [float(v) for s in p["series"].values() for v in s if v is not None]
    ty = ticks(min(0.0, *values), max(values))
    sy = _scale(ty[0], ty[-1], H - BOTTOM, TOP)
    slot = (W - LEFT - RIGHT) / len(p["groups"])
    width = slot * 0.76 / len(p["series"])
    longest = max(map(len, map(str, p["groups"])))
    tilt = 7 * longest > slot and not all(str(g).isdigit() for g in p["groups"])
    every = 1 if tilt else max(1, math.ceil(len(p["groups"]) * 7 * longest / (W - LEFT - RIGHT)))
    body = _frame([], [(sy(t), n) for t, n in zip(ty, _labels(ty), strict=True)], "" if tilt else p.get("x", ""), p["y"])
    for i, g in enumerate(p["groups"]):
        body += _below(LEFT + slot * (i + 0.5), H - BOTTOM + 18, str(g), tilt) if i % every == 0 else ""
    for j, (name, series) in enumerate(p["series"].items()):
        for i, v in enumerate(series):
            if v is None:
                continue
            x, top = LEFT + slot * i + slot * 0.12 + width * j, min(sy(v), sy(0))
            high = abs(sy(v) - sy(0))
            body += (
                f'<rect class="{_class("b", j)}" x="{x:.1f}" y="{top:.1f}" width="{max(width - 2, 1):.1f}" height="{high:.1f}" rx="2">'
                f"<title>{escape(str(p['groups'][i]))}, {escape(name)}: {v:.4g}</title></rect>"
            )
    if "line" in p:  # a level to compare with
        y = sy(p["line"]["at"])
        body += f'<line class="mark" x1="{LEFT}" x2="{W - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        body += _text("tick", W - RIGHT, y - 5, p["line"]["name"], "end")
    return _svg(body, p["title"], H + int(4 * longest) - 20 if tilt else H), list(p["series"])


def _heat(p: dict[str, Any]) -> tuple[str, list[str]]:
    rows, columns = p["rows"], p["columns"]
    cell_h = min(34, max(16, 240 / len(rows)))
    height = int(TOP + cell_h * len(rows) + BOTTOM)
    left = max(LEFT, min(W // 3, 26 + 6.4 * max(len(str(r)) for r in rows)))
    cell_w = (W - left - RIGHT) / len(columns)
    tilt = 6.4 * max(len(str(c)) for c in columns) > cell_w
    height += int(4 * max(len(str(c)) for c in columns)) if tilt else 0
    top = max((v for row in p["values"] for v in row if v is not None), default=1) or 1
    body = ""
    for i, (name, row) in enumerate(zip(rows, p["values"], strict=True)):
        y = TOP + cell_h * i
        body += _text("tick", left - 8, y + cell_h / 2 + 4, str(name), "end")
        for j, v in enumerate(row):
            if v is None:  # nothing was measured
                continue
            x = left + cell_w * j
            size = f'width="{cell_w - 2:.1f}" height="{cell_h - 2:.1f}"'
            body += (
                f'<rect class="h" x="{x:.1f}" y="{y:.1f}" {size} rx="2" style="--v:{v / top:.3f}">'
                f"<title>{escape(str(name))}, {escape(str(columns[j]))}: {v:.3g}</title></rect>"
            )
            if cell_w > 34:
                label = f"{v:.2g}" if v == 0 or v >= 0.005 else "~0"
                ink = "on" if v / top > 0.55 else "off"
                body += _text(f"cell {ink}", x + cell_w / 2 - 1, y + cell_h / 2 + 3, label)
    bottom = TOP + cell_h * len(rows)
    body += "".join(_below(left + cell_w * (j + 0.5), bottom + 16, str(c), tilt) for j, c in enumerate(columns))
    body += _axes(p["x"], p["y"], bottom, height)
    return _svg(body, p["title"], height), []
