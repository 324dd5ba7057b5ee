"""Look into the experts of a mixture: do they differ, is the router sane, and what to do about it.

When to use it: after upcycling, splitting or training a mixture, before you prune it or pay for more training.

Paper: "A Closer Look into Mixture-of-Experts in Large Language Models" (arXiv 2406.18219), code kamanphoebe/Look-into-MoEs.
- Weights, from the files, one layer at a time: cosines of the experts' matrices (S1) and mean neurons (S2), the same after
  the neurons are matched one to one (S3), the regression of S2 on the router's rows (S4), principal components (S5).
  See inspect/mixture/weights.py.
- Outputs, on a text: all experts are applied to each layer's true input. Angular similarity of the outputs (D1), rank of
  the output's norm against rank of the score (D2), size of the gate's activation (D3), chosen experts (D4).
  See inspect/mixture/outputs.py.
- Routing: how differently domains are routed, as a Jensen-Shannon divergence in bits, from your texts or from recorded counts.

The official code is one notebook per model, with copies of the modelling code, experts in a list, and double loops over
pairs and tokens. It averages r2 after rounding each layer's to two decimals: `r2_rounded` is that number. It drops outliers
by DBSCAN before it draws neurons; we draw experts only.
Ours: any stock mixture, fused or not; the shared expert and a dense model as further members; "neuron" matching of all three
matrices together; a permuted copy is found; advice with its evidence.
"""

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch

from modelwright.core.data.make import tokenize
from modelwright.core.data.read import read
from modelwright.core.data.rows import Rows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, knob
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.step import EvalResult, StepContext
from modelwright.inspect.mixture import pages
from modelwright.inspect.mixture.advice import Advice, advise, mean_pair
from modelwright.inspect.mixture.layers import KINDS, MixtureLayer, mixture_layers
from modelwright.inspect.mixture.outputs import LayerOutputs, look
from modelwright.inspect.mixture.routing import read_counts, routing_metrics
from modelwright.inspect.mixture.weights import Match, WeightSimilarity, compare, reordered
from modelwright.moe.load import divergence
from modelwright.moe.watch import domain_plot


@dataclass(frozen=True)
class Knobs:
    data: Data = knob(Data(), "text to run the experts on; empty: weights only")
    tokens: int = knob(4096, "tokens of the text to use, at most", low=2)
    context: int = knob(512, "tokens per row, at most", low=2)
    batch: int = knob(4, "rows per forward pass", low=1)
    domains: dict[str, str] = knob({}, "texts by kind, to see how differently they are routed", path=True)
    dense: str | None = knob(None, "dense checkpoint to compare the experts with, such as their origin", path=True)
    reorder: Literal["auto", "all", "none"] = knob("auto", "match neurons of pairs of experts; auto: up to 1024 neurons, in 8 layers")
    pairs: int = knob(28, "reorder: pairs of experts per layer; 0: all", low=0)
    routing: str | None = knob(None, "recorded routing counts: csv, or a folder with expert_counts.csv", path=True)


def experts(knobs: Knobs, job: StepContext) -> EvalResult:
    """Measure, draw and advise. Raises UserError where there is nothing to measure or the model is no mixture."""
    if knobs.routing:
        return _recorded(Path(knobs.routing))
    if job.source is None:
        raise UserError("nothing to inspect was given", how="give --base MODEL, or --routing FILE")
    layers = mixture_layers(job.source, Checkpoint(knobs.dense) if knobs.dense else None)
    # everything that can be refused is refused before anything is measured
    rows = _rows(knobs, knobs.data, job.source) if knobs.data.path else None
    domains = {name: _rows(knobs, Data(path=p), job.source) for name, p in knobs.domains.items()}
    if len(domains) == 1:
        raise UserError("domains has one text only", "a divergence is between domains", "give at least two, or give it as data")
    weights, matches = _weights(knobs, job, layers)
    outputs, loads, words = _outputs(knobs, job, layers, rows, domains)
    top_k = int(getattr(job.source.hf_config.get_text_config(), "num_experts_per_tok", 0) or 1)
    advice = [a for x in layers for a in advise(x.index, weights[x.index], matches.get(x.index, {}), outputs.get(x.index), top_k)]
    return _finding(weights, matches, outputs, loads, words, advice)


