"""Recorded traces against the tools: which observations come out the same, and what is wrong with the recorded ones."""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError
from modelwright.reward.tools.builtin import pass_rate, read_json
from modelwright.reward.tools.calls import ToolBox
from modelwright.reward.tools.traces import Judged, Trace, TracedPair, pairs_of, parse, parse_actions

REPLAYED = ("Calendar.week_day", "Calendar.target_day", "Calendar.day_difference", "history_weather", "translate")
RERUN = ("calculator", "code_run")  # whose stored observations are replaced: they were made with the right answer at hand
_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")
_QUOTED = re.compile(r"predicted answer (-?[\d.,]+)")


@dataclass
class Replay:
    """One file of pairs: its size, and for each tool the calls, the observations that came out the same, and the first that did not."""

    name: str
    pairs: int = 0
    round_trips: int = 0  # traces that are the same after reading and writing
    traces: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    same: Counter[str] = field(default_factory=Counter)
    different: dict[str, str] = field(default_factory=dict)
    leaks: dict[str, int] = field(default_factory=dict)


def read_pairs(path: Path) -> list[TracedPair]:
    """The pairs of a json, json.gz or jsonl file. UserError where it holds something else."""
    if path.suffix == ".jsonl":
        import json

        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read", str(error), "copy it again") from None
    else:
        rows = read_json(path)
    try:
        if not isinstance(rows, list):
            raise ValueError("it is no list")
        return pairs_of(rows)
    except ValueError as error:
        raise UserError(f"{path} holds no traced pairs", str(error), "give rows with question, pos_answer and neg_answer") from None


def files_of(folder: Path) -> list[Path]:
    """The files of pairs in a folder: NAME_train and NAME_test."""
    found = sorted(p for p in folder.glob("*.json*") if re.search(r"_(train|test)\.json", p.name))
    if not found:
        raise UserError(f"{folder} holds no traces", "no file is named NAME_train.json or NAME_test.json", "give TARA's data folder")
    return found


def replay(path: Path, tools: ToolBox) -> Replay:
    """Every call of a file, made again."""
    pairs = read_pairs(path)
    found = Replay(path.name.partition(".")[0], len(pairs))
    for pair in pairs:
        for judged in (pair.chosen, pair.rejected):
            found.traces += 1
            found.round_trips += comes_back(judged.trace)
            for call in judged.trace.calls:
                found.calls[call.action] += 1
                if call.action in REPLAYED:
                    seen = tools.observe(call.action, call.input)
                    found.same[call.action] += seen == call.observation
                    if seen != call.observation:
                        found.different.setdefault(call.action, f"{call.input[:60]}: {seen[:60]}, recorded {call.observation[:60]}")
    if any("calculator" in found.calls for _ in pairs[:1]):
        found.leaks = leaks(pairs)
    return found


def comes_back(trace: Trace) -> bool:
    """Whether a trace is the same after writing and reading it, in both forms."""
    stored, written = parse_actions(trace.actions()), parse(trace.text())
    same = stored.calls == trace.calls and stored.closing == trace.closing
    stripped = replace(trace, closing=trace.closing.strip(), rationale=trace.rationale.strip())
    return same and replace(written, rationale=written.rationale.strip()).text() == stripped.text()


def leaks(pairs: list[TracedPair]) -> dict[str, int]:
    """What the stored calculator observations of the bad answers give away."""
    counts = {"quotes the right answer": 0, "quotes it and the answer is another": 0, "the bad answer is the right number": 0}
    for pair in pairs:
        right, own = final_number(pair.chosen.answer), final_number(pair.rejected.answer)
        quoted = [_number(m) for c in pair.rejected.trace.calls for m in _QUOTED.findall(c.observation)]
        told = right is not None and right in quoted
        counts["quotes the right answer"] += told
        counts["quotes it and the answer is another"] += told and own is not None and own != right
        counts["the bad answer is the right number"] += right is not None and own == right
    return counts


def final_number(answer: str) -> float | None:
    """The number behind #### of a GSM8K answer."""
    found = _NUMBER.search(answer.rpartition("####")[2])
    return _number(found[0]) if found and "####" in answer else None


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").rstrip("."))
    except ValueError:
        return None


def rerun(pair: TracedPair, tools: ToolBox) -> TracedPair:
    """The pair with the observations of calculator and code made again, without the right answer."""
    return replace(pair, chosen=_rerun(pair.chosen, pair, tools), rejected=_rerun(pair.rejected, pair, tools))


def _rerun(judged: Judged, pair: TracedPair, tools: ToolBox) -> Judged:
    calls = []
    for call in judged.trace.calls:
        if call.action == "calculator":
            call = replace(call, observation=tools.observe("calculator", call.input))
        elif call.action == "code_run" and pair.tests:
            call = replace(call, observation=pass_rate(judged.answer, list(pair.tests)))
        calls.append(call)
    return replace(judged, trace=replace(judged.trace, calls=tuple(calls)))


def plain(found: Replay) -> dict[str, Any]:
    """For scripts."""
    tools = {n: {"calls": c, "same": found.same[n]} if n in REPLAYED else {"calls": c} for n, c in sorted(found.calls.items())}
    return {"pairs": found.pairs, "traces": found.traces, "round trips": found.round_trips, "tools": tools} | (
        {"leaks": found.leaks} if found.leaks else {}
    )
