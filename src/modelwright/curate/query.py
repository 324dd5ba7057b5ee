"""Query of CC: a few seeds become many queries, and the queries find a domain's documents in a large corpus.

When to use it: you need text about a subject, have a large corpus without labels and a model to ask, and no list of good sites.

Paper: Query of CC (arXiv 2401.14624, later Retrieve-from-CC). No code was published. The steps and the BM25 search are the paper's;
the wording of the requests, the limits and all that is named "ours" are not.

1. Seeds (words, questions, passages) are the first queries.
2. Questions, for breadth: a model writes `questions` around each seed, `samples` times at a temperature above 0.
3. Thoughts, for depth: the model answers each question step by step, and the answer is a query too. Empty, short, long and repeated
   queries and refusals are counted and not used (kernels/queries.py).
4. BM25 (kernels/bm25.py) over the corpus: the best k documents of each query. The union keeps for each document its best score, the
   query that gave it, and how many queries found it, in the column `found`.
5. The questions are the seeds of the next round.

Ours: the search ends when a round's yield (new documents / documents that it found) falls below `least_yield`. Of a long query the 64
rarest terms count, where a search engine would cut it in silence. Documents with a run of 13 words of a named evaluation set are taken
out, for a benchmark's questions as seeds find the benchmark's own pages. Copies go (curate.dedup), then the worst documents of a host
above `per_host`. `shared` of a query is the share of its documents that other queries of its seed found too; it is low for queries
that went astray. Filters of quality are steps of their own that follow: curate.rules, curate.quality.

queries.jsonl has every query with its origin and yield; removed.jsonl has every document that was found and taken out, with its reason.
"""

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelwright.core.ask.desk import Desk
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Generator, build, knob
from modelwright.core.step import EvalResult, StepContext
from modelwright.curate import dedup
from modelwright.curate.generators.writers import open_writer
from modelwright.curate.kernels.bm25 import Index
from modelwright.curate.kernels.contamination import Evaluations, read_evaluations
from modelwright.curate.kernels.documents import PLACE, Sink, Source
from modelwright.curate.kernels.funnel import Stage, table
from modelwright.curate.kernels.queries import Pool, Query, ask_questions, ask_thoughts, read_seeds
from modelwright.curate.kernels.yields import Found, domains, gini, host_name, result, shared

COLUMN = "found"  # says how a document was found


@dataclass(frozen=True)
class Knobs(Generator):
    data: Data = knob(Data(), "the corpus: jsonl, jsonl.gz, parquet, csv, text, or a folder of them; every column is kept")
    seeds: list[str] = knob([], "words, questions or passages to start from")
    seed_file: str = knob("", "more seeds: a text file, one a line, or a table with seed and perhaps domain", path=True)
    seed_column: str = knob("seed", "column of the seeds in a table")
    questions: int = knob(5, "questions per seed and request; 0: the seeds alone, without a model", low=0)
    samples: int = knob(1, "requests per seed", low=1)
    thoughts: bool = knob(True, "also search with a reasoned answer to each question")
    rounds: int = knob(2, "rounds of questions, at most", low=1)
    least_yield: float = knob(0.05, "share of new documents in what a round found, below which the search ends", low=0, high=1)
    queries: int = knob(1000, "queries, at most", low=1)
    k: int = knob(1000, "documents per query, at most", low=1)
    k1: float = knob(1.2, "BM25: how soon more of the same term stops to count", low=0)
    b: float = knob(0.75, "BM25: how much longer documents lose", low=0, high=1)
    terms: int = knob(64, "terms of a query that count, the rarest ones", low=1)
    shard: int = knob(50_000_000, "characters of text in one part of the index; no result depends on it", low=1)
    temperature: float = knob(0.8, "of the generator", low=0)
    max_tokens: int = knob(512, "tokens of a reply, at most", low=1)
    evaluation: dict[str, Any] = knob({}, "evaluation sets whose text is taken out, as name: FILE or hub id")
    ngram: int = knob(13, "words in a row that a document may not share with an evaluation set", low=1)
    dedup: dict[str, Any] = knob({"keep": "first"}, "settings of curate.dedup")
    host: str = knob("url", "column of addresses, for hosts")
    per_host: int = knob(0, "documents of one host, at most; 0: no limit", low=0)


