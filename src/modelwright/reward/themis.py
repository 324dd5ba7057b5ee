"""Themis (2310.01045) at work: recorded traces replayed against the tools, and pairs judged by a model that calls them.

What for: to know whether the tools say what the training data say they said, and how well a model that `reward.themis_train` made ranks
answers with them. Without a model, `replay` reads a folder of traces (TARA, the authors' data set): every call of calendar, weather and
translation is made again and compared letter by letter, every trace is read and written again, and the calculator's recorded observations
are searched for the right answer, which they should not know. With a model, `pairs` are judged: it writes a trace for each answer (greedy,
at most three calls, as in the official code), the calls are made, and the reward is read at the end.

Tools are those of the paper: calculator, calendar, code (core/sandbox.py), weather, translation, search and wiki. The last four answer from
a recorded file (json: input -> answer), an endpoint (https://host/path?q={input}), and search and wiki also from a corpus with a passage a
line, by BM25. A tool that fails or hangs gives a sentence that says so; nothing stops. `schema` writes them as OpenAI's chat API has them.

What was found in TARA: the calculator's observations of bad answers quote the right one, in train with another number in the answer, in
test with the right number there: the splits are of two kinds. Ours: the calculator compares each result at its own decimals and knows no
right answer; `rerun` writes the pairs with the observations of calculator and code made so.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.core.numbers.stats import wilson
from modelwright.core.step import EvalResult, StepContext
from modelwright.reward.tools.builtin import toolbox
from modelwright.reward.tools.calls import ToolBox
from modelwright.reward.tools.replay import REPLAYED, Replay, files_of, plain, read_pairs, replay, rerun


@dataclass(frozen=True)
class Knobs:
    replay: str | None = knob(None, "folder of recorded traces (TARA's data)", path=True)
    pairs: str | None = knob(None, "pairs for a trained model to judge: json, json.gz or jsonl", path=True)
    weather: str | None = knob(None, "recorded weather, or an endpoint; empty: beside the traces")
    translation: str | None = knob(None, "recorded translations, or an endpoint; empty: beside the traces")
    search: str | None = knob(None, "recorded searches, an endpoint, or a corpus with a passage a line")
    wiki: str | None = knob(None, "the same for wiki_search")
    rerun: bool = knob(False, "replay: write the pairs with calculator and code observations made again")
    schema: bool = knob(False, "write the tools as OpenAI's chat API has them, to tools.json")
    calls: int = knob(3, "tools that may be called for one answer", low=0)
    max_new_tokens: int = knob(1024, "tokens between two calls, at most", low=1)
    limit: int | None = knob(None, "judge at most this many pairs", low=1)
    seconds: float = knob(20.0, "time for one call", low=0.1)


def themis(knobs: Knobs, job: StepContext) -> EvalResult:
    """Replay, judge, or both."""
    if not (knobs.replay or knobs.pairs or knobs.schema):
        raise UserError("there is nothing to do", "neither traces to replay nor pairs to judge were given", "give --replay or --pairs")
    tools = _tools(knobs)
    found = EvalResult({"tools": sorted(tools.tools)})
    if knobs.schema:
        (job.folder / "tools.json").write_text(json.dumps(tools.schemas(), indent=1) + "\n")
    if knobs.replay:
        _replay(knobs, job, tools, found)
    if knobs.pairs:
        _judge(knobs, job, tools, found)
    return found


def _tools(knobs: Knobs) -> ToolBox:
    beside = Path(knobs.replay).expanduser() if knobs.replay else None
    sources = {"weather": knobs.weather, "translation": knobs.translation, "search": knobs.search, "wiki": knobs.wiki}
    for name, file in (("weather", "weather_history.json"), ("translation", "translate_history.json")):
        if beside is not None and not sources[name]:
            there = [p for p in (beside / file, beside / f"{file}.gz") if p.is_file()]
            sources[name] = str(there[0]) if there else None
    return toolbox(**sources, seconds=knobs.seconds)


# ---- recorded traces ---------------------------------------------------------------------------------------------------
def _replay(knobs: Knobs, job: StepContext, tools: ToolBox, found: EvalResult) -> None:
    files = files_of(Path(str(knobs.replay)).expanduser())
    done = []
    with job.progress.task("reward.themis: replay", len(files)) as tick:
        for n, file in enumerate(files, 1):
            done.append(replay(file, tools))
            if knobs.rerun:
                _write_again(file, job.folder / "rerun", tools)
            tick.to(n, len(files))
    calls = {t: sum(r.calls[t] for r in done) for t in dict.fromkeys(t for r in done for t in sorted(r.calls))}
    same = {t: sum(r.same[t] for r in done) for t in calls if t in REPLAYED}
    groups = _groups(done)
    found.metrics["replay"] = {
        "files": {r.name: plain(r) for r in done},
        "same": {name: {"same": a, "of": b} for name, (a, b) in groups.items()},
        "round trips": {"same": sum(r.round_trips for r in done), "of": sum(r.traces for r in done)},
    }
    total, right = sum(calls[t] for t in same), sum(same.values())
    found.text = f"{right:,} of {total:,} recorded observations come out letter for letter"
    found.tiles += [(f"{right:,} / {total:,}", "observations the same", "calendar, weather, translation")]
    rows = [[name, f"{a:,}", f"{b:,}"] for name, (a, b) in groups.items()]
    found.tables.append({"title": "Recorded observations", "columns": ["calls", "the same", "of"], "rows": rows})
    leaked = [[r.name, str(r.pairs), *map(str, r.leaks.values())] for r in done if r.leaks]
    if leaked:
        names = next(r.leaks for r in done if r.leaks)
        found.tables.append({"title": "Calculator observations of bad answers", "columns": ["file", "pairs", *names], "rows": leaked})
    different = {r.name: r.different for r in done if r.different}
    if different:
        found.facts["first that differ"] = json.dumps(different, ensure_ascii=False)


def _groups(done: list[Replay]) -> dict[str, tuple[int, int]]:
    """Calls that came out the same, and all: by kind of file and tool."""
    found: dict[str, tuple[int, int]] = {}
    for r in done:
        kind = r.name.rpartition("_")[0].replace("_", " ")
        for tool in sorted(r.calls):
            if tool in REPLAYED:
                name = f"{kind}: {tool.partition('.')[0]}"
                a, b = found.get(name, (0, 0))
                found[name] = a + r.same[tool], b + r.calls[tool]
    return found


def _write_again(file: Path, folder: Path, tools: ToolBox) -> None:
    pairs = [rerun(p, tools) for p in read_pairs(file)]
    if not any(c.action in ("calculator", "code_run") for p in pairs for j in (p.chosen, p.rejected) for c in j.trace.calls):
        return
    folder.mkdir(exist_ok=True)
    with (folder / f"{file.name.partition('.')[0]}.jsonl").open("w", encoding="utf-8") as out:
        for p in pairs:
            both: dict[str, Any] = {"id": p.id, "question": p.question, "context": p.context}
            for name, j in (("pos_answer", p.chosen), ("neg_answer", p.rejected)):
                both[name] = {"answer": j.answer, "actions": j.trace.actions(), "score_agent": {"explanation": j.trace.rationale}}
            out.write(json.dumps(both, ensure_ascii=False) + "\n")


# ---- a model that calls tools ------------------------------------------------------------------------------------------
def _judge(knobs: Knobs, job: StepContext, tools: ToolBox, found: EvalResult) -> None:
    if job.source is None:
        raise UserError("pairs are judged by a model", "no checkpoint was given", "give --base with what reward.themis_train wrote")
    from modelwright.reward.tools.judge import ToolReward

    pairs = read_pairs(Path(str(knobs.pairs)).expanduser())[: knobs.limit]
    reward = ToolReward(job.source, tools, calls=knobs.calls, max_new_tokens=knobs.max_new_tokens)
    right = finished = made = 0
    with job.progress.task("reward.themis: judge", len(pairs)) as tick, (job.folder / "verdicts.jsonl").open("w", encoding="utf-8") as out:
        for n, p in enumerate(pairs, 1):
            a, b = (reward.judge(p.question, j.answer, p.context) for j in (p.chosen, p.rejected))
            right += a.reward > b.reward
            finished += a.finished + b.finished
            made += a.calls + b.calls
            out.write(json.dumps({"id": p.id, "chosen": vars(a), "rejected": vars(b)}, ensure_ascii=False) + "\n")
            tick.to(n, len(pairs))
    low, high = wilson(right, len(pairs))
    found.metrics["judged"] = {"pairs": len(pairs), "accuracy": right / len(pairs), "interval": [low, high], "calls": made}
    found.metrics["judged"] |= {"traces that came to their end": finished, "traces": 2 * len(pairs), "failures of tools": tools.failures}
    said = f"{right} of {len(pairs)} pairs are ranked right ({100 * low:.1f} to {100 * high:.1f} %)"
    found.text = f"{found.text}; {said}" if found.text else said
    found.tiles.append((f"{100 * right / len(pairs):.1f} %", "pairs ranked right", f"{made} calls of tools"))


METHOD = themis
