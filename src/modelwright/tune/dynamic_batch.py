"""Dynamic batch loading (Sheared LLaMA, arXiv 2310.06694): the mix of domains follows how far each is from its reference loss.

When to use it: a model is pruned or trained on, on several domains, and all are to arrive at what a model of its size can reach. With a
fixed mix some domains come back fast and others slowly. Every `every` steps the held-out loss l_i of each domain is compared with r_i:

    delta_i = max(l_i - r_i, 0)        w_i <- w_i exp(delta_i) / sum_j w_j exp(delta_j)        then w_i <- (1 - c) w_i + c / k

The paper's algorithm has the maximum; its code has not (`clip: false`), so there a domain below its reference is pushed down further. The
smoothing c = 1e-4 is the code's. The paper updates every 50 steps while pruning and every 400 in continued training.

References are `references`, for example what inspect.scaling_law predicts at the target's size; left empty, the losses of the model that
training starts from, which suits a pruned model whose source should be matched: combine it with tune.shear in a tune.mix.

Domains are the sources of the data, named by their files, or the values of a column (`domain`). Each row of a step is drawn: a domain by w,
then the next unused row of it; a domain that runs out begins again in another order. What is drawn follows from the seed, the step and w:
processes share it, and a resumed run repeats it. Held out is a share of each domain, or `evals` with a text for each domain, named like it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelwright.core.data.make import make_rows, tokenize
from modelwright.core.data.read import is_text, read_table
from modelwright.core.data.rows import TokenRows
from modelwright.core.data.tables import column
from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Data, Train, Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train import dist
from modelwright.core.train.evaluate import evaluate_rows
from modelwright.core.train.objective import NextToken, objective_class
from modelwright.core.train.technique import Named, Technique


@dataclass(frozen=True)
class Knobs(Tune):
    domain: str | None = knob(None, "column that names each row's domain; empty: the sources of the data are the domains")
    references: dict[str, float] = knob({}, "reference loss of each domain, in nats per token; empty: the losses at the start")
    weights: dict[str, float] = knob({}, "mix at the start; empty: the weights of the sources, or each domain's share of the rows")
    every: int = knob(50, "steps between two updates of the mix", low=1)
    clip: bool = knob(True, "a domain below its reference stays where it is, as the paper says; false: as its code does")
    smoothing: float = knob(1e-4, "c: share of the mix that is spread evenly", low=0, high=1)


class Domains(TokenRows):
    """The rows of several domains, one domain after the other."""

    def __init__(self, parts: dict[str, TokenRows], held: dict[str, TokenRows] | None = None):
        self.parts, self.held = parts, held or {}
        self.starts = dict(zip(parts, np.cumsum([0, *(len(p) for p in parts.values())]).tolist(), strict=False))
        self.bytes = sum(p.bytes for p in parts.values())
        self.width, self.packed = max(p.width for p in parts.values()), any(p.packed for p in parts.values())
        self.stops = list(dict.fromkeys(s for p in parts.values() for s in p.stops))
        self.facts = {"rows": len(self), "tokens": self.tokens, "domains": {n: len(p) for n, p in parts.items()}}

    def __len__(self) -> int:
        return sum(len(p) for p in self.parts.values())

    def __getitem__(self, i: int) -> dict[str, Any]:
        name = next(n for n in reversed(self.parts) if self.starts[n] <= i)
        return self.row(name, i - self.starts[name])

    def row(self, name: str, i: int) -> dict[str, Any]:
        """Row i of a domain."""
        return self.parts[name][i] | {"example_id": self.starts[name] + i}

    @property
    def tokens(self) -> int:
        return sum(p.tokens for p in self.parts.values())

    def split(self, at: int) -> tuple["Domains", "Domains"]:
        """The same share of every domain; the first part remembers the second."""
        short = [n for n, p in self.parts.items() if len(p) < 2]
        if short:
            raise UserError(f"the domain '{short[0]}' has no held-out row", "it has one row", "give it more text, or name evals by domain")
        cuts = {n: min(len(p) - 1, max(1, round(len(p) * at / len(self)))) for n, p in self.parts.items()}
        both = {n: p.split(cuts[n]) for n, p in self.parts.items()}
        held = {n: b for n, (_, b) in both.items()}
        return Domains({n: a for n, (a, _) in both.items()}, held), Domains(held)


def updated(weights: dict[str, float], losses: dict[str, float], references: dict[str, float], clip: bool, c: float) -> dict[str, float]:
    """The next mix."""
    delta = {n: max(losses[n] - references[n], 0.0) if clip else losses[n] - references[n] for n in weights}
    most = max(delta.values())
    raw = {n: w * float(np.exp(delta[n] - most)) for n, w in weights.items()}
    total = sum(raw.values())
    return {n: (1 - c) * v / total + c / len(raw) for n, v in raw.items()}


class Drawn(NextToken):
    """Next tokens of rows that the technique draws; what the loader hands over gives the size alone."""

    owner: "DynamicBatch"

    def prepare(self, batch: dict[str, Tensor], step: int) -> None:
        device = batch["input_ids"].device
        rows = self.owner.drawn(len(batch["example_id"]), step)
        batch.clear()
        batch.update({k: v.to(device) for k, v in self.collate(rows).items()})


class DynamicBatch(Technique):
    """Draws the rows of each step, and changes the mix."""

    name = "dynamic_batch"

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        self.held: dict[str, TokenRows] = {}
        self.weights: dict[str, float] = {}
        self.first: dict[str, float] = {}  # the mix at the start
        self.references = dict(knobs.references)
        self.begun: dict[str, float] = {}  # losses at the start, and the last ones
        self.losses: dict[str, float] = {}
        self.taken: dict[str, int] = {}  # rows of each domain that were drawn
        self.step, self.seed = 0, 0
        self._plan: tuple[int, list[tuple[str, int]], int] = (-1, [], 0)  # step, its rows, how many were handed out here

    # ---- rows
    def rows(self, data: Data, tokenizer: Any, vocab: int, train: Train, seed: int) -> TokenRows | None:
        if self.weights:  # a held-out text
            made = make_rows(data, tokenizer, vocab, train.context, seed=seed)
            named = [n for n, d in self.knobs.evals.items() if d == data]
            self.held[named[0] if named else Path(str(data.path)).stem] = made
            return made
        if data.sources:
            parts, shares = self._of_sources(data, tokenizer, vocab, train.context, seed)
        else:
            parts, shares = self._of_column(data, tokenizer, vocab, train.context)
        if len(parts) < 2:
            raise UserError("dynamic_batch: there is one domain", "a mix has several", "give several sources, or a column with `domain`")
        for what, given in (("references", self.knobs.references), ("weights", self.knobs.weights)):
            if given and (wrong := sorted(given.keys() ^ parts.keys())):
                raise UserError(
                    f"dynamic_batch: {what} and the data disagree about '{wrong[0]}'",
                    f"the domains are {', '.join(parts)}",
                    did_you_mean(wrong[0], parts) or "name every domain",
                )
        wanted = self.knobs.weights or shares
        if not sum(wanted.values()) > 0 or min(wanted.values()) < 0:
            raise UserError("dynamic_batch: the weights are no mix", "they must be positive in sum, and none negative")
        self.weights = {n: wanted[n] / sum(wanted.values()) for n in parts}
        self.first, self.taken = dict(self.weights), dict.fromkeys(parts, 0)
        return Domains(parts)

    def _of_sources(self, data: Data, *how: Any) -> tuple[dict[str, TokenRows], dict[str, float]]:
        tokenizer, vocab, context, seed = how
        parts, shares = {}, {}
        for s in data.sources:
            name = Path(s.path).stem
            if name in parts:
                raise UserError(f"dynamic_batch: two sources are called '{name}'", "a domain is named by its file", "rename one")
            one = replace(data, sources=[], path=s.path, column=s.column, split=s.split, limit=s.limit)
            parts[name], shares[name] = make_rows(one, tokenizer, vocab, context, seed=seed), s.weight
        return parts, shares

    def _of_column(self, data: Data, tokenizer: Any, vocab: int, context: int) -> tuple[dict[str, TokenRows], dict[str, float]]:
        if not self.knobs.domain or is_text(data):
            what = f"{data.path} is plain text" if self.knobs.domain else "dynamic_batch: no domains are named"
            raise UserError(what, "domains are the sources of the data or a column", "give data.sources, or `domain` and a table")
        table = read_table(data)
        names = [str(v) for v in column(data.path, table, self.knobs.domain)[: data.limit]]
        usual = next((n for n in ("text", "messages", "input_ids") if n in table[0]), "text")
        values = column(data.path, table, data.column or usual)[: data.limit]
        texts: dict[str, list[Any]] = {n: [] for n in sorted(set(names))}
        for n, v in zip(names, values, strict=True):
            texts[n].append(v)
        parts: dict[str, TokenRows] = {n: tokenize(t, tokenizer, vocab, context) for n, t in texts.items()}
        return parts, {n: float(len(p)) for n, p in parts.items()}

    def prepare(self, rows: TokenRows) -> TokenRows:
        if not isinstance(rows, Domains):
            raise UserError("dynamic_batch: the rows have no domains", "another method made them", "leave the other method out")
        self.domains = rows
        self.held = self.held or rows.held
        if missing := [n for n in rows.parts if not len(self.held.get(n, ()))]:
            raise UserError(
                f"the domain '{missing[0]}' has no held-out row",
                f"there are held-out texts for {', '.join(self.held) or 'none'}",
                "give a holdout share, or evals with one text for each domain, named like it",
            )
        return rows

    # ---- drawing
    def objective(self, model: Any, tokenizer: Any, train: Train, seed: int) -> Any:
        if objective_class(model) is not NextToken:
            raise UserError(f"dynamic_batch: {type(model).__name__} predicts no next tokens", "rows are drawn for causal language models")
        made = Drawn(model, tokenizer, seed, train.mask_share)
        made.owner, self.made, self.train, self.seed = self, made, train, seed
        return made

    def drawn(self, n: int, step: int) -> list[dict[str, Any]]:
        """The rows of the next pass of this process in an optimizer step."""
        if self._plan[0] != step:
            self._plan = step, self._draw(step), 0
        _, plan, given = self._plan
        first = given * n * dist.world() + dist.rank() * n
        self._plan = step, plan, given + 1
        return [self.domains.row(name, i) for name, i in plan[first : first + n]]

    def _draw(self, step: int) -> list[tuple[str, int]]:
        """Domain and row of every place in a step, over all passes and processes."""
        names, n = list(self.weights), self.train.batch * self.train.accumulate * dist.world()
        picks = np.random.default_rng((self.seed, 1, step)).choice(len(names), n, p=np.array(list(self.weights.values())))
        found = []
        for k in picks.tolist():
            at, size = self.taken[names[k]], len(self.domains.parts[names[k]])
            order = np.random.default_rng((self.seed, 2, k, at // size)).permutation(size)
            found.append((names[k], int(order[at % size])))
            self.taken[names[k]] = at + 1
        return found

    # ---- the mix
    def attach(self, model: Any, anatomy: Anatomy) -> Any:
        self.model = model
        return model

    def before_batch(self, batch: dict[str, Tensor]) -> None:
        if not self.begun:
            self.begun = self.losses = self.measure()
            self.references = self.references or dict(self.begun)

    def measure(self) -> dict[str, float]:
        """Held-out loss of each domain, in nats per token."""
        with torch.random.fork_rng(devices=[]):
            return {n: evaluate_rows(self.model, self.held[n], self.train.batch, self.made)["loss"] for n in self.weights}

    def after_step(self, named: Named) -> None:
        self.step += 1
        if self.step % self.knobs.every == 0 or self.step == self.steps:
            self.losses = self.measure()
        if self.step % self.knobs.every == 0:
            self.weights = updated(self.weights, self.losses, self.references, self.knobs.clip, self.knobs.smoothing)

    def facts(self) -> dict[str, Any]:
        each = {
            n: {
                "reference": round(self.references.get(n, 0.0), 4),
                "loss": [round(self.begun.get(n, 0.0), 4), round(self.losses.get(n, 0.0), 4)],
                "weight": [round(self.first[n], 4), round(w, 4)],
                "rows drawn": self.taken[n],
                "passes": round(self.taken[n] / len(self.domains.parts[n]), 2),
            }
            for n, w in self.weights.items()
        }
        worst = max((self.losses[n] - self.references[n] for n in self.losses), default=0.0)
        return {"domains": each, "largest distance from a reference": round(worst, 4)}

    def state_dict(self) -> dict[str, Any]:
        names = ("step", "weights", "taken", "references", "begun", "losses")
        return {n: getattr(self, n) for n in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for n, value in state.items():
            setattr(self, n, value)


METHOD = DynamicBatch