def index_of(source: Source, folder: Path, knobs: Knobs) -> Index:
    """The index of the whole corpus, in shards on disk."""
    index, texts, size = Index(folder, k1=knobs.k1, b=knobs.b, most_terms=knobs.terms), list[str](), 0
    for batch in source:
        new = batch.column(source.column).to_pylist()
        texts += new
        size += sum(map(len, new))
        if size >= knobs.shard:
            index.add(texts)
            texts, size = [], 0
    if texts:
        index.add(texts)
    return index


def search(knobs: Knobs, seeds: list[tuple[str, str]], index: Index, desk: Desk | None) -> tuple[Pool, Found, list[dict[str, Any]], str]:
    """Rounds of queries until one yields too little: all queries, what they found, a row per round, and why the search ended."""
    pool, found, rounds = Pool(), Found(), list[dict[str, Any]]()
    for i, (text, _) in enumerate(seeds):
        pool.add(Query(text, "seed", i, 0))
    fresh, stopped = _cut(pool, 0, knobs.queries), "there is no model to ask"
    for number in range(knobs.rounds + 1):
        known = len(found.best)
        for q in fresh:
            found.add(*index.search(q.text, knobs.k))
        distinct = {d for docs in found.docs[len(found.docs) - len(fresh) :] for d in docs.tolist()}
        share = (len(found.best) - known) / len(distinct) if distinct else 0.0
        row = {"round": number, "queries": len(fresh), "found": len(distinct), "new": len(found.best) - known, "yield": round(share, 6)}
        rounds.append(row)
        if desk is None:
            break
        if number and share < knobs.least_yield:
            stopped = f"round {number} yielded {share:.3f}, less than {knobs.least_yield}"
            break
        if number == knobs.rounds:
            stopped = "the rounds were used up"
            break
        if len(pool.queries) >= knobs.queries:
            stopped = "the queries were used up"
            break
        parents = [q for q in fresh if q.kind != "thought"]
        start = len(pool.queries)
        made = ask_questions(desk, parents, pool, knobs, number + 1)
        if knobs.thoughts:
            ask_thoughts(desk, made[: knobs.queries - start], pool, knobs)
        fresh = _cut(pool, start, knobs.queries)
        if not fresh:
            stopped = "no new query was made"
            break
    return pool, found, rounds, stopped


def _cut(pool: Pool, start: int, most: int) -> list[Query]:
    """The queries from `start` on, without those above the limit."""
    if (over := len(pool.queries) - most) > 0:
        pool.dropped["above the limit of queries"] += over
        del pool.queries[most:]
    return pool.queries[start:]


def gather(knobs: Knobs, source: Source, pool: Pool, found: Found, seeds: list[tuple[str, str]], folder: Path) -> dict[str, Any]:
    """Write dataset.jsonl and removed.jsonl from what was found; returns the funnel, hosts and the documents that stay."""
    evaluations = read_evaluations(knobs.evaluation, knobs.ngram)
    with tempfile.TemporaryDirectory(dir=folder) as name, open(folder / "removed.jsonl", "w", encoding="utf-8") as out:
        work = Path(name)
        union, copies = work / "union.jsonl", work / "dedup"
        ids, hosts, host_of = list[int](), list[str](), Counter[str]()
        with Sink(union) as sink:
            for row, names in _union(source, found, evaluations):
                host = host_name(row.get(knobs.host))
                host_of[host] += 1
                if names:
                    out.write(json.dumps({"row": row[PLACE], "reason": f"evaluation {names[0]}", "flags": names}) + "\n")
                    continue
                ids.append(row[PLACE])
                hosts.append(host)
                sink.write([row | {COLUMN: _origin(row[PLACE], found, pool, seeds)}], source.column)
        if not ids:
            raise UserError("no document is left", f"all {len(found.best)} that were found hold text of evaluation sets", "name fewer sets")
        copies.mkdir()
        own = build(dedup.Knobs, knobs.dedup, "dedup")
        sizes = dedup.METHOD(replace(own, data=Data(str(union), source.column)), copies, 0)["cluster sizes"]
        twins = [json.loads(line) for line in (copies / "removed.jsonl").read_text().splitlines()]
        left = sorted(set(range(len(ids))) - {t["row"] for t in twins})
        above = _above(left, ids, hosts, found, knobs.per_host)
        out.writelines(json.dumps(t | {"row": ids[t["row"]], "kept": ids[t["kept"]]}) + "\n" for t in twins)
        out.writelines(json.dumps({"row": ids[i], "reason": "host", "host": hosts[i]}) + "\n" for i in sorted(above))
        with Sink(folder / "dataset.jsonl") as sink, open(copies / "dataset.jsonl", encoding="utf-8") as lines:
            sink.write((json.loads(line) for i, line in zip(left, lines, strict=True) if i not in above), source.column)
    kept = [i for i in left if i not in above]
    stages = [("evaluation", len(found.best), len(ids)), ("dedup", len(ids), len(left)), ("host", len(left), len(kept))]
    return {
        "funnel": table([Stage(*s) for s in stages]),
        "kept": [ids[i] for i in kept],
        "hosts": host_of,
        "hosts kept": Counter(hosts[i] for i in kept),
        "characters": sink.characters,
        "short": evaluations.short,
        "cluster sizes": sizes,
    }


