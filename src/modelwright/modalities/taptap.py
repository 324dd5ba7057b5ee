"""Rows of a table written by a language model of rows, for a predictor that you trust: private, few, gappy or unbalanced data.

When to use it: you have one table, a predictor for one of its columns, and one of four troubles.

    privacy        the predictor learns from synthetic rows alone
    low_resource   it learns from the few rows and synthetic ones together
    missing        gaps are filled before it learns
    imbalance      rows of the rarest class are written until the classes are even

Each use measures itself on rows that were held out, beside controls, and writes the rows (rows.csv) and the model.

Paper: Generative Table Pre-training Empowers Models for Tabular Prediction (arXiv 2305.09696); official code ZhangTP1996/TapTap.

    s = "f_1 is v_1, f_2 is v_2, ..."   columns in a new order each time the row is read, digits one by one
    L = -sum log p(s_t | s_<t)          so that p(any column | any others) is learnt
    x ~ p(. | start column),  y = backbone(x)      the backbone was trained on the real rows

The official code learns pad tokens, draws one order of columns for all but the last real column of some tables, hard-wires GPT-2's
token ids, gives rows with unreadable values out as NaN, loses 0.0004 to rounding, splits at commas inside values, and its pre-training and
imputation stop with an error.

Ours: decoding is held to the grammar of the table, so every row is valid, whatever its names and values hold; the share that would have
been valid without it is in the result. Values are spelled without loss. The names of columns are given, not learnt, and the order is drawn
by us. Without a base a small Llama with the table's own vocabulary is trained: one token a category, digits that know their place. With a
base (GPT-2, say) rows are its text. Numbers of the start column are never given: exact values belong to persons. Gaps are filled by the
likeliest symbols or the mean of draws; the paper takes three beams. Pre-training sees each table alike, not each row.

The control that flatters: a backbone's labels make rows of any kind useful, even columns drawn one by one. So both label modes stand
beside the same modes on independent columns, and only the difference is the generator's.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Train, knob
from modelwright.core.step import EvalResult, StepContext


@dataclass(frozen=True)
class Knobs:
    table: str = knob(help="csv, jsonl, json or parquet file", path=True, argument=True)
    use: Literal["privacy", "low_resource", "missing", "imbalance"] = knob("privacy", "which of the four troubles")
    target: str = knob("", "column to predict; empty: the last one")
    names: list[str] = knob([], "names of the columns of a csv without a header")
    ids: bool = knob(False, "keep columns that number or name the rows")
    limit: int | None = knob(None, "use at most this many rows, drawn at random", low=8)
    test: float = knob(0.25, "share of the rows held out to measure on", low=0.05, high=0.9)
    rows: int = knob(0, "rows to write; 0: as many as were learnt from (imbalance: until the classes are even)", low=0)
    temperature: float = knob(0.7, "of sampling; below 1 likely rows are likelier still", low=0)
    share: float = knob(0.2, "missing: share of each column that is hidden; 0: only fill the gaps that are there", low=0, high=0.9)
    mechanism: Literal["mcar", "mar", "mnar"] = knob("mcar", "missing: hidden by chance, by another column, or by the value itself")
    draws: int = knob(1, "missing: draws a gap is filled from; 1: the likeliest symbols", low=1)
    minority: float = knob(0.05, "imbalance: share that the rarest class is cut to before learning", low=0.001, high=0.5)
    backbone: str = knob("HistGradientBoosting", "predictor: RandomForest, MLP ... of scikit-learn, LGBM, or module:Stem")
    settings: dict[str, Any] = knob({}, "settings of the backbone")
    pretrain: list[str] = knob([], "tables to learn from before this one", path=True)
    layers: int = knob(3, "fresh model: blocks", low=1)
    hidden: int = knob(96, "fresh model: width", low=8)
    heads: int = knob(4, "fresh model: attention heads", low=1)
    tune: str = knob("full", "way to tune the model")
    tune_settings: dict[str, Any] = knob({}, "settings of that way")
    train: Train = knob(Train(epochs=60, lr=2e-3, batch=48, schedule="cosine"), "how long and how fast; the paper: GPT-2, lr 5e-5")


def taptap(knobs: Knobs, job: StepContext) -> EvalResult:
    """Learn the table and do one of the four things with it."""
    from modelwright.modalities.tabular import uses
    from modelwright.modalities.tabular.backbone import Backbone, Features, maker, task_of
    from modelwright.modalities.tabular.columns import left_out, read_columns, take
    from modelwright.modalities.tabular.model import TapTap

    columns = read_columns(knobs.table, knobs.names or None)
    target = knobs.target or list(columns)[-1]
    if target not in columns:
        raise UserError(f"{knobs.table} has no column '{target}'", how=did_you_mean(target, columns))
    columns = {n: v for n, v in columns.items() if n != target} | {target: columns[target]}
    rng, total = np.random.default_rng(job.seed), len(columns[target])
    order = rng.permutation(total)[: knobs.limit]
    left = left_out(columns, knobs.ids)
    if target in left:
        raise UserError(f"'{target}' cannot be predicted", left[target], "give target: another column")
    if len(order) < 8:
        raise UserError(f"{knobs.table} has {len(order)} rows", "eight are the least", "give more rows")
    task = task_of(columns[target])
    make = maker(knobs.backbone, task, knobs.settings)
    if knobs.hidden % (2 * knobs.heads):
        raise UserError(f"hidden={knobs.hidden} and heads={knobs.heads} do not fit", "each head needs an even width", "change one")
    at = len(order) - max(2, round(knobs.test * len(order)))
    whole = knobs.use == "missing" and not knobs.share
    learnt, test = take(columns, sorted(order) if whole else order[:at]), take(columns, order[at:])
    backbone = Backbone(make, task, target, Features(learnt, [n for n in columns if n not in {*left, target}]))
    assert job.technique
    model = TapTap(job.source, knobs.train, shape=(knobs.layers, knobs.hidden, knobs.heads), left=left, seed=job.seed,
                   techniques=job.technique(knobs.tune, knobs.tune_settings))  # fmt: skip
    work = uses.Work(knobs, job, model, backbone, learnt, test, target, rng, [read_columns(p) for p in knobs.pretrain])
    result, written = uses.USES[knobs.use](work)
    _write(job.folder / "rows.csv", written)
    model.save(job.folder / "model")
    result.facts |= {
        "rows learnt from": len(learnt[target]),
        "rows held out": 0 if whole else len(test[target]),
        "rows without a target": sum(columns[target][i] is None for i in order),
        "columns left out": "; ".join(f"{n}: {w}" for n, w in model.left.items()) or "none",
        "task": task,
        "backbone": knobs.backbone,
        "tokens a row": round(model.outcome.tokens / max(1, model.outcome.steps) / knobs.train.batch, 1),
        "loss at the end (nats a symbol)": model.outcome.log[-1]["loss"] if model.outcome.log else None,
    }
    return result


def _write(file: Path, columns: dict[str, list[Any]]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(columns)
        writer.writerows(zip(*(["" if v is None else v for v in c] for c in columns.values()), strict=True))


METHOD = taptap
