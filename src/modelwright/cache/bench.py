"""What a checkpoint loses when its cache is evicted: every way to evict beside the full cache, on your text and on made tasks.

Each row of the text is read up to `context` tokens, evicted, and its real continuation read on: the negative log-likelihood
in nats per token, how much it rises (with a bootstrap interval over rows, if there are two), and the share of tokens at which
the likeliest one is the full cache's. `tasks` are asked with random token ids (cache/engine/suite.py): passkey, retrieval, copy, and
recall, which only says something with --after. A budget that a method's protected tokens do not fit is left out and named.

Ours; the methods are those of cache.generate. With --after every method fails at small budgets: nothing can choose what a
question needs that is not there yet.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import modelwright.models  # noqa: F401 - our classes become known, and experts of any width run
from modelwright.cache.engine.evict import evict
from modelwright.cache.engine.measure import continued, fits_context
from modelwright.cache.engine.suite import Items, make, solve
from modelwright.cache.evictors.names import METHODS, named
from modelwright.core.data.make import tokenize
from modelwright.core.data.read import read
from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Data, knob
from modelwright.core.numbers.stats import bootstrap_mean, wilson
from modelwright.core.step import EvalResult, StepContext


@dataclass(frozen=True)
class Knobs:
    data: Data = knob(Data(), "text to continue; empty: tasks only")
    methods: list[str] = knob([], "ways to evict, by name; empty: all")
    keep: list[float] = knob([0.5, 0.2, 0.1], "shares of the context that stay")
    context: int = knob(384, "tokens that are read before eviction", low=8)
    continuation: int = knob(128, "tokens that are read on", low=2)
    rows: int = knob(32, "rows of text, and items per task", low=1)
    tasks: list[str] = knob([], "made tasks: recall, passkey, retrieval, copy")
    after: bool = knob(False, "ask the tasks' questions after the eviction")
    settings: dict[str, dict[str, Any]] = knob({}, "settings by method, as in {snapkv: {observe: 16}}")
    batch: int = knob(8, "rows per forward pass", low=1)


def bench(knobs: Knobs, job: StepContext) -> EvalResult:
    """Measure the methods on one checkpoint. Raises UserError where text, tasks or budgets do not fit it."""
    names = knobs.methods or list(METHODS)
    for name in knobs.settings:
        if name not in METHODS:
            raise UserError(f"settings for an unknown way to evict '{name}'", how=did_you_mean(name, METHODS))
        if name not in names:
            raise UserError(f"settings for {name} have no use", "it is not among the methods", "add it there, or leave its settings out")
    arms = [(n, k, named(n, k, None, knobs.settings.get(n), job.seed)) for n in names for k in knobs.keep]
    if not knobs.data.path and not knobs.tasks:
        raise UserError("nothing to measure was given", how="give --data FILE, or --tasks recall")
    model = job.source.model().eval().to("cuda" if torch.cuda.is_available() else "cpu")
    for *_, arm in arms:
        evict(model, arm)  # refuses what does not fit before anything is measured
    for task in knobs.tasks:
        answer = _items(knobs, model, task, 1, job.seed).answers.shape[2]
        fits_context(model, knobs.context + answer, f"context, question and answer of {task}", "lower the context")
    ids = None
    if knobs.data.path:
        fits_context(model, knobs.context + knobs.continuation, "context and continuation", "lower them")
        ids = _ids(knobs, job)
    rows: dict[tuple[str, float], dict[str, Any]] = {("full cache", 1.0): {}}
    left: dict[str, str] = {}
    with job.progress.task("cache.bench", len(arms) + 1) as tick:
        base = None
        for name, keep, method in [("full cache", 1.0, None), *arms]:
            try:
                row, base = _measure(knobs, job, model, ids, method, base)
                rows[name, keep] = row
            except UserError as error:
                if method is None or "protects" not in error.what:
                    raise
                left[f"{name} at {keep:g}"] = str(error)
            tick(1)
    return _finding(knobs, rows, left, 0 if ids is None else len(ids))


def _measure(knobs: Knobs, job: StepContext, model: Any, ids: torch.Tensor | None, method: Any, base: Any) -> tuple[dict[str, Any], Any]:
    row: dict[str, Any] = {}
    if ids is not None:
        found = continued(model, ids, knobs.context, method, knobs.batch)
        base = base or found
        rise = (found.nll - base.nll).mean(1).numpy()
        low, high = (None, None) if len(rise) < 2 else bootstrap_mean(rise, seed=job.seed) if method else (0.0, 0.0)
        row = {
            "nll": float(found.nll.mean()),
            "rise": float(rise.mean()),
            "rise_low": low,
            "rise_high": high,
            "agreement": float((found.choice == base.choice).float().mean()),
            "cache_bytes": found.bytes,
        }
    for task in knobs.tasks:
        items = _items(knobs, model, task, knobs.rows, job.seed)
        row[task] = float(solve(model, items, method, after=knobs.after, batch=knobs.batch).float().mean())
    return row, base


def _items(knobs: Knobs, model: Any, task: str, n: int, seed: int) -> Items:
    vocab = int(model.config.get_text_config().vocab_size)
    return make(task, n, knobs.context, torch.arange(vocab)[-min(vocab - 4, 4096) :], seed)


def _ids(knobs: Knobs, job: StepContext) -> torch.Tensor:
    length = knobs.context + knobs.continuation
    vocab = int(job.source.hf_config.get_text_config().vocab_size)
    found = tokenize(read(knobs.data), job.source.tokenizer(), vocab, length)
    whole = found.ids[found.lengths == length] if found.ids.shape[1] == length else found.ids[:0]
    if not len(whole):
        raise UserError(f"the text has no {length} tokens", "context and continuation do not fit it", "give more text, or lower them")
    return whole[np.linspace(0, len(whole) - 1, min(knobs.rows, len(whole))).astype(int)].long()


def _finding(knobs: Knobs, rows: dict[tuple[str, float], dict[str, Any]], left: dict[str, str], texts: int) -> EvalResult:
    full = rows["full cache", 1.0]
    tables: list[dict[str, Any]] = []
    plots: list[dict[str, Any]] = []
    if knobs.data.path:
        lines = [
            [
                name,
                f"{keep:.0%}",
                f"{r['nll']:.4f}",
                f"{r['rise']:+.4f}",
                f"{r['rise_low']:+.3f} to {r['rise_high']:+.3f}" if r is not full and texts > 1 else "",
                f"{r['agreement']:.1%}",
                f"{r['cache_bytes'] / full['cache_bytes']:.1%}",
            ]
            for (name, keep), r in rows.items()
        ]
        columns = ["cache", "kept", "nats per token", "rise", "95 %", "same choice", "bytes"]
        tables.append({"title": "Real text read on after eviction", "columns": columns, "rows": lines})
        plots.append(_plot(rows, "rise", "Rise of the loss", "nats per token"))
    if knobs.tasks:
        n = knobs.rows
        lines = [
            [name, f"{keep:.0%}"] + [f"{r[t]:.0%} ({wilson(r[t] * n, n)[0]:.0%} to {wilson(r[t] * n, n)[1]:.0%})" for t in knobs.tasks]
            for (name, keep), r in rows.items()
        ]
        when = "after" if knobs.after else "before"
        title = f"Whole answers to questions read {when} eviction (95 %)"
        tables.append({"title": title, "columns": ["cache", "kept", *knobs.tasks], "rows": lines})
        plots += [_plot(rows, t, f"{t}: whole answers", "share") for t in knobs.tasks]
    if left:
        tables.append({"title": "Left out", "columns": ["", ""], "rows": [list(x) for x in left.items()], "prose": True})
    metrics: dict[str, Any] = {"rows": [{"cache": name, "keep": keep, **r} for (name, keep), r in rows.items()], "left_out": left}
    said = [f"{knobs.context} tokens of context, {len(rows) - 1} evicted caches beside the full one."]
    if knobs.data.path:
        metrics["texts"] = texts
        less = f" of the {knobs.rows} that were asked for: the text has no more" if texts < knobs.rows else ""
        said.append(f"The loss is over {texts} row{'s'[: texts > 1]} of text{less}.")
    tiles = []
    if knobs.data.path and len(rows) > 1:
        least = min(k for _, k in rows)
        name, r = min(((n, r) for (n, k), r in rows.items() if k == least), key=lambda x: x[1]["rise"])
        tiles = [(f"{r['rise']:+.3f}", f"nats per token with {least:.0%} of the cache", f"{name}, the best of those measured")]
    return EvalResult(metrics, " ".join(said), tiles, tables, plots)


def _plot(rows: dict[tuple[str, float], dict[str, Any]], key: str, title: str, unit: str) -> dict[str, Any]:
    names = dict.fromkeys(n for n, _ in rows if n != "full cache")
    end = [100.0, rows["full cache", 1.0][key]]
    series = {n: sorted([[100 * k, r[key]] for (m, k), r in rows.items() if m == n] + [end]) for n in names}
    return {"kind": "line", "title": title, "x": "% of the context kept", "y": unit, "series": series}


METHOD = bench
