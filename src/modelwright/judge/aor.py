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
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

from modelwright.core.ask.desk import Desk
from modelwright.core.ask.judges import open_judge
from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.core.step import EvalResult, StepContext
from modelwright.judge.chains.answers import Choice, extract
from modelwright.judge.chains.budget import budget
from modelwright.judge.chains.critic import Critic, Verifier
from modelwright.judge.chains.questions import Question, read_chains
from modelwright.judge.chains.scoring import Request, Scorer, Scores


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
    url: str | None = knob(
        None, "OpenAI-compatible endpoint to ask, as in https://api.openai.com/v1 (extra: endpoint); empty: the checkpoint judges"
    )
    model: str | None = knob(None, "name of the model at the endpoint")
    endpoint: dict[str, Any] = knob({}, "key (environment variable), timeout, retries, backoff, rate, workers, price_in, price_out, body")
    cache: str | None = knob(None, "file that keeps every answer, for the next run to take up; empty: in the step's folder", path=True)
    batch: int = knob(8, "prompts per forward pass of a checkpoint", low=1)


Chains = dict[str, list[int]]  # answer -> the numbers of its chains, in the order sampled
Best = dict[str, list[tuple[float, int]]]  # answer -> its representatives as (score, chain), best first


@dataclass
class Standing:
    """Where one question stands."""

    sampled: int
    calls: int = 0
    winner: str = ""
    margin: float = 0.0
    outcome: str = "no chain has an answer"  # or "ok", or another reason why there is no winner


@dataclass(frozen=True)
class LocalRound:
    """What one round of local scoring did: requests made, whether a representative changed, whether scores were lost."""

    requests: int
    changed: bool
    lost: bool


def aor(q: Question, answers: list[str], knobs: Knobs, rng: Random) -> Generator[list[Request], list[Scores], Choice]:
    """One question: yields requests, is sent their scores, returns the choice. `answers` are those of all its chains."""
    official = knobs.compat == "official"
    limit = min(knobs.max, len(answers))
    standing = Standing(sampled=min(knobs.n, len(answers)))
    new = _by_answer(answers, range(standing.sampled), official)
    if len(new) == 1:
        (only,) = new
        return Choice(only, standing.sampled)
    best: Best = {}
    first_round = True
    while True:
        local = yield from _score_locally(q, new, best, knobs)
        standing.calls += local.requests
        nobody_passed = bool(new) and not best
        given_up = official and first_round and local.lost
        if nobody_passed or given_up:
            standing.outcome = "local scores did not parse" if local.lost else "no chain passes epsilon"
            if official:
                break
        if local.changed:
            means = yield from _compare(q, best, knobs, rng)
            standing.calls += knobs.k
            _decide(standing, means, official)
            if official and not means:
                break
        if standing.margin >= knobs.theta or standing.sampled >= limit:
            break
        more = range(standing.sampled, min(limit, standing.sampled + knobs.add))
        new = _by_answer(answers, more, official)
        standing.sampled, first_round = more.stop, False
    return _choice(standing, answers, knobs)


def _by_answer(answers: list[str], which: range, keep_empty: bool = False) -> Chains:
    """Chain numbers by answer, in the order seen. A chain without an answer counts only with `keep_empty`."""
    groups: Chains = {}
    for i in which:
        if answers[i] or keep_empty:
            groups.setdefault(answers[i], []).append(i)
    return groups


def _score_locally(q: Question, new: Chains, best: Best, knobs: Knobs) -> Generator[list[Request], list[Scores], LocalRound]:
    """Score new chains in batches of one answer each, and keep each answer's k best in `best`."""
    batches: list[tuple[str, list[int]]] = []
    for answer, chains in new.items():
        batches += [(answer, chains[i : i + knobs.group]) for i in range(0, len(chains), knobs.group)]
    requests = []
    for answer, batch in batches:
        texts = tuple(q.chains[i] for i in batch)
        requests.append(Request(q.text, texts, examples=_examples(q, best.get(answer, []))))
    replies = yield requests

    passed: Best = {}
    for (answer, batch), scores in zip(batches, replies, strict=True):
        if scores is not None:
            good = [(score, i) for score, i in zip(scores, batch, strict=True) if score >= knobs.epsilon]
            passed.setdefault(answer, []).extend(good)
    changed = False
    for answer, good in passed.items():
        before = best.get(answer, [])
        after = sorted(before + good, key=lambda pair: -pair[0])[: knobs.k]  # stable: the earlier chain first
        if after != before:
            best[answer], changed = after, True
    return LocalRound(len(requests), changed, any(scores is None for scores in replies))


def _examples(q: Question, known: list[tuple[float, int]]) -> tuple[tuple[str, float], ...]:
    """The best and the worst representative of an answer with their scores; one of them where they are the same chain."""
    if not known:
        return ()
    worst = min(known, key=lambda pair: pair[0])  # the first of equal scores
    return tuple((q.chains[i], score) for score, i in dict.fromkeys((known[0], worst)))


