"""One page with pictures for each benchmark result, in bench/pages. The tables are in docs/, made by `make docs`."""

import json
from pathlib import Path

from modelwright.core.report.page import Report, Section

BENCH = Path(__file__).parent


def page(r: dict) -> str:
    """A benchmark's result as a page of its own."""
    table = {"title": "Results", "columns": r["columns"], "rows": r["rows"]}
    lists = [{"title": "Notes", "columns": [""], "rows": [[n] for n in r["notes"]], "prose": True}] if r["notes"] else []
    section = Section(r["claim"], r["outcome"], tables=[table, *lists], plots=r.get("plots", []))
    facts = {"seeds": ", ".join(map(str, r["seeds"])), "command": r["command"], "date": r["date"], **r["versions"]}
    return Report(r["name"].replace("_", " "), [section], facts).html()


def main() -> None:
    (BENCH / "pages").mkdir(exist_ok=True)
    for file in sorted((BENCH / "results").glob("*.json")):
        (BENCH / "pages" / f"{file.stem}.html").write_text(page(json.loads(file.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
