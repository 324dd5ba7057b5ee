"""A report: the same numbers on the terminal, as json and as one self-contained page (phone, dark mode, no network)."""

from dataclasses import dataclass, field
from html import escape
from typing import Any

from modelwright.core.certificate import Certificate
from modelwright.core.plots import draw, number


@dataclass
class Section:
    """A heading with a sentence, headline numbers, tables and plots (see core/plots.py)."""

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

    def step(self, entry: dict[str, Any]) -> None:
        """A section from what a step left: certificate, evaluations, facts, tables, plots."""
        s = Section(entry["step"], tables=list(entry.get("tables", [])), plots=list(entry.get("plots", [])))
        facts = {k: v for k, v in _leaves(entry.get("facts", {})) if v is not None}
        if entry.get("certificate"):
            c = Certificate(**entry["certificate"])
            s.verdict, s.text = c.passed, _sentence(c)
            s.tables.append({"title": f"Before and after; loads in {c.loads_in}", "columns": ["", "before", "after"], "rows": [list(r) for r in c.rows()]})
        if evals := entry.get("evals"):
            names = list(dict.fromkeys(e["name"] for e in evals))
            key, unit = ("bits_per_byte", "bits per byte") if all("bits_per_byte" in e for e in evals) else ("loss", "nats per token")
            s.plots.append({"kind": "line", "title": "Held-out text while training", "x": "step", "y": unit,
                            "series": {n: [[e["step"], e[key]] for e in evals if e["name"] == n] for n in names}})
            ends = {n: [e[key] for e in evals if e["name"] == n] for n in names}
            s.tables.append({"title": f"Held-out text, {unit}", "columns": ["text", "start", "end"],
                             "rows": [[n, f"{v[0]:.4f}", f"{v[-1]:.4f}"] for n, v in ends.items()]})
        for line in entry.get("liveness", []):
            facts["first step"] = line
        if "seconds" in entry:
            facts["seconds"] = entry["seconds"]
        if facts:
            s.tables.append({"title": "Facts", "columns": ["", ""], "rows": [[k, _show(v)] for k, v in facts.items()]})
        self.sections.append(s)

    def print(self, console: Any = None) -> None:
        """The tables on the terminal."""
        from rich.console import Console
        from rich.table import Table

        console = console or Console()
        for s in self.sections:
            mark = {True: "[green]proven[/]  ", False: "[red]failed[/]  ", None: ""}[s.verdict]
            console.print(f"\n[bold]{s.title}[/]  {mark}{s.text}")
            for value, what, remark in s.tiles:
                console.print(f"  [bold]{value}[/] {what} {remark}")
            for t in s.tables:
                table = Table(title=t["title"], title_justify="left", title_style="dim", box=None, pad_edge=False, show_header=any(t["columns"]))
                for i, c in enumerate(t["columns"]):
                    table.add_column(c, justify="left" if i == 0 or t["title"] == "Facts" or t.get("prose") else "right")
                for row in t["rows"]:
                    table.add_row(*map(str, row))
                console.print(table)

    def html(self) -> str:
        """The page."""
        body = "".join(_section(s) for s in self.sections)
        foot = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_show(v))}</dd>" for k, v in self.facts.items())
        return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
                f'<meta name="color-scheme" content="light dark"><title>{escape(self.title)}</title><style>{_CSS}</style></head><body><main>'
                f'<header><p class="brand">modelwright</p><h1>{escape(self.title)}</h1><p>{escape(self.lead)}</p></header>{body}'
                f"<footer><details><summary>How this was made</summary><dl>{foot}</dl></details></footer></main></body></html>")


def _sentence(c: Certificate) -> str:
    if c.note:
        return c.note[0].upper() + c.note[1:] + "."
    if c.promise == "same function":
        return f"The function is {'unchanged' if c.passed else 'NOT unchanged'}: logits differ by at most {c.max_abs_dlogit:.1e} on {c.probe}."
    return f"The function changed, as it should: largest logit difference {c.max_abs_dlogit:.3g} on {c.probe}."


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
    return (f"<section><h2>{escape(s.title)} {badge}</h2>" + (f"<p>{escape(s.text)}</p>" if s.text else "") +
            (f'<div class="tiles">{tiles}</div>' if tiles else "") + (f'<div class="plots">{"".join(map(draw, s.plots))}</div>' if s.plots else "") +
            f"{tables}</section>")