def _compare(q: Question, best: Best, knobs: Knobs, rng: Random) -> Generator[list[Request], list[Scores], dict[str, float]]:
    """Global evaluation: the mean score of each answer over k rounds. Empty where a round did not parse."""
    order = list(best)
    if knobs.compat != "official":
        rng.shuffle(order)
    orders, requests = [], []
    for t in range(knobs.k):
        start = 0 if knobs.compat == "official" else t % len(order)
        rotated = order[start:] + order[:start]
        shown = [best[answer][t % len(best[answer])] for answer in rotated]
        orders.append(rotated)
        requests.append(Request(q.text, tuple(q.chains[i] for _, i in shown), compare=True, round=t))
    replies = yield requests

    totals = dict.fromkeys(best, 0.0)
    for rotated, scores in zip(orders, replies, strict=True):
        if scores is None:
            return {}
        for answer, score in zip(rotated, scores, strict=True):
            totals[answer] += score
    return {answer: total / knobs.k for answer, total in totals.items()}  # divided last: a margin of 2 is 2


def _decide(standing: Standing, means: dict[str, float], official: bool) -> None:
    """Take over the answer with the highest mean. Without means, an earlier winner stays, except officially."""
    if means:
        ranked = sorted(means.values(), reverse=True)
        second = ranked[1] if len(ranked) > 1 else 0.0
        standing.winner = max(means, key=means.__getitem__)  # the first seen wins a tie
        standing.margin, standing.outcome = ranked[0] - second, "ok"
    elif official or not standing.winner:
        standing.winner, standing.outcome = "", "global scores did not parse"


def _choice(standing: Standing, answers: list[str], knobs: Knobs) -> Choice:
    """The winner, or what stands in for one."""
    if standing.outcome == "ok":
        return Choice(standing.winner, standing.sampled, standing.calls, margin=standing.margin)
    answer = ""
    if knobs.fallback == "majority" and knobs.compat != "official":
        groups = _by_answer(answers, range(standing.sampled))
        answer = max(groups, key=lambda a: len(groups[a]), default="")
    return Choice(answer, standing.sampled, standing.calls, standing.outcome)


def run(asked: list[Question], scorer: Scorer, knobs: Knobs, seed: int = 0, tick: Callable[[int], None] | None = None) -> list[Choice]:
    """All questions side by side: each step's requests of every question go to the scorer in one list."""
    official = knobs.compat == "official"
    dialogues: dict[int, Generator[list[Request], list[Scores], Choice]] = {}
    for i, q in enumerate(asked):
        answers = [extract(q.chains[j], knobs.kind, official) for j in range(min(knobs.max, len(q.chains)))]
        dialogues[i] = aor(q, answers, knobs, Random(f"{seed} {i}"))  # noqa: S311 - an order, not a secret
    chosen: dict[int, Choice] = {}
    scores_for: dict[int, Any] = dict.fromkeys(dialogues)  # what each dialogue is sent next; None starts it
    while scores_for:
        wanted: dict[int, list[Request]] = {}
        for i, scores in scores_for.items():
            try:
                wanted[i] = dialogues[i].send(scores)
            except StopIteration as end:
                chosen[i] = end.value
                if tick:
                    tick(1)
        requests = [request for of_one in wanted.values() for request in of_one]
        replies = iter(scorer(requests) if requests else [])
        scores_for = {i: [next(replies) for _ in of_one] for i, of_one in wanted.items()}
    return [chosen[i] for i in range(len(asked))]


def aor_step(knobs: Knobs, job: StepContext) -> EvalResult:
    """AoR on recorded chains beside the votes that it is to beat, with a judge or a verifier."""
    if knobs.max < knobs.n:
        raise UserError(f"max={knobs.max} is less than n={knobs.n}", "n chains are sampled at first", "raise max or lower n")
    asked = read_chains(Path(knobs.chains), knobs.kind, knobs.columns, knobs.limit)
    scorer = _scorer(knobs, job)
    with job.progress.task("judge.aor", len(asked)) as tick:
        chosen = run(asked, scorer, knobs, job.seed, tick)
    counts = scorer.plain()
    smaller = []
    if isinstance(scorer, Verifier):  # a program costs nothing; a model is not asked again
        smaller = [run(asked, scorer, _part_of(knobs, part), job.seed) for part in (4, 2)]
    return budget(asked, chosen, smaller, counts, kind=knobs.kind, most=knobs.max, fallback=knobs.fallback)


def _part_of(knobs: Knobs, part: int) -> Knobs:
    """The same settings with a budget of one `part`-th."""
    return replace(knobs, n=max(1, knobs.n // part), max=max(1, knobs.max // part), add=max(1, knobs.add // part))


def _scorer(knobs: Knobs, job: StepContext) -> Critic | Verifier:
    """The scorer that the settings name. Raises UserError when they name none."""
    if knobs.verifier != "none":
        return Verifier(knobs.verifier)
    if not knobs.url and job.source is None:
        raise UserError("no judge was given", how="give a checkpoint with --base, --url and --model of an endpoint, or --verifier letters")
    judge = open_judge(job, knobs.url, knobs.model, knobs.endpoint, knobs.cache, knobs.batch)
    return Critic(Desk(judge), knobs.temperature, knobs.retries)


METHOD = aor_step
