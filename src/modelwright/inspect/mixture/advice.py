"""What a person can do about the experts they see. The thresholds are ours."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modelwright.inspect.mixture.layers import KINDS
from modelwright.inspect.mixture.outputs import LayerOutputs
from modelwright.inspect.mixture.weights import Match, WeightSimilarity

COPY = 0.999  # cosine from which two experts are copies of each other
ALIKE = 0.9  # mean similarity of the outputs from which a layer has more experts than it uses
DEAD_SHARE = 0.05  # of an even share of the load
DEAD_NORM = 1e-3  # of the median norm of the layer's router rows
ENOUGH = 50  # slots per expert before an unused one is called dead


@dataclass(frozen=True)
class Advice:
    """One thing to do: what was found, where, and the act."""

    kind: str  # copies | dead | fewer
    layer: int
    experts: list[int]
    found: str
    act: str

    def plain(self) -> dict[str, Any]:
        return vars(self)


def advise(
    index: int, weights: WeightSimilarity | None, matches: dict[str, list[Match]], outputs: LayerOutputs | None, top_k: int
) -> list[Advice]:
    """The advice for one layer."""
    given: list[Advice] = []
    copied: set[int] = set()
    if weights is not None:
        for group, how in _copies(weights, matches):
            copied |= set(group)
            act = "train further with tune.balance, make them differ with reshape.upcycle method=drop, or keep one of them"
            given.append(Advice("copies", index, group, f"experts {_list(group)} are {how}", act))
    given += _dead(index, weights, outputs)
    if outputs is not None and outputs.tokens and outputs.experts > 1:
        given += _fewer(index, outputs, top_k, len(copied) == outputs.experts)
    return given


def _copies(weights: WeightSimilarity, matches: dict[str, list[Match]]) -> list[tuple[list[int], str]]:
    e = len(next(iter(weights.pca.values())))
    equal = [(i, j) for i in range(e) for j in range(i) if all(float(weights.matrix[k][i, j]) >= COPY for k in KINDS)]
    moved = [(m.expert, m.other) for m in matches.get("neuron", []) if m.cosine >= COPY > m.before]
    return [(g, "copies of each other") for g in groups(equal, e)] + [
        (g, "copies of each other with their neurons in another order") for g in groups(moved, e)
    ]


def groups(pairs: list[tuple[int, int]], n: int) -> list[list[int]]:
    """Connected sets of at least two out of n."""
    label = list(range(n))
    for i, j in pairs:
        a, b = label[i], label[j]
        label = [a if x == b else x for x in label]
    sets = [[i for i in range(n) if label[i] == one] for one in dict.fromkeys(label)]
    return [s for s in sets if len(s) > 1]


def _dead(index: int, weights: WeightSimilarity | None, outputs: LayerOutputs | None) -> list[Advice]:
    found = []
    if weights is not None and weights.router_norms:
        middle = sorted(weights.router_norms)[len(weights.router_norms) // 2]
        small = [i for i, n in enumerate(weights.router_norms) if n <= DEAD_NORM * middle]
        if small and middle > 0:
            found.append(
                Advice(
                    "dead",
                    index,
                    small,
                    f"the router rows of experts {_list(small)} are zero",
                    "initialise them again, or drop the experts",
                )
            )
    if outputs is not None and float(outputs.load.sum()) >= ENOUGH * outputs.experts:
        limit = DEAD_SHARE / outputs.experts
        idle = [i for i, s in enumerate(outputs.share.tolist()) if s < limit]
        if idle:
            text = f"experts {_list(idle)} get less than {DEAD_SHARE:.0%} of an even share of the tokens"
            found.append(Advice("dead", index, idle, text, "train with tune.balance, or drop the experts"))
    return found


def _fewer(index: int, outputs: LayerOutputs, top_k: int, all_copies: bool) -> list[Advice]:
    alike = mean_pair(outputs.angle / outputs.tokens, outputs.experts)
    if alike >= ALIKE and not all_copies:
        return [Advice("fewer", index, [], f"the experts' outputs are alike ({alike:.2f})", "fewer experts would do in this layer")]
    if outputs.effective < max(outputs.experts / 2, top_k) and float(outputs.load.sum()) >= ENOUGH * outputs.experts:
        text = f"{outputs.experts} experts are used as if they were {outputs.effective:.1f}"
        return [Advice("fewer", index, [], text, "fewer experts would do in this layer, or train with tune.balance")]
    return []


def mean_pair(table: Tensor, n: int) -> float:
    """Mean over the pairs of different members among the first n of a table (m, m)."""
    part = table[:n, :n]
    return float((part.sum() - part.diagonal().sum()) / (n * (n - 1))) if n > 1 else 1.0


def _list(numbers: list[int]) -> str:
    words = [str(n) for n in numbers[:12]]
    return ", ".join(words) + (f" and {len(numbers) - 12} more" if len(numbers) > 12 else "")
