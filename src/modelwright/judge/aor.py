"""AoR, Aggregation of Reasoning (2405.12939, LREC-COLING 2024): choose among answers by judging how they were reached.

A vote fails where the right answer is in the minority. AoR groups the sampled chains by their answer and asks a judge twice:
how good is each chain among those with the same answer (local scoring), and which answer's best chains hold up side by side
(global evaluation)? Where the two leading answers are close, more chains are sampled. Use it when there is a judge that can
tell a good chain from a bad one, and when votes are split.

1. Sample n chains; group by answer. One group: done, without a call.
2. Local: in batches within a group, a judge gives each chain 0 to 10 (logical consistency 3, method 3, completeness and
   clarity 2, knowledge 2). Chains below epsilon fall away; the k best represent their answer.
3. Global: k rounds; in round t representative t mod (their number) of every answer stands in one prompt and gets 0 to 10
   (validity of the approach 3, consistency of steps and answer 3, completeness and clarity 2, knowledge 2). The answer with
   the highest mean wins; the first seen wins a tie.
4. While best minus second < theta and fewer than max chains were sampled: sample up to `add` more, score them beside the best
   and the worst representative of their group, and repeat 3 if any group's representatives changed.

The paper's and the published code's: all of this, and the defaults. The published code skips a question whose scores do not
parse, or where no chain passes epsilon, without a record; zips local scores with chains in the order of the judge's reply;
shows answers in the global prompt always in the same order; lets chains without an answer stand for one; and reads scores
through a second call that turns text into JSON.
Ours: a failed batch leaves its chains unscored and sampling goes on; a question that ends without a winner is counted under
its reason and gets the majority's answer (`fallback: none` leaves it empty); scores are read by their numbers; the order of
answers is drawn by the seed and rotated from round to round; chains without an answer are left out; scores are read off the
text, without the second call; requests of all questions travel in one batch per step. `compat: official` keeps the order and
the empty answer, gives up where the published code does, and has no fallback.
Chains are recorded ones: "sampling" takes the next of them.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from modelwright.core.errors import UserError
from modelwright.core.job import Finding, Job
from modelwright.core.knobs import knob
from modelwright.judge.chains.answers import Choice, extract
from modelwright.judge.chains.questions import Question, read_chains


@dataclass(frozen=True)
class Knobs:
    chains: str = knob(help="recorded chains: a table with one row per question", path=True, argument=True)
    kind: Literal["number", "choice", "yes_no", "letters", "text"] = knob("number", "what the final answer is")
    verifier: Literal["none", "letters"] = knob("none", "a program as the judge; letters: checks last letters step by step")
    n: int = knob(20, "chains sampled at first", low=1)
    max: int = knob(40, "chains per question, at most", low=1)
    add: int = knob(5, "chains per further round (b)", low=1)
    group: int = knob(5, "chains per local scoring request", low=1)
    k: int = knob(3, "representatives per answer, and rounds of global evaluation", low=1)
    epsilon: float = knob(6.0, "lowest local score of a representative, of 10", low=0, high=10)
    theta: float = knob(2.0, "margin between the two best answers at which sampling stops, of 10", low=0)
    retries: int = knob(5, "times a request is made until its scores parse", low=1)
    temperature: float = knob(1.0, "of the judge", low=0)
    fallback: Literal["majority", "none"] = knob("majority", "answer of a question without a winner")
    compat: Literal["none", "official"] = knob(
        "none", "official: answers in one order, and a question is given up as in the published code"
    )
    columns: dict[str, str] = knob({}, "names of the columns question, answer, chains; by default these, or the only list of texts")
    limit: int | None = knob(None, "use at most this many questions", low=1)
    url: str | None = knob(None, "OpenAI-compatible endpoint to ask, as in https://api.openai.com/v1; empty: the checkpoint judges")
    model: str | None = knob(None, "name of the model at the endpoint")
    endpoint: dict[str, Any] = knob({}, "key (environment variable), timeout, retries, backoff, rate, workers, price_in, price_out, body")
    cache: str | None = knob(None, "file that keeps every answer, for the next run to take up; empty: in the step's folder", path=True)
    batch: int = knob(8, "prompts per forward pass of a checkpoint", low=1)


@dataclass(frozen=True)
class Request:
    """Chains to be scored in one go: of one answer (local), or one of each answer (`compare`). `examples` are scored chains."""

    question: str
    chains: tuple[str, ...]
    compare: bool = False
    examples: tuple[tuple[str, float], ...] = ()
    round: int = 0


Scores = list[float] | None  # one per chain, or None: not to be had
Scorer = Callable[[list[Request]], list[Scores]]
Talk = Generator[list[Request], list[Scores], Any]


def aor(q: Question, answers: list[str], knobs: Knobs, rng: Random) -> Generator[list[Request], list[Scores], Choice]:
    """One question: yields requests, is sent their scores, returns the choice. `answers` are those of all its chains."""
    official = knobs.compat == "official"
    used, calls = min(knobs.n, len(answers)), 0
    most = min(knobs.max, len(answers))
    fresh = _grouped(answers, range(used), official)
    if len(fresh) == 1:
        return Choice(next(iter(fresh)), used)
    best: dict[str, list[tuple[float, int]]] = {}  # answer -> its representatives, (score, chain), best first
    winner, margin, reason, first = "", 0.0, "no chain has an answer", True
    while True:
        changed, n, lost = yield from _local(q, fresh, best, knobs)
        calls += n
        if (fresh and not best) or (official and first and lost):
            reason = "local scores did not parse" if lost else "no chain passes epsilon"
            if official:
                break
        if changed:
            means, n = yield from _global(q, best, knobs, rng)
            calls += n
            if means:
                winner = max(means, key=means.__getitem__)
                ranked = sorted(means.values(), reverse=True)
                margin, reason = ranked[0] - (ranked[1] if len(ranked) > 1 else 0.0), "ok"
            elif official or not winner:
                winner, reason = "", "global scores did not parse"
                if official:
                    break
        if margin >= knobs.theta or used >= most:
            break
        fresh, first = _grouped(answers, range(used, min(most, used + knobs.add)), official), False
        used = min(most, used + knobs.add)
    if reason == "ok":
        return Choice(winner, used, calls, margin=margin)
    votes = _grouped(answers, range(used))
    fallback = max(votes, key=lambda a: len(votes[a]), default="") if knobs.fallback == "majority" and not official else ""
    return Choice(fallback, used, calls, reason)


def _grouped(answers: list[str], which: range, empty: bool = False) -> dict[str, list[int]]:
    """Chain numbers by answer, in the order seen."""
    groups: dict[str, list[int]] = {}
    for i in which:
        if answers[i] or empty:
            groups.setdefault(answers[i], []).append(i)
    return groups


def _local(q: Question, fresh: dict[str, list[int]], best: dict[str, list[tuple[float, int]]], knobs: Knobs) -> Talk:
    """Score new chains and keep each answer's k best in `best`. Returns (any changed, requests, any lost)."""
    batches = [(a, chains[i : i + knobs.group]) for a, chains in fresh.items() for i in range(0, len(chains), knobs.group)]
    requests = []
    for answer, batch in batches:
        known = best.get(answer, [])
        ends = dict.fromkeys((known[0], min(known, key=lambda si: si[0]))) if known else ()
        examples = tuple((q.chains[i], score) for score, i in ends)
        requests.append(Request(q.text, tuple(q.chains[i] for i in batch), examples=examples))
    replies = yield requests
    found: dict[str, list[tuple[float, int]]] = {}
    for (answer, batch), scores in zip(batches, replies, strict=True):
        if scores is not None:
            found.setdefault(answer, []).extend((s, i) for s, i in zip(scores, batch, strict=True) if s >= knobs.epsilon)
    changed = False
    for answer, new in found.items():
        kept = sorted(best.get(answer, []) + new, key=lambda si: -si[0])[: knobs.k]  # stable: the earlier chain first
        if kept and kept != best.get(answer):
            best[answer], changed = kept, True
    return changed, len(requests), any(s is None for s in replies)


