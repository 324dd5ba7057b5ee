"""LLMBar (2310.07641, ICLR 2024): how well a language model judges whether an output follows its instruction.

419 pairs with an objective better output, 100 natural and 319 adversarial. Every pair is judged in both orders. Use it to
choose a judge and a way to ask it, before you trust its verdicts; `replay` recomputes published runs from what was recorded.

The paper's: the strategies, the two orders, accuracy and agreement, averages as plain means over subsets, and the rule that
a tie of ratings is half right. Swap asks with an explanation in both orders and, where the two disagree, once more with
both explanations shown, again in both orders. The published code reads verdicts leniently (see judge/ask/verdict.py);
`compat: official` reads live runs in the same way, and replays are always read so. Its temperature is 0 for the vendors'
models, and sampling for open ones by their own defaults; ours is 0 for all.

Ours: the wording of every prompt, the batches, the strict parser, and that a pair without a verdict in both orders does not
agree (published: it does). The intervals are Wilson's per subset, combined for means. McNemar's test between strategies takes a
pair as one trial. The share of pairs that position alone decided is reported. Verdicts can be read off the logits
(`verdict: logits`), which need no format to be followed; the mean of a judge's probabilities over both orders gives one more
accuracy, free of its liking for a place.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelwright.core.ask.desk import Counts, Desk, failures
from modelwright.core.ask.judges import open_judge
from modelwright.core.ask.protocol import Answer, Prompt
from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.files import write_json
from modelwright.core.knobs import knob
from modelwright.core.step import EvalResult, StepContext
from modelwright.judge.ask import prompts
from modelwright.judge.ask.prompts import STRATEGIES, Strategy
from modelwright.judge.ask.replay import pairs_of, replay
from modelwright.judge.ask.summary import Run, finding
from modelwright.judge.ask.verdict import UNPARSED, compare_ratings, parse_verdict, swap, swap_names


@dataclass(frozen=True)
class Knobs:
    replay: str | None = knob(None, "folder of recorded runs to recompute; no judge is asked", path=True)
    pairs: str | None = knob(
        None, "pairs to judge: a table with input, output_1, output_2, label (1 or 2), or a json of subsets", path=True
    )
    strategies: list[str] = knob([], "ways to ask: vanilla, rules, cot, swap, metrics_reference, rating, ...; empty: all fifteen")
    subsets: list[str] = knob([], "subsets to take, by name or its last part; empty: all")
    limit: int | None = knob(None, "pairs per subset, at most", low=1)
    url: str | None = knob(
        None, "OpenAI-compatible endpoint to ask, as in https://api.openai.com/v1 (extra: endpoint); empty: the checkpoint judges"
    )
    model: str | None = knob(None, "name of the model at the endpoint")
    endpoint: dict[str, Any] = knob(
        {}, "key (environment variable), timeout, retries, backoff, rate, workers, price_in, price_out, logprobs, body"
    )
    cache: str | None = knob(None, "file that keeps every answer, for the next run to take up; empty: in the step's folder", path=True)
    batch: int = knob(8, "prompts per forward pass of a checkpoint", low=1)
    verdict: Literal["text", "logits"] = knob("text", "read verdicts off the text, or off the logits of the verdict's words")
    compat: Literal["none", "official"] = knob("none", "official: read verdicts as leniently as the published code")


def llmbar(knobs: Knobs, job: StepContext) -> EvalResult:
    """Judge pairs with a checkpoint or an endpoint, or recompute recorded runs. Writes verdicts.json for what was judged."""
    strategies = [_choose(s, list(STRATEGIES), "strategy") for s in knobs.strategies] or list(STRATEGIES)
    if knobs.replay:
        return _replayed(knobs, strategies)
    if not knobs.pairs:
        raise UserError("nothing to judge was given", how="give --pairs FILE, or --replay FOLDER")
    explained = [s for s in strategies if STRATEGIES[s].explain]
    if knobs.verdict == "logits" and explained:
        why = "its verdict comes after an explanation"
        raise UserError(f"verdict=logits does not fit {explained[0]}", why, "leave it out, or use verdict=text")
    of = pairs_of(Path(knobs.pairs))
    of = {s: of[s][: knobs.limit] for s in _subsets(knobs, list(of))}
    judge = open_judge(job, knobs.url, knobs.model, knobs.endpoint, knobs.cache, knobs.batch)
    pairs = [p for rows in of.values() for p in rows]
    labels = np.array([int(p["label"]) for p in pairs])
    desk = Desk(judge)
    runs: list[Run] = []
    kept = []
    for name in strategies:
        with job.progress.task(f"judge {name}", len(pairs) * 2) as desk.tick:
            verdicts, chances = ask(desk, pairs, STRATEGIES[name], knobs.verdict == "logits", knobs.compat == "official")
        runs += _by_subset(judge.name, name, of, verdicts, chances, labels, knobs.compat == "official")
        kept.append({"strategy": name, "verdicts": verdicts.tolist(), "p_first": None if chances is None else chances.round(6).tolist()})
    write_json(job.folder / "verdicts.json", {"subsets": {k: len(v) for k, v in of.items()}, "labels": labels.tolist(), "runs": kept})
    return _judged(runs, len(pairs), desk)


def _by_subset(
    judge: str,
    strategy: str,
    of: dict[str, list[dict[str, Any]]],
    verdicts: np.ndarray,
    chances: np.ndarray | None,
    labels: np.ndarray,
    official: bool,
) -> list[Run]:
    """One strategy's verdicts (2, N) and probabilities (2, N) cut into its subsets."""
    runs, start = [], 0
    for subset, rows in of.items():
        part = slice(start, start + len(rows))
        start += len(rows)
        extra = {}
        if chances is not None:
            by_mean = np.where(chances[:, part].mean(0) > 0.5, 1, 2)
            extra["accuracy_of_mean_probability"] = 100 * float((by_mean == labels[part]).mean())
        runs.append(Run(judge, strategy, subset, verdicts[:, part], labels[part], extra, official))
    return runs


