"""A report: the same numbers on the terminal, as json and as one self-contained page (phone, dark mode, no network)."""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from modelwright.core.report.plots import draw, number

_STYLE = Path(__file__).parents[2] / "data" / "report.css"


@dataclass
class Section:
    """A heading with a sentence, headline numbers, tables and plots (see core/report/plots.py)."""

    title: str
    text: str = ""
    tiles: list[tuple[str, str, str]] = field(default_factory=list)  # value, what it is, remark
    tables: list[dict[str, Any]] = field(default_factory=list)  # title, columns, rows
    plots: list[dict[str, Any]] = field(default_factory=list)
    verdict: bool | None = None


@dataclass
class Report:
    """Sections in order and facts for the foot of the page."""

    title: str
    sections: list[Section] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    lead: str = ""
    recipe: str = ""  # as YAML

    def step(self, entry: dict[str, Any]) -> None:
        """A section from what a step left: certificate, evaluations, facts, tables, plots."""
        tiles, tables, plots = (list(entry.get(k, [])) for k in ("tiles", "tables", "plots"))
        s = Section(entry["step"], entry.get("text", ""), tiles, tables, plots)
        facts = {k: v for k, v in _leaves(entry.get("facts", {})) if v is not None}
        if entry.get("certificate"):
            from modelwright.core.model.certificate import Certificate  # needs torch

            c = Certificate(**entry["certificate"])
            s.verdict, s.text = c.passed, _sentence(c)
            s.tables.append(
                {
                    "title": f"Before and after; loads in {c.loads_in}",
                    "columns": ["", "before", "after"],
                    "rows": [list(r) for r in c.rows()],
                }
            )
            if c.samples:
                columns = ["prompt", "before", "after"]
                s.tables.append({"title": "How both go on (greedy)", "columns": columns, "rows": c.samples, "prose": True})
        if log := entry.get("log"):
            s.plots.append(_curves(log))
        if evals := entry.get("evals"):
            _evaluations(s, evals, entry.get("unit", "nats per token"))
        if notes := entry.get("notes"):
            s.tables.append({"title": "Notes", "columns": ["", ""], "rows": [["", n] for n in notes], "plain": True})
        for i, line in enumerate(entry.get("liveness", [])):
            facts["first step" + f", {i + 1}" * (len(entry["liveness"]) > 1)] = line
        if "seconds" in entry:
            facts["seconds"] = entry["seconds"]
        if facts:
            s.tables.append({"title": "Facts", "columns": ["", ""], "rows": [[k, _show(v)] for k, v in facts.items()]})
        self.sections.append(s)

    def print(self, console: Any = None) -> None:
        """The tables on the terminal."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = console or Console()

        def line(*parts: tuple[str, str]) -> None:
            console.print(Text.assemble(*((_printable(words), style) for words, style in parts)), soft_wrap=True)

        for s in self.sections:
            verdict = {True: ("proven  ", "green"), False: ("failed  ", "red"), None: ("", "")}[s.verdict]
            line(("\n", ""), (s.title, "bold"), ("  ", ""), verdict, (s.text, ""))
            for value, what, remark in s.tiles:
                line(("  ", ""), (value, "bold"), (f" {what} {remark}", ""))
            for t in s.tables:
                title = Text(_printable(t["title"]), "dim")
                table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=any(t["columns"]))
                for i, c in enumerate(t["columns"]):
                    left = i == 0 or t["title"] == "Facts" or t.get("prose") or t.get("plain")
                    table.add_column(Text(_printable(c)), justify="left" if left else "right")
                for row in t["rows"]:
                    table.add_row(*(Text(_printable(v)) for v in row))
                console.print(table)

    def html(self) -> str:
        """The page."""
        body = "".join(_section(s) for s in self.sections)
        foot = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_show(v))}</dd>" for k, v in self.facts.items())
        recipe = f"<pre>{escape(self.recipe)}</pre>" if self.recipe else ""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><title>{escape(self.title)}</title><style>{_STYLE.read_text()}</style></head>'
            f'<body><main><header><p class="brand">modelwright</p><h1>{escape(self.title)}</h1><p>{escape(self.lead)}</p></header>{body}'
            f"<footer><details><summary>How this was made</summary><dl>{foot}</dl>{recipe}</details></footer></main></body></html>"
        )


def _curves(log: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss, learning rate, gradient norm and speed of a training run as small multiples."""

    def one(title: str, key: str) -> dict[str, Any]:
        return {"kind": "line", "title": title, "x": "step", "y": "", "series": {title: [[r["step"], r.get(key)] for r in log]}}

    shown = (("loss (nats)", "loss"), ("learning rate", "lr"), ("gradient norm", "grad_norm"))
    return {"kind": "panels", "title": "Training", "plots": [one(title, key) for title, key in shown]}


