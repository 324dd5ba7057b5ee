"""TapTap as a class: fit, sample, impute, predict, balance, save and load."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.train.loop import Outcome, fit
from modelwright.core.train.technique import Technique, combine, environment, overrides
from modelwright.modalities.tabular.columns import Category, Columns, Field, columns_of, field, left_out, rows_of
from modelwright.modalities.tabular.decode import AnyOrder, write
from modelwright.modalities.tabular.language import Language

Tick = Callable[[int, int], None]
TRAIN = Train(epochs=60, lr=2e-3, batch=48, schedule="cosine")


class TapTap:
    """A causal language model of the rows of one table.

        model = TapTap().fit(columns, folder)           # columns: name -> list of values, None where one is missing
        rows = model.sample(1000)                        # always valid
        filled = model.impute(columns)

    `source` is a checkpoint whose tokenizer writes the rows as text, or a folder that `save` left; without one a small Llama with a
    vocabulary of the table's own begins untrained. `left` names columns to leave out, with the reason; None: those of `left_out`.
    `techniques` are ways to tune (core/train/technique.py).
    """

    def __init__(self, source: Any = None, train: Train = TRAIN, *, shape: tuple[int, int, int] = (3, 96, 4),
                 left: dict[str, str] | None = None, seed: int = 0, techniques: list[Technique] | None = None):  # fmt: skip
        self.source, self.train, self.shape, self.known_left, self.seed = source, train, shape, left, seed
        self.techniques = techniques or []
        self.left: dict[str, str] = {}

    # ---- learning ------------------------------------------------------------------------------------------------------
    def fit(self, columns: Columns, folder: Path, more: list[Columns] | None = None, tick: Tick = lambda i, n: None) -> "TapTap":
        """Learn the rows; before it those of `more` tables, each table as often as the others. Raises UserError for a table of one
        column, or with rows longer than the model's positions."""
        self.left = left_out(columns) if self.known_left is None else self.known_left
        kept = {n: v for n, v in columns.items() if n not in self.left}
        if len(kept) < 2:
            why = "; ".join(f"{n}: {w}" for n, w in self.left.items()) or "rows of one column hold no relation"
            raise UserError(f"{len(kept)} column can be learnt from" if kept else "no column can be learnt from", why, "give two or more")
        others = [{n: v for n, v in t.items() if n not in left_out(t)} for t in more or []]
        self._speak([kept, *others])
        self.counts = Counter(columns[self.fields[-1].name])
        if others:
            self._learn(self._evenly(others), self.train, folder / "pre-training", tick)
        self.outcome = self._learn([(self.fields, kept)], self.train, folder / "training", tick)
        return self

    def _speak(self, tables: list[Columns]) -> None:
        """The language of the tables, and the model that will speak it."""
        saved = None if self.source is None else self.source.folder / "table.json"
        tokenizer = None if self.source is None else self.source.tokenizer()
        if saved is not None and saved.is_file():
            self.language, self.fields = Language.load(saved, tokenizer)
            if sorted(tables[0]) != sorted(f.name for f in self.fields):
                raise UserError(f"the columns are not those of {saved}", how="give the table that was learnt, or another base")
            self.model = self.source.model(torch.float32)
        elif self.source is not None:
            if tokenizer is None:
                raise UserError("the base has no tokenizer", "rows are written in its words", "give a base with tokenizer files")
            self.language = Language([], tokenizer)
            self.fields = self.language.fields(tables[0])
            self.model = self.source.model(torch.float32)
        else:
            made = [[field(n, v) for n, v in t.items()] for t in tables]
            self.language, self.fields = Language(made), made[0]
            self.model = self._fresh(self.language.rows(list(zip(made, tables, strict=True))).width)

    def _fresh(self, width: int) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        layers, hidden, heads = self.shape
        torch.manual_seed(self.seed)
        sizes: dict[str, Any] = {
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }
        ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return LlamaForCausalLM(LlamaConfig(vocab_size=self.language.size, max_position_embeddings=max(64, width), **sizes, **ends))

    def _evenly(self, tables: list[Columns]) -> list[tuple[list[Field], Columns]]:
        """Each table repeated to the rows of the longest: by rows alone (the official code) large tables are nearly all that is seen."""
        most = max(len(next(iter(t.values()))) for t in tables)
        found = []
        for t in tables:
            rows = rows_of(t)
            found.append((self.language.fields(t), columns_of([rows[i % len(rows)] for i in range(most)], list(t))))
        return found

    def _learn(self, tables: list[tuple[list[Field], Columns]], train: Train, folder: Path, tick: Tick) -> Outcome:
        rows = self.language.rows(tables)
        limit = getattr(self.model.config, "max_position_embeddings", None) or rows.width
        if rows.width > limit:
            how = "leave columns out, or give no base: a fresh model is made as long as the rows"
            raise UserError(f"a row has {rows.width} tokens", f"the model has {limit} positions", how)
        for t in self.techniques:
            if overrides(t, "rows"):
                raise UserError(f"tune={t.name} cannot learn a table", "it makes its own rows", "choose another way to tune")
            train = t.settings(rows, train)
        combine(self.techniques, environment(self.model, train))
        objective = AnyOrder(self.model, None, self.seed)
        out = fit(self.model, rows, replace(train, packing="no"), techniques=self.techniques, evals={}, folder=folder,
                  seed=self.seed, tick=tick, objective=objective)  # fmt: skip
        self.model = out.model
        for t in self.techniques:
            self.model = t.export(self.model, folder)
        shutil.rmtree(folder, ignore_errors=True)
        return out

    # ---- writing -------------------------------------------------------------------------------------------------------
    def sample(self, n: int, given: list[dict[str, Any]] | None = None, *, start: str | None = None, temperature: float = 0.7,
               seed: int = 0, gaps: bool = False) -> Columns:  # fmt: skip
        """n rows. `given` fixes columns of each row; else the column `start` (the last one) is drawn from its shares in the table if it
        is a category. A number is never given: its exact values are those of persons. `valid` then holds the share of rows that would
        have been valid without the grammar."""
        if given is None:
            first = next((f for f in self.fields if f.name == start), self.fields[-1])
            given = [{} for _ in range(n)]
            if isinstance(first, Category) and first.name == self.fields[-1].name:
                kinds = [k for k in self.counts if k is not None]
                share = np.array([self.counts[k] for k in kinds], float)
                drawn = np.random.default_rng(seed).choice(len(kinds), n, p=share / share.sum())
                given = [{first.name: kinds[i]} for i in drawn]
        rows, valid = write(self.model, self.language, self.fields, given, temperature=temperature, seed=seed, gaps=gaps)
        self.valid = float(valid.mean())
        return columns_of(rows, [f.name for f in self.fields])

    def balance(self, column: str, n: int, seed: int = 0) -> Columns:
        """n rows of the rarest value of a column."""
        if column != self.fields[-1].name:
            raise UserError(f"'{column}' was not learnt as the last column", how="put it last")
        rare = min((k for k in self.counts if k is not None), key=self.counts.__getitem__)
        return self.sample(n, [{column: rare}] * n, seed=seed)

    def impute(self, columns: Columns, *, draws: int = 1, temperature: float = 0.0, seed: int = 0) -> Columns:
        """The table with its gaps filled: the likeliest symbols, or the mean and the commonest of several draws. Columns that were left
        out stay as they are; so does a table without gaps."""
        names = [f.name for f in self.fields]
        rows = rows_of({n: columns[n] for n in names})
        holed = [i for i, r in enumerate(rows) if any(v is None for v in r.values())]
        known = [{n: v for n, v in rows[i].items() if v is not None} for i in holed for _ in range(draws)]
        if known:
            written, _ = write(self.model, self.language, self.fields, known, temperature=temperature, seed=seed)
            for k, i in enumerate(holed):
                group = written[k * draws : (k + 1) * draws]
                rows[i] = {n: _middle([g[n] for g in group]) if rows[i][n] is None else rows[i][n] for n in names}
        return columns | columns_of(rows, names)

    def predict(self, columns: Columns, target: str) -> list[Any]:
        """The model's own labels: the likeliest value of a column given the others."""
        return self.impute(columns | {target: [None] * len(next(iter(columns.values())))})[target]

    # ---- on disk -------------------------------------------------------------------------------------------------------
    def save(self, folder: Path) -> None:
        """The model as its stock class loads it, and the language of the table."""
        self.model.save_pretrained(folder)
        if self.language.tokenizer is not None:
            self.language.tokenizer.save_pretrained(folder)
        self.language.save(folder / "table.json", self.fields)


def _middle(values: list[Any]) -> Any:
    if len(values) == 1:
        return values[0]
    if all(type(v) in (int, float) for v in values):
        mean = float(np.mean(values))
        return round(mean) if all(type(v) is int for v in values) else mean
    return Counter(values).most_common(1)[0][0]
