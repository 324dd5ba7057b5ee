"""What queries yield: which documents they found, by round, domain and host."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from modelwright.core.ask.desk import failures
from modelwright.core.step import EvalResult
from modelwright.curate.kernels.queries import Pool


@dataclass
class Found:
    """What the queries found: of each document its best score, the query that gave it, and how many queries found it."""

    docs: list[np.ndarray] = field(default_factory=list)  # of each query, best first
    new: list[int] = field(default_factory=list)  # of each query, documents that no query before it found
    best: dict[int, tuple[float, int]] = field(default_factory=dict)
    times: Counter[int] = field(default_factory=Counter)

    def add(self, docs: np.ndarray, scores: np.ndarray) -> None:
        place, before = len(self.docs), len(self.best)
        self.docs.append(docs)
        for doc, score in zip(docs.tolist(), scores.tolist(), strict=True):
            if doc not in self.best or score > self.best[doc][0]:
                self.best[doc] = (score, place)
            self.times[doc] += 1
        self.new.append(len(self.best) - before)


def host_name(url: Any) -> str:
    """The host of an address in small letters; empty where there is none."""
    if not isinstance(url, str) or not url:
        return ""
    try:
        return (urlsplit(url if "//" in url else "//" + url).hostname or "").removeprefix("www.")
    except ValueError:
        return ""


def gini(counts: list[int]) -> float:
    """0 where all counts are equal, towards 1 where one has everything."""
    c = np.sort(np.asarray(counts, np.float64))
    n, total = len(c), c.sum()
    return float((2 * np.arange(1, n + 1) - n - 1) @ c / (n * total)) if total else 0.0


def shared(pool: Pool, found: Found) -> list[float]:
    """Of each query the share of its documents that other queries of its seed found too."""
    times: dict[int, Counter[int]] = defaultdict(Counter)
    for q, docs in zip(pool.queries, found.docs, strict=True):
        times[q.seed].update(docs.tolist())
    return [
        sum(times[q.seed][d] > 1 for d in docs.tolist()) / len(docs) if len(docs) else 0.0
        for q, docs in zip(pool.queries, found.docs, strict=True)
    ]


def domains(pool: Pool, found: Found, seeds: list[tuple[str, str]], kept: list[int]) -> list[dict[str, Any]]:
    """One row per domain: seeds, queries, documents that any of its queries found, and those kept whose best query is one of them."""
    docs: dict[str, set[int]] = {domain: set() for _, domain in seeds}
    queries: Counter[str] = Counter()
    for q, of in zip(pool.queries, found.docs, strict=True):
        docs[seeds[q.seed][1]].update(of.tolist())
        queries[seeds[q.seed][1]] += 1
    best = Counter(seeds[pool.queries[found.best[d][1]].seed][1] for d in kept)
    count = Counter(domain for _, domain in seeds)
    return [{"domain": d, "seeds": count[d], "queries": queries[d], "found": len(docs[d]), "kept": best[d]} for d in docs]


def result(metrics: dict[str, Any], hosts: Counter[str], kept: Counter[str]) -> EvalResult:
    """The result of the step: counts for scripts, tables for people."""

    def shown(title: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"title": title, "columns": list(rows[0]), "rows": [list(r.values()) for r in rows]}

    text = f"{metrics['kept']:,} of {metrics['documents']:,} documents, by {metrics['queries']:,} queries; {metrics['stopped']}."
    return EvalResult(
        metrics,
        text=text,
        tiles=[
            (f"{metrics['kept']:,}", "documents kept", f"of {metrics['found']:,} found"),
            (f"{metrics['queries']:,}", "queries", f"{sum(metrics['queries not used'].values()):,} not used"),
            (f"{metrics['gini of hits per host']:.2f}", "Gini of hits per host", "0: all hosts alike"),
        ],
        tables=[
            shown("Yield by round", metrics["rounds"]),
            shown("Yield by domain", metrics["domains"]),
            shown("What was found and what is kept", metrics["funnel"]),
            {"title": "Hosts", "columns": ["host", "found", "kept"], "rows": [[h or "none", n, kept[h]] for h, n in hosts.most_common(10)]},
            {
                "title": "Queries not used",
                "columns": ["reason", "queries"],
                "rows": [[k, n] for k, n in sorted(metrics["queries not used"].items())],
            },
            *(failures(metrics["requests"]) if metrics["requests"]["requests"] else []),
        ],
    )
