"""Find the neurons and experts that carry a function, prove it by disturbing them, and watch them settle in training.

When to use it: to see which neurons tell one sense, fact or task from another; to decide how to group neurons into experts,
and what to protect when you prune.

Paper: "Emergent Modularity in Pre-trained Transformers" (arXiv 2305.18390), code thunlp/Modularity-Analysis.
- Activation of a neuron on an example: a = max over its tokens of relu(pre-activation), padding excluded.
- Predictivity for a sub-function: max(AP(labels, a), AP(1 - labels, a)). Chance is the larger label's share, and reported.
- Functional experts: those that hold more of the best 1 % of neurons than chance allows at alpha = 0.001, beside random
  partitions of the same sizes. See inspect/functions/groups.py.
- Perturbation: chosen neurons get a shuffle of their own values times 4; the best neurons beside as many random ones in
  each layer.
- Stabilisation over checkpoints: Spearman's correlation of predictivity between one checkpoint and the next, for neurons,
  for means over experts, and for means over random groups.

`published` recomputes the paper's figures from the authors' recorded results. The official code calls scikit-learn once per neuron;
here one sort scores all of them (inspect/functions/precision.py). It reads T5 and Switch only.
Ours: decoder models; gated layers (relu of the gate's pre-activation); any stock mixture, whose neurons stand side by side; the
loss on the function's texts as the measure of perturbation for a decoder; experts of a dense layer by balanced k-means on the
rows of its gate or up matrix, where the paper takes MoEfication's; ties, which the official threshold drops.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.numbers.stats import spearman
from modelwright.core.step import EvalResult, StepContext
from modelwright.inspect.functions import pages
from modelwright.inspect.functions.examples import Site, SubFunction, predict, read_examples, sites
from modelwright.inspect.functions.groups import best_neurons, functional_experts, overlap, random_partitions
from modelwright.inspect.functions.perturb import choose, choose_experts, choose_random, disturbed, loss
from modelwright.inspect.functions.published import published
from modelwright.moe.partition import balanced_kmeans

Scores = dict[int, np.ndarray]  # layer -> predictivity (F,)


@dataclass(frozen=True)
class Knobs:
    published: str | None = knob(None, "folder of the authors' recorded results, to recompute the paper's figures", path=True)
    examples: str | None = knob(None, "labelled examples: a table with text, label (0 or 1), function, level", path=True)
    limit: int = knob(1000, "examples per label of a sub-function, at most", low=1)
    context: int = knob(512, "tokens per example, at most", low=1)
    batch: int = knob(8, "examples per forward pass", low=1)
    experts: int = knob(16, "experts that each dense layer's neurons are grouped into", low=2)
    top: float = knob(0.01, "share of the neurons that count as the best", low=0, high=1)
    alpha: float = knob(0.001, "level of the test for a functional expert", low=1e-12, high=1)
    partitions: int = knob(200, "random partitions beside the experts", low=1)
    disturb: list[float] = knob([0.02, 0.06, 0.12], "perturbation: shares of all neurons; empty: none")
    scale: float = knob(4.0, "perturbation: factor of the shuffled values", low=0)
    draws: int = knob(3, "perturbation: random choices of as many neurons", low=1)
    checkpoints: list[str] = knob([], "stabilisation: earlier checkpoints of the base, in order", path=True)


def modularity(knobs: Knobs, job: StepContext) -> EvalResult:
    """The recorded figures, or a model's own. Raises UserError where neither was given."""
    if knobs.published:
        found = published(Path(knobs.published))
        return EvalResult(found, pages.published_sentence(found), tables=pages.published_tables(found), plots=pages.published_plots(found))
    if job.source is None or not knobs.examples:
        missing = "--examples FILE" if job.source is not None else "--base MODEL and --examples FILE, or --published FOLDER"
        raise UserError("there is nothing to measure", "labelled examples show what a neuron tells apart", f"give {missing}")
    config = job.source.hf_config.get_text_config()
    context = min(
        knobs.context, int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", 0) or knobs.context)
    )
    tokenizer = job.source.tokenizer()
    functions = read_examples(Path(knobs.examples), tokenizer, int(config.vocab_size), context, knobs.limit)
    before = [_like(Checkpoint(c), job.source) for c in knobs.checkpoints]
    model = job.source.model(torch.float32).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    labels = _experts(model, job.source, knobs.experts, job.seed)
    scores = _score(knobs, job, model, functions, "inspect.modularity")
    metrics: dict[str, Any] = {
        "functions": {f.name: _function(f, scores[f.name], labels, knobs, job.seed) for f in functions},
        "levels": _levels(functions, scores, labels, knobs, job.seed),
        "cut": sum(f.cut for f in functions),
        "left_out": sum(f.left for f in functions),
    }
    if knobs.disturb:
        metrics["perturbation"] = _perturb(knobs, job, model, functions, scores, labels)
    del model
    if before:
        metrics["stabilisation"] = _stabilise(knobs, job, before, functions, scores, labels)
    tables, plots = pages.own_tables(metrics), pages.own_plots(metrics)
    return EvalResult(metrics, pages.own_sentence(metrics), pages.own_tiles(metrics), tables, plots)


