"""What every benchmark shares: one thread, seeds, and one json file per claim in bench/results (PROOFS.md is made from them)."""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from modelwright.core.model.lineage import versions

RESULTS = Path(__file__).parent / "results"
SHARED = Path(os.environ.get("MODELWRIGHT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def save(
    name: str,
    *,
    claim: str,
    outcome: str,
    columns: list[str],
    rows: list[list[Any]],
    seeds: list[int] | None = None,
    notes: list[str] | None = None,
    command: str | None = None,
    plots: list[dict[str, Any]] | None = None,
) -> None:
    """Write bench/results/NAME.json. `claim` is what was to be shown, `outcome` what was seen, negative results included.

    `plots`: see core/report/plots.py; `make proofs` draws them.
    """
    RESULTS.mkdir(exist_ok=True)
    result = {
        "name": name,
        "claim": claim,
        "outcome": outcome,
        "columns": columns,
        "rows": rows,
        "seeds": seeds or [],
        "notes": notes or [],
        "plots": plots or [],
        "command": command or f"python bench/{Path(sys.argv[0]).name}",
        "date": date.today().isoformat(),
        "versions": versions(),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "plots"}, indent=1))


class Cache:
    """Results by key in a file, one line each, so that a long benchmark may be stopped and taken up again."""

    def __init__(self, name: str):
        self.file = Path(os.environ.get("MODELWRIGHT_BENCH_CACHE", tempfile.gettempdir())) / f"modelwright-{name}.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.known: dict[str, Any] = dict(json.loads(line) for line in lines)

    def __call__(self, key: list[Any], make: Callable[[], Any]) -> Any:
        text = json.dumps(key)
        if text not in self.known:
            self.known[text] = make()
            with self.file.open("a") as file:
                file.write(json.dumps([text, self.known[text]]) + "\n")
            print(text, str(self.known[text])[:200], flush=True)
        return self.known[text]


def spread(values: list[float]) -> str:
    """median (min to max)"""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def child_usage() -> tuple[float, int]:
    """CPU seconds and peak resident bytes of the finished children of this process."""
    u = resource.getrusage(resource.RUSAGE_CHILDREN)
    return u.ru_utime + u.ru_stime, u.ru_maxrss * 1024


class Clock:
    """`with Clock() as c: ...; c.wall, c.cpu` in seconds."""

    def __enter__(self) -> "Clock":
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