def _rows(knobs: Knobs, data: Data, source: Checkpoint) -> Rows:
    config = source.hf_config.get_text_config()
    context = min(knobs.context, int(getattr(config, "max_position_embeddings", None) or knobs.context), knobs.tokens)
    rows = tokenize(read(data), source.tokenizer(), int(config.vocab_size), context)
    return rows.split(max(1, knobs.tokens // context))[0]


def _weights(
    knobs: Knobs, job: StepContext, layers: list[MixtureLayer]
) -> tuple[dict[int, WeightSimilarity], dict[int, dict[str, list[Match]]]]:
    found, matches = {}, {}
    matched = {x.index for x in _matched(knobs, layers)}
    with job.progress.task("inspect.experts: weights", len(layers)) as tick:
        for layer in layers:
            found[layer.index] = compare(layer)
            if layer.index in matched and layer.experts > 1:
                pairs = list(combinations(range(layer.experts), 2))
                matches[layer.index] = reordered(
                    layer, pages.spread_out(pairs, knobs.pairs) if knobs.pairs > 1 else pairs[: knobs.pairs or None]
                )
            tick(1)
    return found, matches


def _matched(knobs: Knobs, layers: list[MixtureLayer]) -> list[MixtureLayer]:
    """The layers whose neurons are matched."""
    if knobs.reorder == "none":
        return []
    if knobs.reorder == "all":
        return layers
    narrow = [x for x in layers if x.readers["0", "gate"]().shape[0] <= 1024]
    return [narrow[i] for i in pages.spread_out(list(range(len(narrow))), 8)]


def _outputs(
    knobs: Knobs, job: StepContext, layers: list[MixtureLayer], rows: Rows | None, domains: dict[str, Rows]
) -> tuple[dict[int, LayerOutputs], dict[str, torch.Tensor], list[str]]:
    """D1 to D4 by layer, slots (layers, E) by domain, and the first tokens as words."""
    if rows is None and not domains:
        return {}, {}, []
    model = job.source.model(torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[int, LayerOutputs] = {}
    words: list[str] = []
    if rows is not None:
        with job.progress.task("inspect.experts: outputs", rows.tokens) as tick:
            seen = look(model, rows, knobs.batch, tick=tick)
        found = {layer.index: o for layer, o in zip(layers, seen, strict=True)}
        if tokenizer := job.source.tokenizer():
            words = [tokenizer.decode([i]) for i in rows.ids[0].tolist()]
    loads = {}
    for name, text in domains.items():
        with job.progress.task(f"inspect.experts: {name}", text.tokens) as tick:
            loads[name] = torch.stack([o.load for o in look(model, text, knobs.batch, tick=tick)])
    return found, loads, words


def _finding(
    weights: dict[int, WeightSimilarity],
    matches: dict[int, dict[str, list[Match]]],
    outputs: dict[int, LayerOutputs],
    loads: dict[str, torch.Tensor],
    words: list[str],
    advice: list[Advice],
) -> EvalResult:
    metrics: dict[str, Any] = {
        "layers": {str(i): _layer_metrics(w, matches.get(i, {}), outputs.get(i)) for i, w in weights.items()},
        "r2": _mean_r2(weights, None),
        "r2_rounded": _mean_r2(weights, 2),
        "advice": [a.plain() for a in advice],
    }
    tables, plots = [pages.advice_table(advice), pages.weight_table(weights)], pages.weight_plots(weights)
    members = {m for w in weights.values() for m in w.members}
    for member, name in (("shared", "the shared expert"), ("dense", "the dense model")):
        if member in members:
            tables.append(pages.member_table(weights, member, name))
    if matches:
        tables.append(pages.reorder_table(matches))
    if outputs:
        tables.append(pages.output_table(outputs))
        plots += pages.output_plots(outputs, words)
        metrics["tokens"] = next(iter(outputs.values())).tokens
    if loads:
        bits = divergence(torch.stack(list(loads.values())))
        metrics["domains"] = {"divergence_bits": float(bits.mean()), "layers": [float(b) for b in bits], "tokens": _tokens(loads)}
        plots.append(domain_plot(loads))
    alike = mean_pair_over(weights, "gate")
    said = f"{len(weights)} sparse layers; mean cosine of the experts' gate matrices {alike:.3f}; {len(advice)} things to act on."
    tiles = [(f"{alike:.3f}", "mean cosine of the gate matrices", "1: all experts are copies")]
    if outputs:
        angle = sum(mean_pair(o.angle / o.tokens, o.experts) for o in outputs.values()) / len(outputs)
        tiles.append((f"{angle:.3f}", "angular similarity of the outputs", "0.5: at right angles"))
    return EvalResult(metrics, said, tiles, tables, plots)


def _tokens(loads: dict[str, torch.Tensor]) -> dict[str, int]:
    return {n: int(t[0].sum()) for n, t in loads.items()}


def mean_pair_over(weights: dict[int, WeightSimilarity], kind: str) -> float:
    return sum(mean_pair(w.matrix[kind], len(w.pca[kind])) for w in weights.values()) / len(weights)


def _mean_r2(weights: dict[int, WeightSimilarity], digits: int | None) -> dict[str, float | None]:
    """Mean r2 over the layers where it is defined; with `digits`, of rounded values, as the official notebooks do."""
    means: dict[str, float | None] = {}
    for kind in KINDS:
        values = [w.r2[kind] for w in weights.values() if math.isfinite(w.r2[kind])]
        values = values if digits is None else [round(v, digits) for v in values]
        means[kind] = sum(values) / len(values) if values else None
    return means


def _layer_metrics(w: WeightSimilarity, matches: dict[str, list[Match]], o: LayerOutputs | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "members": w.members,
        "matrix": {k: _plain(t) for k, t in w.matrix.items()},
        "neuron": {k: _plain(t) for k, t in w.neuron.items()},
        "router": None if w.router is None else _plain(w.router),
        "r2": {k: None if math.isnan(v) else v for k, v in w.r2.items()},
        "pca": {k: _plain(t) for k, t in w.pca.items()},
    }
    if matches:
        names = ("expert", "other", "before", "cosine", "tau")
        found["reorder"] = {k: [{n: getattr(m, n) for n in names} for m in ms] for k, ms in matches.items()}
    if o is not None:
        found["outputs"] = {
            "members": o.members,
            "angular": _plain(o.angle / o.tokens),
            "cosine": _plain(o.cosine / o.tokens),
            "norm": _plain(o.norm / o.tokens),
            "norm_against_score": o.ranks.tolist(),
            "load": _plain(o.share),
            "effective_experts": o.effective,
            "chosen": o.chosen,
        }
    return found


def _plain(table: torch.Tensor) -> Any:
    """Nested lists, None where a value is not defined."""
    if table.dim() == 0:
        return None if math.isnan(float(table)) else float(table)
    return [_plain(t) for t in table]


def _recorded(path: Path) -> EvalResult:
    """The divergence between domains from recorded counts."""
    counts, domains, absent = read_counts(path)
    metrics = routing_metrics(counts, domains, absent)
    models = metrics["models"]
    rows = [
        [m, *(f"{v:.3f}" for v in (r["divergence_bits"], min(r["layers"]), max(r["layers"]))), str(absent[m])] for m, r in models.items()
    ]
    title = f"How differently {len(domains)} domains are routed, bits (at most {metrics['most_bits']:.2f})"
    tables = [{"title": title, "columns": ["model", "mean", "least layer", "most", "cells without a row, counted as 0"], "rows": rows}]
    series = {m: [[i, b] for i, b in enumerate(r["layers"])] for m, r in models.items()}
    plots = [{"kind": "line", "title": "Divergence of the routing between domains", "x": "layer", "y": "bits", "series": series}]
    words = "; ".join(f"{m} {r['divergence_bits']:.3f}" for m, r in models.items())
    return EvalResult(metrics, f"Mean divergence over the layers in bits: {words}.", tables=tables, plots=plots)


METHOD = experts
