"""Ways to choose one answer that ask no judge: votes, votes that stop early, and the chain with the best score.

judge/select.py says where each comes from. Chains beyond the ones that a way wants are not looked at, so `chains` may sample
them as it is indexed.
"""

from collections import Counter
from collections.abc import Sequence
from math import comb

from modelwright.core.errors import UserError
from modelwright.judge.chains.answers import Choice, Kind, extract


def vote(answers: Sequence[str]) -> str:
    """The most frequent answer that is not empty; the first seen wins a tie; empty when there is none."""
    counts = Counter(a for a in answers if a)
    return max(counts, key=counts.__getitem__) if counts else ""


def majority_probability(leading: int, second: int) -> float:
    """P(p > 1/2) for p ~ Beta(leading + 1, second + 1): a binomial tail, because the counts are whole."""
    n = leading + second + 1
    return sum(comb(n, i) for i in range(leading + 1)) / 2**n


def self_consistency(chains: Sequence[str], kind: Kind, n: int = 40) -> Choice:
    """The vote of the first n chains."""
    limit = min(n, len(chains))
    return Choice(vote([extract(chains[i], kind) for i in range(limit)]), limit)


def complexity(chains: Sequence[str], kind: Kind, n: int = 40, top: int = 0) -> Choice:
    """The vote of the `top` chains (0: half) with the most lines that are not empty, among the first n."""
    limit = min(n, len(chains))
    by_steps = sorted((chains[i] for i in range(limit)), key=_steps, reverse=True)  # stable: the earlier chain first
    voters = by_steps[: top or -(-limit // 2)]
    return Choice(vote([extract(c, kind) for c in voters]), limit)


def _steps(chain: str) -> int:
    return sum(1 for line in chain.splitlines() if line.strip())


def early_stopping(chains: Sequence[str], kind: Kind, n: int = 40, window: int = 5) -> Choice:
    """ESC: stop after the first window of chains whose answers are all the same."""
    limit = min(n, len(chains))
    answers: list[str] = []
    while len(answers) < limit:
        end = min(limit, len(answers) + window)
        new = [extract(chains[i], kind) for i in range(len(answers), end)]
        answers += new
        if len(set(new)) == 1:
            break
    return Choice(vote(answers), len(answers))


def adaptive(chains: Sequence[str], kind: Kind, n: int = 40, confidence: float = 0.95) -> Choice:
    """Stop after the first chain that makes the leading answer the majority with this probability."""
    counts: Counter[str] = Counter()
    for i in range(min(n, len(chains))):
        counts[extract(chains[i], kind)] += 1
        leading, second = [*sorted(counts.values(), reverse=True), 0][:2]
        if majority_probability(leading, second) >= confidence:
            break
    return Choice(vote(list(counts.elements())), counts.total())


def best_of_n(chains: Sequence[str], kind: Kind, n: int = 40, scores: Sequence[float] | None = None) -> Choice:
    """The answer of the chain with the highest score; UserError where a chain has none."""
    limit = min(n, len(chains))
    if scores is None or len(scores) < limit:
        raise UserError("best_of_n needs a score for each chain", how="name the column that holds them, as in columns: {scores: NAME}")
    if not limit:
        return Choice("", 0)
    best = max(range(limit), key=scores.__getitem__)
    return Choice(extract(chains[best], kind), limit)
