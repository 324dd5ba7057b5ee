"""How even a corpus is over its languages, and what a sampling plan makes of it. Sizes are in tokens, or whatever the caller counts in."""

import numpy as np

Sizes = dict[str, float]


def shares(sizes: Sizes) -> Sizes:
    """q_i = n_i / sum n."""
    total = sum(sizes.values())
    return {k: n / total for k, n in sizes.items()}


def entropy(sizes: Sizes) -> float:
    """H in nats; exp(H) is the effective number of languages."""
    q = np.array([v for v in shares(sizes).values() if v > 0])
    return float(-(q * np.log(q)).sum())


def gini(sizes: Sizes) -> float:
    """0 where all are alike, towards 1 where one has all."""
    v = np.sort(np.array(list(sizes.values()), float))
    n = len(v)
    return float((2 * np.arange(1, n + 1) - n - 1) @ v / (n * v.sum()))


def distance(sizes: Sizes, target: Sizes) -> float:
    """The largest difference of the cumulative shares (Kolmogorov), languages in the order of their names."""
    q, p = shares(sizes), shares(target)
    names = sorted(q.keys() | p.keys())
    return float(np.abs(np.cumsum([q.get(k, 0) - p.get(k, 0) for k in names])).max())


def tempered(sizes: Sizes, alpha: float) -> Sizes:
    """p_i = q_i^alpha / sum q^alpha: 1 as it is, 0 all alike. A temperature T is alpha = 1 / T."""
    powers = {k: q**alpha for k, q in shares(sizes).items()}
    return shares(powers)


def unimax(sizes: Sizes, budget: float, epochs: float) -> Sizes:
    """Tokens of each language under UniMax (2304.09151): as even as can be with no language seen more than `epochs` times."""
    left, plan = budget, Sizes()
    for i, name in enumerate(sorted(sizes, key=lambda k: (sizes[k], k))):  # the smallest first
        plan[name] = min(left / (len(sizes) - i), sizes[name] * epochs)
        left -= plan[name]
    return {k: plan[k] for k in sizes}


def passes(plan: Sizes, sizes: Sizes) -> Sizes:
    """How often each language's text is seen under a plan in tokens."""
    return {k: plan[k] / sizes[k] for k in sizes}
