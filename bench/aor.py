"""AoR with a program as the judge on recorded chains: accuracy against chains and judge calls, beside the votes.

500 last-letter questions with 40 GPT-3.5 chains each; every seed shuffles each question's chains. Judges, each scoring a chain
from 0 to 10: `letters` checks every step and the concatenation; `letters` with Gaussian noise of the given deviation, drawn
once per chain; `steps only` sees whether the stated letters are true and not whether they were put together rightly; `random`
is the control that knows nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np

from common import SHARED, save, spread
from modelwright.core.numbers.stats import mcnemar
from modelwright.judge.aor import Knobs, run
from modelwright.judge.chains import letters
from modelwright.judge.chains.answers import Choice, same
from modelwright.judge.chains.questions import Measured, Question, coverage, measure, read_chains
from modelwright.judge.chains.scoring import Request, Scores
from modelwright.judge.select import select

FILE = SHARED / "selfconsistency" / "esc_gpt35_last_letters.jsonl.gz"
SEEDS = [0, 1, 2, 3, 4]
BUDGETS = [(5, 10), (10, 20), (20, 40)]
Score = Callable[[str, str], float]


def scorer(score: Score) -> Callable[[list[Request]], list[Scores]]:
    return lambda requests: [[score(r.question, c) for c in r.chains] for r in requests]


def noisy(deviation: float, seed: int) -> Score:
    def score(question: str, chain: str) -> float:
        off = Random(f"{seed} {question} {chain}").gauss(0, deviation)
        return min(10.0, max(0.0, letters.score(question, chain) + off))

    return score


def steps_only(question: str, chain: str) -> float:
    steps = letters._STEP.findall(chain.lower())
    return 10 * sum(word.endswith(letter) for word, letter in steps) / len(steps) if steps else 0.0


def judges(seed: int) -> dict[str, Score]:
    scores: dict[str, Score] = {"letters": letters.score}
    scores |= {f"letters, noise {d}": noisy(d, seed) for d in (1, 2, 4)}
    return scores | {"steps only": steps_only, "random": lambda q, c: Random(f"{seed} {q} {c}").uniform(0, 10)}


@dataclass
class Trials:
    """Every way to choose on every seed: measures by (method, judge, budget), and which questions each got right."""

    measures: dict[tuple[str, str, str], list[Measured]] = field(default_factory=dict)
    right: dict[tuple[str, str, str], list[np.ndarray]] = field(default_factory=dict)

    def add(self, name: tuple[str, str, str], asked: list[Question], chosen: list[Choice]) -> None:
        self.measures.setdefault(name, []).append(measure(asked, chosen, "letters"))
        right = np.array([same(c.answer, q.answer, "letters") for c, q in zip(chosen, asked, strict=True)])
        self.right.setdefault(name, []).append(right)


def trials(recorded: list[Question]) -> Trials:
    results = Trials()
    for seed in SEEDS:
        asked = [Question(q.text, q.answer, Random(f"{seed} {i}").sample(q.chains, len(q.chains))) for i, q in enumerate(recorded)]
        for n in (5, 10, 20, 40):
            results.add(("self_consistency", "", str(n)), asked, [select(q.chains, kind="letters", n=n) for q in asked])
        for method in ("esc", "adaptive", "complexity"):
            results.add((method, "", "40"), asked, [select(q.chains, method, kind="letters") for q in asked])
        for name, score in judges(seed).items():
            for n, most in BUDGETS if name in ("letters", "random") else BUDGETS[-1:]:
                chosen = run(asked, scorer(score), replace(Knobs(chains="", kind="letters"), n=n, max=most), seed)
                results.add(("aor", name, f"{n} to {most}"), asked, chosen)
    return results


def main() -> None:
    recorded = read_chains(FILE, "letters", {})
    results = trials(recorded)
    rows = [
        [method, judge, budget, *(spread([r[k] for r in measures]) for k in ("accuracy", "chains", "calls"))]
        for (method, judge, budget), measures in results.measures.items()
    ]
    aor, voted = ("aor", "letters", "20 to 40"), ("self_consistency", "", "40")
    best, vote, small = results.measures[aor], results.measures[voted], results.measures["aor", "letters", "5 to 10"]
    above = all(a["accuracy"] > v["accuracy"] and a["chains"] < v["chains"] for a, v in zip(best, vote, strict=True))
    p = max(mcnemar(a, v) for a, v in zip(results.right[aor], results.right[voted], strict=True))
    blind = [r["accuracy"] for r in results.measures["aor", "random", "20 to 40"]]
    save(
        "aor",
        claim="AoR with a judge that checks steps is above self-consistency over 40 chains, with fewer chains (2405.12939)",
        outcome=f"{'Met' if above else 'NOT met'} on every seed: {spread([r['accuracy'] for r in best])} % with "
        f"{spread([r['chains'] for r in best])} chains against {spread([r['accuracy'] for r in vote])} % with 40 "
        f"(McNemar p at most {p:.1g}); with at most 10 chains {spread([r['accuracy'] for r in small])} %. The judge decides: with noise of "
        "deviation 4 AoR is where the vote is, and with a judge that sees single steps but not how they are put together, or with "
        f"random scores ({spread(blind)} %), it is below the vote.",
        columns=["method", "judge", "chains, first to at most", "accuracy, %", "chains per question", "judge calls per question"],
        rows=rows,
        seeds=SEEDS,
        notes=[
            "median (min to max) over the seeds",
            f"no choice can be above {coverage(recorded, 'letters', 40):.1f} %: so often the right answer is among the 40 chains",
            "the judge is a program that can check this task; a language model's scores lie somewhere between `letters` and `random`",
        ],
    )


if __name__ == "__main__":
    main()
