"""Learning tables in any order of their columns, and writing rows that are valid whatever the model has learnt."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelwright.core.train.objective import NextToken
from modelwright.modalities.tabular.columns import DONE, MISSING, Field
from modelwright.modalities.tabular.language import END, Language


class AnyOrder(NextToken):
    """Next token of table rows, the columns in a new order each time a row is read (by the seed, the step and the row alone)."""

    name = "table rows in any order"

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().collate(rows)
        n = batch["input_ids"].shape[1]
        beyond = torch.full((n,), -1)
        batch["cells"] = torch.stack([torch.cat([r.get("cells", beyond), beyond])[:n] for r in rows])
        self.prepare(batch, 0)
        return batch

    def prepare(self, batch: dict[str, Tensor], step: int) -> None:
        cells = batch["cells"]
        n = cells.shape[1]
        place = torch.arange(n)
        orders = []
        for example, row in zip(batch["example_id"].tolist(), cells.cpu(), strict=True):
            count = int(row.max()) + 1
            rank = torch.from_numpy(np.random.default_rng((self.seed, step, example + 1)).permutation(count))
            key = torch.full((n,), n) if not count else torch.where(row < 0, n, rank[row.clamp(min=0)])
            orders.append((key * n + place).argsort())
        order = torch.stack(orders).to(cells.device)
        for name in ("input_ids", "labels", "cells"):
            batch[name] = batch[name].gather(1, order)


class _Row:
    """A row that is being written: ids that are given, then fields that are open."""

    def __init__(self, language: Language, known: dict[str, Any], fields: list[Field], order: np.ndarray, gaps: bool):
        self.language, self.gaps = language, gaps
        self.values = dict(known)
        given = [fields[k] for k in order if fields[k].name in known]
        self.forced = [i for f in given for i in language.cell(f, known[f.name])]
        self.open = [fields[k] for k in order if fields[k].name not in known]
        self.current: Field | None = None
        self.begun: tuple[str, ...] = ()
        self.logp = self.mass = 0.0
        self._next()

    def _next(self) -> None:
        self.current = self.open.pop(0) if self.open else None
        self.begun = ()
        if self.current is not None:
            self.forced += self.language.name(self.current)

    def choices(self) -> tuple[str, ...]:
        """Symbols that may follow; END where the value may end and also go on."""
        assert self.current is not None
        if self.begun == (MISSING,):
            return (END,)
        found = [END if s == DONE else s for s in self.current.options(self.begun)]
        return (*found, *([MISSING] if self.gaps and self.current.gaps and not self.begun else []))

    def take(self, symbol: str) -> None:
        """Go on by one symbol, and to the next field where the value is whole."""
        assert self.current is not None
        if symbol != END:
            self.begun = (*self.begun, symbol)
        missing = self.begun == (MISSING,)
        text = self.language.tokenizer is not None
        whole = symbol == END or (not text and (missing or not self.language.ends(self.current, self.begun)))
        if whole:
            self.values[self.current.name] = None if missing else self.current.read(self.begun)
            self._next()


@torch.no_grad()
def write(
    model: Any,
    language: Language,
    fields: list[Field],
    known: list[dict[str, Any]],
    *,
    temperature: float = 0.7,
    seed: int = 0,
    batch: int = 256,
    gaps: bool = False,
) -> tuple[list[dict[str, Any]], Tensor]:
    """Fill up rows of which some columns are known; also how likely each would have stayed valid without the grammar, (n,).

    The mean of the latter estimates without bias the share of valid rows of free decoding: rows come from q = p / (product of the
    allowed masses), so E_q[product] is the sum of p over the valid rows. Temperature 0 takes the likeliest symbol. `gaps` lets the
    model write missing values. Rows of one length are written together.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = [_Row(language, k, fields, rng.permutation(len(fields)), gaps) for k in known]
    training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].forced))
    for at in range(0, len(order), batch):
        _together(model, [rows[i] for i in order[at : at + batch]], temperature, generator)
    model.train(training)
    return [{f.name: r.values[f.name] for f in fields} for r in rows], torch.tensor([r.mass for r in rows]).exp()


def _together(model: Any, rows: list[_Row], temperature: float, generator: torch.Generator) -> None:
    """One token a row and pass, given or drawn: no row is ever padded, and the cache grows by one for all."""
    cache = None
    first = min(len(r.forced) for r in rows)
    ids = torch.tensor([[r.forced.pop(0) for _ in range(first)] for r in rows])
    while True:
        if all(r.current is None for r in rows):  # what is left to be given need not be read
            return
        out = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        ids = torch.zeros(len(rows), 1, dtype=torch.long)
        drawing = []
        for i, r in enumerate(rows):
            if r.forced:
                ids[i] = r.forced.pop(0)
            elif r.current is not None:
                drawing.append(i)
        if drawing:
            drawn = _draw(out.logits[drawing, -1].float().cpu(), [rows[i] for i in drawing], temperature, generator)
            ids[drawing, 0] = drawn


def _draw(logits: Tensor, rows: list[_Row], temperature: float, generator: torch.Generator) -> Tensor:
    """A symbol for each row among those that its grammar allows; logits (n, V)."""
    choices = [r.choices() for r in rows]
    most = max(map(len, choices))
    ids = torch.tensor([[r.language.ids[s] for s in c] + [0] * (most - len(c)) for r, c in zip(rows, choices, strict=True)])
    real = torch.arange(most) < torch.tensor([len(c) for c in choices])[:, None]
    scores = logits.gather(1, ids).masked_fill(~real, float("-inf"))
    scale = temperature or 1.0
    mass = (scores / scale).logsumexp(1) - (logits / scale).logsumexp(1)
    logp = scores.log_softmax(1)
    if temperature:
        taken = torch.multinomial((scores / temperature).softmax(1), 1, generator=generator)[:, 0]
    else:
        taken = scores.argmax(1)
    for i, (r, c) in enumerate(zip(rows, choices, strict=True)):
        r.logp += float(logp[i, taken[i]])
        r.mass += float(mass[i])
        r.take(c[int(taken[i])])
    return ids.gather(1, taken[:, None])[:, 0]


def log_probability(model: Any, language: Language, f: Field, known: dict[str, Any], fields: list[Field], value: Any) -> float:
    """log p(value of one column | known columns) under the grammar, the known columns in their own order."""
    given = [i for g in fields if g.name in known for i in language.cell(g, known[g.name])]
    row = _Row(language, {}, [f], np.arange(1), gaps=False)
    prompt, total = given + row.forced, 0.0
    row.forced = []
    ids = language.value(f, value)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0].float()
    for k, token in enumerate(ids):
        choices = row.choices()
        allowed = [language.ids[s] for s in choices]
        total += float(logits[len(prompt) - 1 + k, allowed].log_softmax(0)[allowed.index(token)])
        row.take(choices[allowed.index(token)])
    return total