def _global(q: Question, best: dict[str, list[tuple[float, int]]], knobs: Knobs, rng: Random) -> Talk:
    """Mean score of each answer over k rounds, and the number of requests; no means where one did not parse."""
    order = list(best)
    if knobs.compat != "official":
        rng.shuffle(order)
    requests, orders = [], []
    for t in range(knobs.k):
        turned = order if knobs.compat == "official" else order[t % len(order) :] + order[: t % len(order)]
        orders.append(turned)
        requests.append(Request(q.text, tuple(q.chains[best[a][t % len(best[a])][1]] for a in turned), compare=True, round=t))
    replies = yield requests
    if any(scores is None for scores in replies):
        return {}, len(requests)
    totals = dict.fromkeys(best, 0.0)
    for turned, scores in zip(orders, replies, strict=True):
        for answer, score in zip(turned, scores or [], strict=True):
            totals[answer] += score
    return {a: total / knobs.k for a, total in totals.items()}, len(requests)  # divided last: a margin of 2 is 2


def run(asked: list[Question], scorer: Scorer, knobs: Knobs, seed: int = 0, tick: Callable[[int], None] | None = None) -> list[Choice]:
    """All questions side by side: each step's requests of every question go to the scorer in one list."""
    talks = {}
    for i, q in enumerate(asked):
        answers = [extract(q.chains[j], knobs.kind, knobs.compat == "official") for j in range(min(knobs.max, len(q.chains)))]
        talks[i] = aor(q, answers, knobs, Random(f"{seed} {i}"))  # noqa: S311 - an order, not a secret
    chosen: dict[int, Choice] = {}
    sent: dict[int, Any] = dict.fromkeys(talks)
    while sent:
        wanted: dict[int, list[Request]] = {}
        for i, scores in sent.items():
            try:
                wanted[i] = talks[i].send(scores)
            except StopIteration as end:
                chosen[i] = end.value
                if tick:
                    tick(1)
        replies = iter(scorer([r for requests in wanted.values() for r in requests]) if wanted else [])
        sent = {i: [next(replies) for _ in requests] for i, requests in wanted.items()}
    return [chosen[i] for i in range(len(asked))]


def aor_step(knobs: Knobs, job: Job) -> Finding:
    """AoR on recorded chains beside the votes that it is to beat, with a judge or a verifier."""
    from modelwright.judge.chains.budget import budget
    from modelwright.judge.chains.critic import open_scorer

    if knobs.max < knobs.n:
        raise UserError(f"max={knobs.max} is less than n={knobs.n}", "n chains are sampled at first", "raise max or lower n")
    asked = read_chains(Path(knobs.chains), knobs.kind, knobs.columns, knobs.limit)
    scorer = open_scorer(knobs, job)
    with job.progress.task("judge.aor", len(asked)) as tick:
        chosen = run(asked, scorer, knobs, job.seed, tick)
    return budget(asked, chosen, scorer, knobs, job.seed)


METHOD = aor_step