def _table(t: dict[str, Any]) -> str:
    head = "".join(f"<th>{escape(str(c))}</th>" for c in t["columns"])
    rows = "".join("<tr>" + "".join(f"<td>{escape(str(v))}</td>" for v in row) + "</tr>" for row in t["rows"])
    inner = f"<table>{f'<thead><tr>{head}</tr></thead>' if any(t['columns']) else ''}<tbody>{rows}</tbody></table>"
    if t["title"] == "Facts":
        return f"<details><summary>{escape(t['title'])}</summary><div class=\"scroll plain\">{inner}</div></details>"
    return f'<h3>{escape(t["title"])}</h3><div class="scroll{" prose" if t.get("prose") else ""}">{inner}</div>'


_CSS = """
:root{--bg:#fbfaf8;--card:#fff;--ink:#1d2126;--dim:#666d75;--line:#e4e1dc;--c0:#1f6fb2;--c1:#d9730d;--c2:#2e8b57;--c3:#a3408f;--c4:#8a6d1f;--c5:#5b6770;--good:#1b7f4b;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1c2024;--ink:#e8e6e3;--dim:#9aa2aa;--line:#30363c;--c0:#63b0f2;--c1:#f0a04b;--c2:#6fce9a;--c3:#dd8fd0;--c4:#d9bd6a;--c5:#a8b3bc;--good:#5fd394;--bad:#ff8a80}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:960px;margin:0 auto;padding:24px 16px 48px}header h1{margin:.1em 0 .2em;font-size:1.7rem;line-height:1.2}header p{color:var(--dim);margin:.2em 0}
.brand{letter-spacing:.08em;text-transform:uppercase;font-size:.75rem}section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 18px;margin:18px 0}
h2{font-size:1.15rem;margin:0 0 .4em}h3{font-size:.85rem;font-weight:600;color:var(--dim);margin:1.2em 0 .3em}section p{margin:.3em 0 .8em}
.badge{font-size:.72rem;font-weight:600;padding:2px 9px;border-radius:99px;border:1px solid;vertical-align:middle}.good{color:var(--good)}.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:12px 0}.tile{border:1px solid var(--line);border-radius:10px;padding:10px 12px;display:flex;flex-direction:column}
.tile b{font-size:1.35rem;font-variant-numeric:tabular-nums;line-height:1.2}.tile span{font-size:.85rem}.tile small{color:var(--dim)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:16px}figure{margin:8px 0;min-width:0}figcaption{font-weight:600;font-size:.92rem;margin-bottom:4px}
.note{color:var(--dim);font-size:.82rem;margin:.2em 0}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:5px 10px;border-bottom:1px solid var(--line)}th{color:var(--dim);font-weight:600;white-space:nowrap}th:first-child,td:first-child{text-align:left;padding-left:0}tbody tr:last-child td{border-bottom:0}.plain td,.prose td{text-align:left;overflow-wrap:anywhere}
.prose td:last-child{font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap}.prose td:first-child{white-space:nowrap;vertical-align:top}
details summary{cursor:pointer;color:var(--dim);font-size:.88rem;margin-top:.8em}footer dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;font-size:.85rem;color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
svg{width:100%;height:auto;display:block}svg text{font-family:inherit;fill:var(--dim);font-size:13px}svg .axis{fill:var(--ink)}svg .grid{stroke:var(--line)}svg .mark{stroke:var(--dim);stroke-dasharray:4 4}svg polyline{fill:none;stroke-width:2.2}
.h{fill:color-mix(in srgb,var(--c0) calc(var(--v)*100%),var(--bg))}svg .cell{font-size:12px}svg .cell.on{fill:var(--card)}svg .cell.off{fill:var(--ink)}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:.83rem;color:var(--dim);padding-left:4px}.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:5px;vertical-align:-1px}
""" + "".join(f".s{i}{{stroke:var(--c{i})}}.d{i},.b{i}{{fill:var(--c{i})}}.legend .c{i}{{background:var(--c{i})}}" for i in range(6))