def _judged(runs: list[Run], pairs: int, desk: Desk) -> EvalResult:
    """The finding of a live run, with what became of its requests."""
    found, counts = finding(runs), desk.plain()
    found.metrics["requests"] = counts
    best = max(found.metrics["averages"], key=lambda r: r["overall"]["accuracy"])
    overall = best["overall"]
    low, high = overall["accuracy_interval"]
    unread = sum(int((r.verdicts == UNPARSED).sum()) for r in runs)
    verdicts = sum(r.verdicts.size for r in runs)
    found.text = f"{pairs} pairs, each in both orders; chance is 50. {_lost(counts)}"
    if unread:
        found.text += f" {unread:,} of {verdicts:,} verdicts were not given in a readable form; they count as wrong."
    cost = f"cost {counts['cost']:g}" if counts["cost"] else f"{counts['tokens_out']:,} tokens written"
    found.tiles = [
        (f"{overall['accuracy']:.1f} %", "accuracy of the best strategy", f"{best['strategy']}; 95 %: {low:.1f} to {high:.1f}"),
        (
            f"{overall['agreement']:.1f} %",
            "of its pairs judged alike in both orders",
            f"{overall['unparsed']:.1f} % of its verdicts unparsed",
        ),
        (f"{counts['requests']:,}", "requests", cost),
    ]
    found.tables += failures(counts)
    found.facts = {"judge": desk.judge.name, "answers": counts["answers"], "answers kept before": counts["reused"]}
    if counts["kept_lines_not_read"]:
        found.facts["kept answers that could not be read"] = counts["kept_lines_not_read"]
    return found


