"""SFTMix: supervised tuning with mixed hidden states of well-learnt and badly-learnt examples (arXiv 2410.05248, ACL 2026).

For instruction data of mixed quality, without filtering it and without a judge. A reference run tells how well each example is learnt:
    Conf_i = -(1/C) sum_c Perp_c(Y_i | X_i),     Perp_c = exp(mean loss of the learnt tokens at checkpoint c).
The data is split at the median. Each batch holds as many confident as unconfident examples in random pairs. With Z the states that feed
the head, cut to the shorter answer of a pair, and lambda ~ Beta(alpha, alpha):
    Z~_n = lambda Z^c_n + (1 - lambda) Z^u_n,      g_n = head(Z~_n)
    l_Mix = mean_n [logsumexp(g_n) - lambda g_n[y^c_n] - (1 - lambda) g_n[y^u_n]],         l = l_NTP + mu l_Mix.
This is the cross-entropy with the mixed labels, without targets as wide as the vocabulary. The model itself stays as it is.

No official code was found. Open in the paper and ours: lambda is one draw per pair and step, pairs are drawn once a run; ties and odd
sizes are split by rank, the middle example then has no partner; C is the number of epochs, or 5 in one epoch. The confidence comes from a
recorded run (`record`), where each example's loss is the one at which it was learnt, or from a reference run on the same rows, made here
with the settings of the training and kept in the cache. With packed rows a pair shares a row, which may be up to twice as long as
train.context. train.batch counts examples, two of each pair.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from modelwright.core.data.packing import multipack
from modelwright.core.data.rows import TokenRows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train, Tune, knob
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train import dist
from modelwright.core.train.objective import NextToken, objective_class
from modelwright.core.train.technique import LossTerm, Technique
from modelwright.tune.mixing.confidence import dynamics_of, recorded, referenced
from modelwright.tune.mixing.pairs import Example, PairedRows, examples_of, halves
from modelwright.tune.mixing.states import Mixing, MixTerm


@dataclass(frozen=True)
class Knobs(Tune):
    mu: float = knob(0.2, "weight of the loss of the mixed states; 0 is plain supervised tuning", low=0)
    alpha: float = knob(0.5, "lambda is drawn from Beta(alpha, alpha)", low=1e-3)
    record: str | None = knob(None, "dynamics.parquet of a recorded run on the same rows, or that run's result folder", path=True)
    reference: str | None = knob(None, "checkpoint of the reference run where none is recorded; empty: the model itself", path=True)
    checkpoints: int | None = knob(None, "C: checkpoints of the reference run; empty: one an epoch, or 5 in a single epoch", low=1)
    split: Literal["confidence", "random"] = knob("confidence", "how the data is halved; random is the control")
    ntp: bool = knob(True, "keep the next-token loss; without it the mixed states are all that is learnt from")


class SftMix(Technique):
    """A data policy (pairs), an objective (mixed states) and a loss term."""

    name = "sftmix"

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        self._train: Train | None = None
        self._facts: dict[str, Any] = {}
        if not knobs.mu and not knobs.ntp:
            raise UserError("mu is 0 and ntp is false", "nothing would be learnt", "set one of them")

    def objective(self, model: Any, tokenizer: Any, train: Train, seed: int) -> Mixing:
        if objective_class(model) is not NextToken:
            raise UserError(f"sftmix cannot tune {type(model).__name__}", "it mixes states that predict the next token", "use a decoder")
        self._seed = seed
        return Mixing(model, tokenizer, seed, self.knobs.alpha, self.knobs.mu > 0, self.knobs.ntp)

    def settings(self, rows: TokenRows, train: Train) -> Train:
        self._train = train
        if rows.packed:
            return train
        if train.batch % 2:
            raise UserError(f"train.batch is {train.batch}", "a batch holds pairs of examples", "give an even number")
        return replace(train, batch=train.batch // 2)

    def terms(self) -> list[LossTerm]:
        return [MixTerm(self.knobs.mu)] if self.knobs.mu else []

    def prepare(self, rows: TokenRows) -> PairedRows:
        every = examples_of(rows)
        usable = [e for e in every if e.learnt]
        if len(usable) < 2:
            raise UserError(f"the data has {len(usable)} example to learn from", "sftmix mixes two with each other", "give more rows")
        confidence = self._confidence(rows, usable)
        if confidence is None:
            confidence = np.random.default_rng((self._seed, 1)).random(len(usable))
        elif confidence.min() == confidence.max():
            why = "no half of the data is better learnt than the other"
            raise UserError("all examples have the same confidence", why, "give the record of a run that learnt them, or split: random")
        a, b = halves(confidence, self._seed)
        pairs = [[usable[i], usable[j]] for i, j in zip(a, b, strict=True)]
        paired = {e for p in pairs for e in p}
        alone = [[e] for e in every if e not in paired]
        self._facts = {
            "split": self.knobs.split,
            "pairs": len(pairs),
            "without a partner": len(alone),
            "mean perplexity": {"confident": -float(confidence[a].mean()), "unconfident": -float(confidence[b].mean())},
        }
        if self.knobs.split == "random":
            del self._facts["mean perplexity"]
        return PairedRows(rows, self._plan(pairs, rows) + alone, rows.facts)

    def _plan(self, pairs: list[list[Example]], rows: TokenRows) -> list[list[Example]]:
        if not rows.packed:
            return pairs
        lengths = [sum(e.stop - e.start for e in p) for p in pairs]
        short = [i for i, n in enumerate(lengths) if n <= rows.width]
        step = 1 if self._train is None else self._train.batch * self._train.accumulate * dist.world()
        bins = multipack([lengths[i] for i in short], rows.width, step * -(-32 // step), self._seed)
        return [p for p, n in zip(pairs, lengths, strict=True) if n > rows.width] + [[e for j in b for e in pairs[short[j]]] for b in bins]

    def _confidence(self, rows: TokenRows, examples: list[Example]) -> np.ndarray | None:
        if self.knobs.split == "random":
            return None
        if self.knobs.record:
            return recorded(dynamics_of(Path(self.knobs.record)), examples)
        source = Checkpoint(self.knobs.reference) if self.knobs.reference else self.source
        if source is None:
            raise UserError("nothing tells the confidence of the examples", "there is no record and no reference", "give record: FILE")
        if self.knobs.reference and self.source and _words(source) != _words(self.source):
            raise UserError(f"{source.folder} has another tokenizer", "it would learn other tokens", "give a reference with the same one")
        return referenced(source, rows, examples, self._train or Train(), self._seed, self.knobs.checkpoints)

    def liveness(self, moved: dict[str, Tensor]) -> str:
        n = sum(bool(m.any()) for m in moved.values())
        if not n:
            raise RuntimeError("sftmix: no weight moved in the first step")
        return f"sftmix: {self._facts['pairs']} pairs, {self._facts['without a partner']} examples without a partner; {n} tensors moved"

    def facts(self) -> dict[str, Any]:
        return self._facts


def _words(source: Checkpoint) -> Any:
    tokenizer = source.tokenizer()
    return None if tokenizer is None else tokenizer.get_vocab()


METHOD = SftMix