def _union(source: Source, found: Found, evaluations: Evaluations) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The documents that were found, in the order of the corpus, and the evaluation sets that each holds text of."""
    for batch in source:
        if COLUMN in batch.schema.names:
            raise UserError(f"the corpus has a column '{COLUMN}' already", "it would be lost", "rename it")
        rows = [r for r in batch.to_pylist() if r[PLACE] in found.best]
        yield from zip(rows, evaluations.of([r[source.column] for r in rows]) if rows else [], strict=True)


def _origin(doc: int, found: Found, pool: Pool, seeds: list[tuple[str, str]]) -> dict[str, Any]:
    score, place = found.best[doc]
    q = pool.queries[place]
    seed, domain = seeds[q.seed]
    origin = {"query": q.text, "kind": q.kind, "round": q.round, "seed": seed, "domain": domain}
    return origin | {"score": round(score, 6), "queries": found.times[doc]}


def _above(left: list[int], ids: list[int], hosts: list[str], found: Found, most: int) -> set[int]:
    """The places of documents beyond the best `most` of their host."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for i in left:
        by_host[hosts[i]].append(i)
    ranked = {h: sorted(of, key=lambda i: (-found.best[ids[i]][0], ids[i])) for h, of in by_host.items()}
    return {i for h, of in ranked.items() if h and most for i in of[most:]}


def query(knobs: Knobs, job: StepContext) -> EvalResult:
    """Write dataset.jsonl, removed.jsonl and queries.jsonl."""
    seeds = read_seeds(knobs.seeds, knobs.seed_file, knobs.seed_column)
    build(dedup.Knobs, knobs.dedup, "dedup")  # refuses before anything is asked
    desk = open_writer(knobs, job.folder, job.seed) if knobs.questions else None
    source = Source(knobs.data)
    with tempfile.TemporaryDirectory(dir=job.folder) as work:
        with job.progress.task("index"):
            index = index_of(source, Path(work), knobs)
        with job.progress.task("queries") as tick:
            if desk:
                desk.tick = tick
            pool, found, rounds, stopped = search(knobs, seeds, index, desk)
        documents = index.docs
    if not found.best:
        raise UserError("no document was found", "no query has a word in common with the corpus", "try other seeds")
    facts = gather(knobs, source, pool, found, seeds, job.folder)
    mutual = shared(pool, found)
    with open(job.folder / "queries.jsonl", "w", encoding="utf-8") as out:
        for q, docs, new, share in zip(pool.queries, found.docs, found.new, mutual, strict=True):
            origin = {"query": q.text, "kind": q.kind, "round": q.round, "seed": seeds[q.seed][0], "domain": seeds[q.seed][1]}
            row = origin | {"parent": q.parent, "found": len(docs), "new": new, "shared": round(share, 6)}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    metrics = {
        "documents": documents,
        "found": len(found.best),
        "kept": len(facts["kept"]),
        "rounds": rounds,
        "stopped": stopped,
        "domains": domains(pool, found, seeds, facts["kept"]),
        "funnel": facts["funnel"],
        "hosts": dict(facts["hosts kept"].most_common(10)),
        "gini of hits per host": round(gini(list(facts["hosts"].values())), 6),
        "queries": len(pool.queries),
        "queries not used": dict(pool.dropped),
        "characters": facts["characters"],
        "evaluation texts too short to look for": facts["short"],
        "requests": desk.plain() if desk else {"judge": "none", "requests": 0},
        **{f"dropped: {k}": v for k, v in source.dropped.items()},
    }
    return result(metrics, facts["hosts"], facts["hosts kept"])


METHOD = query