def _like(other: Checkpoint, source: Checkpoint) -> Checkpoint:
    for name in dict.fromkeys([*source.table, *other.table]):
        if name not in other or name not in source or other.shape(name) != source.shape(name):
            raise UserError(f"{other.folder} does not have the shape of {source.folder}", f"{name} differs", "give checkpoints of one run")
    return other


def _experts(model: Any, source: Checkpoint, experts: int, seed: int) -> dict[int, np.ndarray]:
    """Of each layer the expert of every neuron (F,): the model's own, or balanced k-means on the input rows."""
    anatomy, found = Anatomy(source.skeleton), {}
    for site in sites(model):
        if site.labels is not None:
            found[site.layer] = site.labels.numpy()
            continue
        if experts > site.neurons:
            raise UserError(f"experts={experts} but layer {site.layer} has {site.neurons} neurons", how="lower experts")
        ffn = anatomy.ffn(site.layer, "encoder" if model.config.is_encoder_decoder else "decoder")
        sizes = [site.neurons // experts + (e < site.neurons % experts) for e in range(experts)]
        rows = (ffn.gate or ffn.up).read(source.get)
        found[site.layer] = balanced_kmeans(rows, experts, seed=seed, sizes=sizes)[0].numpy()
    return found


def _score(knobs: Knobs, job: StepContext, model: Any, functions: list[SubFunction], title: str) -> dict[str, Scores]:
    found = {}
    places: list[Site] = sites(model)
    with job.progress.task(title, len(functions)) as tick:
        for f in functions:
            found[f.name] = predict(model, f, places, knobs.batch)
            tick(1)
    return found


def _function(f: SubFunction, scores: Scores, labels: dict[int, np.ndarray], knobs: Knobs, seed: int) -> dict[str, Any]:
    layers = {}
    for layer, s in scores.items():
        best = best_neurons(s, knobs.top)
        found = functional_experts([best], labels[layer], knobs.alpha)
        share, degree = random_partitions([best], labels[layer], knobs.alpha, knobs.partitions, seed)
        layers[str(layer)] = {
            "best": float(s.max()),
            "neurons": best.tolist(),
            "functional": np.flatnonzero(found.functional).tolist(),
            "share": found.share,
            "degree": found.degree,
            "random_share": share,
            "random_degree": degree,
        }
    return {"level": f.level, "examples": len(f.ids), "chance": f.chance, "layers": layers}


def _levels(
    functions: list[SubFunction], scores: dict[str, Scores], labels: dict[int, np.ndarray], knobs: Knobs, seed: int
) -> dict[str, Any]:
    """By level: best AP per layer, pooled functional experts per layer, and overlap with every level."""
    by: dict[str, list[str]] = {}
    for f in functions:
        by.setdefault(f.level, []).append(f.name)
    found: dict[str, Any] = {}
    for level, names in by.items():
        rows = {}
        for layer in scores[names[0]]:
            best = [best_neurons(scores[n][layer], knobs.top) for n in names]
            pooled = functional_experts(best, labels[layer], knobs.alpha)
            share, degree = random_partitions(best, labels[layer], knobs.alpha, knobs.partitions, seed)
            rows[str(layer)] = {
                "best": float(np.mean([scores[n][layer].max() for n in names])),
                "share": pooled.share,
                "degree": pooled.degree,
                "random_share": share,
                "random_degree": degree,
            }
        found[level] = {"layers": rows, "overlap": {other: _overlap(names, theirs, scores) for other, theirs in by.items()}}
    return found


def _overlap(ours: list[str], theirs: list[str], scores: dict[str, Scores]) -> float | None:
    """Mean share of common neurons among the best 32 of two different sub-functions, over layers; None without a pair."""
    names = list(dict.fromkeys([*ours, *theirs]))
    pairs = [
        (i, j)
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j and (a in ours and b in theirs or a in theirs and b in ours)
    ]
    if not pairs:
        return None
    tables = [overlap([scores[n][layer] for n in names], min(32, len(scores[names[0]][layer]))) for layer in scores[names[0]]]
    return float(np.mean([t[i, j] for t in tables for i, j in pairs]))


def _perturb(
    knobs: Knobs, job: StepContext, model: Any, functions: list[SubFunction], scores: dict[str, Scores], labels: dict[int, np.ndarray]
) -> dict[str, Any]:
    """Rise of the loss on each function's texts (label 1), by share: its best neurons, experts, and random neurons."""
    if model.config.is_encoder_decoder or any(s.labels is not None for s in sites(model)) or not _predicts(model):
        return {"left_out": "a rise of the loss is measured for dense language models only"}
    found: dict[str, Any] = {}
    with job.progress.task("inspect.modularity: perturbation", len(functions) * len(knobs.disturb)) as tick:
        for f in functions:
            texts = [ids for ids, y in zip(f.ids, f.labels, strict=True) if y]
            if not any(len(t) > 1 for t in texts):
                raise UserError(
                    f"function '{f.name}' has no text of two tokens with label 1", "the loss has nothing to predict", "set disturb: []"
                )
            base = loss(model, texts, knobs.batch)

            def rise(neurons: Scores, texts: list[list[int]] = texts, base: float = base) -> float:
                with disturbed(model, neurons, knobs.scale, job.seed):
                    return loss(model, texts, knobs.batch) - base

            found[f.name] = {"loss": base, "rise": {}}
            for share in knobs.disturb:
                found[f.name]["rise"][str(share)] = _rises(rise, scores[f.name], labels, share, knobs.draws, job.seed)
                tick(1)
    return found


def _rises(
    rise: Callable[[Any], float], scores: Scores, labels: dict[int, np.ndarray], share: float, draws: int, seed: int
) -> dict[str, float]:
    best, by_expert = choose(scores, share), choose_experts(scores, labels, share)
    found = {"best": rise(best)}
    if any(len(n) for n in by_expert.values()):  # a share smaller than one expert has none
        found["experts"] = rise(by_expert)
    return found | {"random": float(np.mean([rise(choose_random(best, scores, seed + i)) for i in range(draws)]))}


def _predicts(model: Any) -> bool:
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _stabilise(
    knobs: Knobs,
    job: StepContext,
    before: list[Checkpoint],
    functions: list[SubFunction],
    last: dict[str, Scores],
    labels: dict[int, np.ndarray],
) -> dict[str, Any]:
    """By level and interval the mean correlation over sub-functions and layers, for neurons, experts and random groups."""
    rng = np.random.default_rng(job.seed)
    random = {layer: rng.permutation(own) for layer, own in labels.items()}
    all_scores = []
    for c in before:
        model = c.model(torch.float32).eval().to("cuda" if torch.cuda.is_available() else "cpu")
        all_scores.append(_score(knobs, job, model, functions, f"inspect.modularity: {c.folder.name}"))
    all_scores.append(last)
    found: dict[str, dict[str, list[float]]] = {}
    for a, b in zip(all_scores, all_scores[1:], strict=False):
        for level in dict.fromkeys(f.level for f in functions):
            names = [f.name for f in functions if f.level == level]
            for kind, groups in (("neuron", None), ("expert", labels), ("random_partition", random)):
                values = [spearman(_mean(a[n][x], groups, x), _mean(b[n][x], groups, x)) for n in names for x in a[n]]
                found.setdefault(kind, {}).setdefault(level, []).append(float(np.mean(values)))
    return found


def _mean(score: np.ndarray, groups: dict[int, np.ndarray] | None, layer: int) -> np.ndarray:
    """The score itself (F,), or its mean over each group (E,)."""
    return score if groups is None else np.bincount(groups[layer], score) / np.bincount(groups[layer])


METHOD = modularity