def ask(
    desk: Desk, pairs: list[dict[str, Any]], s: Strategy, logits: bool = False, official: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Verdicts (2, N) of one strategy, both orders in the order of the data, and the probability (2, N) that the first output is
    the better one, where the judge gives probabilities for every pair."""
    none = [Answer()] * len(pairs)
    questions = desk(prompts.questions_prompt(p["input"]) for p in pairs) if s.questions else none
    references = desk(prompts.reference_prompt(p["input"]) for p in pairs) if s.reference else none
    aids = [(q.text, r.text) for q, r in zip(questions, references, strict=True)]
    if s.rating:
        return _rate(desk, pairs, s, aids, logits, official)
    orders = [("output_1", "output_2"), ("output_2", "output_1")]
    asked = [prompts.compare_prompt(s, p["input"], p[a], p[b], aid) for a, b in orders for p, aid in zip(pairs, aids, strict=True)]
    answers = desk(_unwritten(asked) if logits else asked)
    verdicts, chances = _read(answers, "explained" if s.explain else "direct", logits, official)
    if s.reconcile:
        split = np.flatnonzero((verdicts != UNPARSED).all(0) & (verdicts[0] != verdicts[1]))
        again = []
        for order, (a, b) in enumerate(orders):
            for i in split:
                p, says = pairs[i], {}
                for given in (0, 1):  # the explanation of each order speaks for the output that won there
                    text = answers[given * len(pairs) + i].text
                    says[verdicts[given, i]] = text if given == order else swap_names(text)
                for_first, for_second = (says[1], says[2]) if order == 0 else (says[2], says[1])
                again.append(prompts.reconcile_prompt(s, p["input"], p[a], p[b], for_first, for_second))
        verdicts[:, split] = _read(desk(again), s.reconcile, False, official)[0]
        chances = None
    return verdicts, chances


def _unwritten(asked: list[Prompt]) -> list[Prompt]:
    return [replace(p, max_tokens=0) for p in asked]


def _read(answers: list[Answer], form: Any, logits: bool, official: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Answers to both orders, one after the other, as verdicts and probabilities in the order of the data."""
    if logits:
        said = [_likelier(a) for a in answers]
    else:
        said = [UNPARSED if a.failed else parse_verdict(a.text, form, official) for a in answers]
    shown = np.array(said, dtype=int).reshape(2, -1)
    verdicts = np.stack([shown[0], swap(shown[1])])
    first = [a.probabilities[0] for a in answers if a.probabilities]
    if not answers or len(first) < len(answers):
        return verdicts, None
    p = np.array(first).reshape(2, -1)
    return verdicts, np.stack([p[0], 1 - p[1]])


def _likelier(answer: Answer) -> int:
    """The verdict that the probabilities speak for."""
    if not answer.probabilities:
        return UNPARSED
    return 1 if answer.probabilities[0] > 0.5 else 2


def _rate(
    desk: Desk, pairs: list[dict[str, Any]], s: Strategy, aids: list[Any], logits: bool, official: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    asked = [prompts.rating_prompt(s, p["input"], p[o], aid) for o in ("output_1", "output_2") for p, aid in zip(pairs, aids, strict=True)]
    answers = desk(_unwritten(asked) if logits else asked)
    first, second = answers[: len(pairs)], answers[len(pairs) :]
    if not logits:
        return np.array([compare_ratings(a.text, b.text, official) for a, b in zip(first, second, strict=True)]).T, None
    expected = [np.dot(a.probabilities, range(10)) if a.probabilities else np.nan for a in answers]
    a, b = np.array(expected).reshape(2, -1)
    return np.where(np.isnan(a - b), UNPARSED, [np.where(a > b, 1, 2), np.where(b > a, 2, 1)]), None


def _replayed(knobs: Knobs, strategies: list[str]) -> EvalResult:
    runs, seen = replay(Path(knobs.replay or ""))
    subsets = _subsets(knobs, list(dict.fromkeys(r.subset for r in runs)))
    found = finding([r for r in runs if r.strategy in strategies and r.subset in subsets])
    found.metrics["reproduced"] = seen
    n, texts, ratings = seen["runs"], seen.get("completions", 0), seen.get("ratings", 0)
    same = min(seen["same accuracy"], seen["same agreement"])
    found.text = f"{same} of {n} recorded runs have the accuracy and the agreement that were reported."
    found.tiles = [(f"{same} / {n}", "runs reproduced", "accuracy and agreement")]
    if texts:
        strict = seen["completions strictly unparsed"]
        found.tiles.append(
            (f"{seen['same completions']:,} / {texts:,}", "texts with the recorded verdict", f"{strict:,} unparsed if read strictly")
        )
    if ratings:
        found.tiles.append((f"{seen['same ratings']:,} / {ratings:,}", "pairs of ratings with the recorded verdict", ""))
    return found


def _lost(counts: Counts) -> str:
    lost = sum(counts["failed"].values())
    if not lost:
        return "Every request was answered."
    return f"{lost} of {counts['requests']} requests were not answered and count as unparsed: " + ", ".join(
        f"{n} {kind}" for kind, n in counts["failed"].items()
    )


def _subsets(knobs: Knobs, known: list[str]) -> list[str]:
    names = {k.lower(): name for name in known for k in (name, name.split("/")[-1])}
    chosen = [names[_choose(s, list(names), "subset")] for s in knobs.subsets]
    return [s for s in known if s in chosen] if chosen else known


def _choose(name: str, known: list[str], what: str) -> str:
    if name.lower() not in known:
        raise UserError(f"unknown {what} '{name}'", how=did_you_mean(name.lower(), known))
    return name.lower()


METHOD = llmbar
