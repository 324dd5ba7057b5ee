"""Which heads become one, and how many each layer keeps (the search of DHA, arXiv 2406.06567).

`grouped` splits m heads into n groups so that the sum of the costs within groups is small: average linkage, then moves and swaps of
single heads as long as one helps. `spend` shares a number of heads out over layers and kinds, so that the sum of what remains is
least: exactly, by dynamic programming. Ties go to the lower number.
"""

import numpy as np


def within(cost: np.ndarray, labels: np.ndarray) -> float:
    """The sum of costs (m, m) over pairs in one group."""
    same = labels[:, None] == labels[None]
    return float(cost[np.triu(same, 1)].sum())


def grouped(cost: np.ndarray, n: int, equal: bool = False) -> np.ndarray:
    """Labels (m,) of n groups from symmetric costs (m, m); `equal`: groups of one size. Groups are numbered by their first head."""
    m = len(cost)
    cost = cost - np.diag(np.diag(cost))
    labels = np.arange(m) // (m // n) if equal else _linked(cost, n)
    while (better := _step(cost, labels, n, equal)) is not None:
        labels = better
    first = {g: int(np.flatnonzero(labels == g)[0]) for g in range(n)}
    rank = {g: i for i, g in enumerate(sorted(first, key=first.__getitem__))}
    return np.array([rank[int(g)] for g in labels])


def _linked(cost: np.ndarray, n: int) -> np.ndarray:
    """Average linkage down to n groups."""
    groups = [[i] for i in range(len(cost))]
    while len(groups) > n:
        pairs = [(float(cost[np.ix_(groups[a], groups[b])].mean()), a, b) for a in range(len(groups)) for b in range(a + 1, len(groups))]
        _, a, b = min(pairs)
        groups[a] += groups.pop(b)
    labels = np.empty(len(cost), np.int64)
    for g, members in enumerate(groups):
        labels[members] = g
    return labels


def _step(cost: np.ndarray, labels: np.ndarray, n: int, equal: bool) -> np.ndarray | None:
    """The labels after the best move or swap, or None where none helps."""
    m = len(cost)
    member = labels[:, None] == np.arange(n)
    to = cost @ member  # (m, n): a head's costs to each group
    own = to[np.arange(m), labels]
    swap = to[:, labels] - own[:, None]  # i goes to the group of j ...
    gain = swap + swap.T - 2 * cost
    gain[labels[:, None] == labels[None]] = 0
    i, j = np.unravel_index(int(gain.argmin()), gain.shape)
    best, new = float(gain[i, j]), labels.copy()
    new[i], new[j] = labels[j], labels[i]
    if not equal:
        move = to - own[:, None]
        move[member.sum(0)[labels] == 1] = 0  # a group does not become empty
        a, g = np.unravel_index(int(move.argmin()), move.shape)
        if float(move[a, g]) < best:
            best, new = float(move[a, g]), labels.copy()
            new[a] = g
    return new if best < -1e-12 else None


def spend(costs: list[list[float]], budget: int) -> list[int]:
    """How many heads each item keeps: costs[i][n - 1] is what remains of item i with n heads; exactly `budget` in all."""
    most = [len(c) for c in costs]
    if not len(costs) <= budget <= sum(most):
        raise ValueError(f"{budget} heads do not fit {len(costs)} items of at most {max(most)}")
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    choices = []
    for c in costs:
        new, choice = np.full(budget + 1, np.inf), np.zeros(budget + 1, np.int64)
        for n in range(1, min(len(c), budget) + 1):
            value = best[: budget + 1 - n] + c[n - 1]
            better = value < new[n:]
            new[n:][better], choice[n:][better] = value[better], n
        best = new
        choices.append(choice)
    found, left = [], budget
    for choice in reversed(choices):
        found.append(int(choice[left]))
        left -= found[-1]
    return found[::-1]


def spend_greedily(costs: list[list[float]], budget: int) -> list[int]:
    """The same one head at a time, each taken where it costs least: a comparison for `spend`."""
    found = [len(c) for c in costs]
    while sum(found) > budget:
        rise = [(c[n - 2] - c[n - 1], i) for i, (c, n) in enumerate(zip(costs, found, strict=True)) if n > 1]
        found[min(rise)[1]] -= 1
    return found