def _evaluations(s: "Section", evals: list[dict[str, Any]], unit: str) -> None:
    """The loss in its unit, or bits per byte where they are known; further measures of the objective in rows of their own."""
    names = list(dict.fromkeys(e["name"] for e in evals))
    key, unit = ("bits_per_byte", "bits per byte") if all("bits_per_byte" in e for e in evals) else ("loss", unit)
    series = {n: [[e["step"], e[key]] for e in evals if e["name"] == n] for n in names}
    s.plots.append({"kind": "line", "title": "Held-out text while training", "x": "step", "y": unit, "series": series})
    rows = []
    for n in names:
        first, *_, last = [e for e in evals if e["name"] == n] * 2
        more = [k for k in first if k not in ("step", "name", "loss", "tokens", "bits_per_byte")]
        rows += [[n if k == key else f"{n}: {k}", f"{first[k]:.4f}", f"{last[k]:.4f}"] for k in (key, *more)]
    s.tables.append({"title": f"Held-out text, {unit}", "columns": ["text", "start", "end"], "rows": rows})


def _sentence(c: Any) -> str:
    if c.note:
        return c.note[0].upper() + c.note[1:] + "."
    if c.promise == "same function":
        return (
            f"The function is {'unchanged' if c.passed else 'NOT unchanged'}: logits differ by at most {c.max_abs_dlogit:.1e} on {c.probe}."
        )
    return f"The function changed, as it should: largest logit difference {c.max_abs_dlogit:.3g} on {c.probe}."


def _printable(value: Any) -> str:
    """Text for a terminal as it stands; what would move its cursor is written as an escape."""
    text = str(value)
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _leaves(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for k, v in value.items():
        name = f"{prefix}{k}".replace("_", " ")
        out += _leaves(v, f"{name}: ") if isinstance(v, dict) else [(name, v)]
    return out


def _show(v: Any) -> str:
    if isinstance(v, bool) or v is None:
        return {True: "yes", False: "no", None: "none"}[v]
    if isinstance(v, int):
        return f"{v:,}"
    if isinstance(v, float):
        return f"{v:.4g}" if abs(v) < 1e5 else number(v)
    return str(v)


def _section(s: Section) -> str:
    badge = {True: '<span class="badge good">proven</span>', False: '<span class="badge bad">failed</span>', None: ""}[s.verdict]
    tiles = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(w)}</span><small>{escape(r)}</small></div>' for v, w, r in s.tiles)
    tables = "".join(_table(t) for t in s.tables)
    return (
        f"<section><h2>{escape(s.title)} {badge}</h2>"
        + (f"<p>{escape(s.text)}</p>" if s.text else "")
        + (f'<div class="tiles">{tiles}</div>' if tiles else "")
        + (f'<div class="plots">{"".join(map(draw, s.plots))}</div>' if s.plots else "")
        + f"{tables}</section>"
    )


def _table(t: dict[str, Any]) -> str:
    head = "".join(f"<th>{escape(str(c))}</th>" for c in t["columns"])
    rows = "".join("<tr>" + "".join(f"<td>{escape(str(v))}</td>" for v in row) + "</tr>" for row in t["rows"])
    inner = f"<table>{f'<thead><tr>{head}</tr></thead>' if any(t['columns']) else ''}<tbody>{rows}</tbody></table>"
    if t["title"] == "Facts":
        return f'<details><summary>{escape(t["title"])}</summary><div class="scroll plain">{inner}</div></details>'
    kind = " prose" if t.get("prose") else " plain" if t.get("plain") else ""
    return f'<h3>{escape(t["title"])}</h3><div class="scroll{kind}">{inner}</div>'
