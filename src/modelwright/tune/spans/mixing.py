"""How much of each language is drawn: by a power of its size (XLM, 1901.07291), or evenly with a limit of passes (UniMax, 2304.09151)."""

from typing import Literal

from modelwright.core.errors import UserError

How = Literal["exponent", "unimax"]


def exponent(sizes: dict[str, int], alpha: float) -> dict[str, float]:
    """Shares p_i = q_i^alpha / sum q_j^alpha, q_i = n_i / sum n. alpha 1 gives the sizes' own shares, 0 equal ones."""
    total = sum(sizes.values())
    powers = {k: (n / total) ** alpha for k, n in sizes.items()}
    return {k: p / sum(powers.values()) for k, p in powers.items()}


def unimax(sizes: dict[str, int], budget: float, passes: float) -> dict[str, float]:
    """Shares of `budget` tokens: the smallest language first, each gets an equal part of what is left, at most `passes` times its size."""
    left, given = float(budget), {}
    order = sorted(sizes, key=lambda k: (sizes[k], k))
    for i, name in enumerate(order):
        given[name] = min(left / (len(order) - i), passes * sizes[name])
        left -= given[name]
    total = sum(given.values())
    return {k: given[k] / total for k in sizes}


def shares(sizes: dict[str, int], how: How, alpha: float, budget: float, passes: float) -> dict[str, float]:
    """Shares by size in tokens; UserError for a language without a token."""
    empty = [k for k, n in sizes.items() if not n]
    if empty:
        raise UserError(f"{empty[0]} has no words", "its source gives no token", "give text, or leave it out")
    return exponent(sizes, alpha) if how == "exponent" else unimax(sizes, budget, passes)
