"""Make PROOFS.md from the test files' names and the benchmarks' results, and one page per benchmark in bench/pages."""

import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    from matrix import ROWS
    from modelwright import registry

    out = [
        "# Proofs",
        "",
        "Made by `make proofs`. Invariants hold exactly and are tests; claims are measured in `bench/`, each with its baseline and "
        "control, and reported as they came out.",
        "",
    ]
    out += ["## Claims and speed", ""]
    (pages := ROOT / "bench" / "pages").mkdir(exist_ok=True)
    for file in sorted((ROOT / "bench" / "results").glob("*.json")):
        result = json.loads(file.read_text())
        (pages / f"{file.stem}.html").write_text(page(result), encoding="utf-8")
        out += _claim(result)
    out += ["## Invariants", ""]
    for e in registry.entries():
        out += [f"### `{e.name}`", ""]
        out += [line for proof in ROWS[e.name].proofs for line in _invariants(proof)] + [""]
    out += ["### The kernel", ""]
    proven = {p for row in ROWS.values() for p in row.proofs}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        name = str(file.relative_to(ROOT))
        if name not in proven:
            out += _invariants(name)
    (ROOT / "PROOFS.md").write_text("\n".join(out).rstrip() + "\n")


def page(r: dict) -> str:
    """A benchmark's result as a page of its own."""
    from modelwright.core.report.page import Report, Section

    table = {"title": "Results", "columns": r["columns"], "rows": r["rows"]}
    lists = [{"title": "Notes", "columns": [""], "rows": [[n] for n in r["notes"]], "prose": True}] if r["notes"] else []
    section = Section(r["claim"], r["outcome"], tables=[table, *lists], plots=r.get("plots", []))
    facts = {"seeds": ", ".join(map(str, r["seeds"])), "command": r["command"], "date": r["date"], **r["versions"]}
    return Report(r["name"].replace("_", " "), [section], facts).html()


def _claim(r: dict) -> list[str]:
    out = [f"### {r['name']}", "", f"**Claim.** {r['claim']}", "", f"**Outcome.** {r['outcome']}", ""]
    out += ["| " + " | ".join(map(str, r["columns"])) + " |", "|" + "---|" * len(r["columns"])]
    out += ["| " + " | ".join(_cell(v) for v in row) + " |" for row in r["rows"]] + [""]
    out += [f"- {n}" for n in r["notes"]]
    v = r["versions"]
    seeds = f"seeds {', '.join(map(str, r['seeds']))}; " if r["seeds"] else ""
    where = f"{v['machine']}, Python {v['python']}, torch {v['torch']}, transformers {v['transformers']}"
    return [*out, f"- `{r['command']}`, {r['date']}; {seeds}{where}", ""]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _invariants(name: str) -> list[str]:
    file = ROOT / name
    if not file.exists():
        return []
    tests = [
        n.name.removeprefix("test_").replace("_", " ")
        for n in ast.walk(ast.parse(file.read_text()))
        if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")
    ]
    return [f"- {t} ({name})" for t in tests]


if __name__ == "__main__":
    main()
