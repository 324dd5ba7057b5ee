"""Dense to mixture of experts by splitting the feed-forward part: the same parameters, fewer of them per token.

When to use it: you want cheaper inference from a dense model, without training. It works best where few neurons fire on a token
(ReLU); for SwiGLU expect a clear loss, which training afterwards (tune.full, tune.balance) takes back in part.

Paper: MoEfication (arXiv 2110.01786), code thunlp/MoEfication. Every way to split keeps sum_e W_down[:, S_e] h[S_e] = W_down h, so
with all experts on the function is unchanged; every loss comes from the experts that are left out. Chosen experts have
coefficient 1. Splits: reshape/experts/split.py. Routers: reshape/experts/select.py.

torch's grouped products want widths in whole 16 bytes, so experts get zero neurons up to a multiple of 8; act(0) * 0 = 0.

What a stock class holds (measured): Granite-MoE takes the top k of the logits and then the softmax, so nearly equal logits give
each expert 1 / k; the rows of the router are scaled down (1e-8) and down_proj is scaled by k. With shared experts: Granite-MoE-shared.
Qwen2 and Qwen3 take the softmax before the top k; there rows are scaled by 1e-3 and coefficients are 1 up to about 1e-3.
A router of such rows does not survive a training step: set router_norm=1 where training follows.
No stock class has an MLP router, a bias per expert (compensation by mean activations) or experts without a gate.

Official code, where it differs: see split.py and select.py; it masks neurons in the dense layer, so nothing is saved, and
takes a whole checkpoint per layer. k_means_constrained is replaced by an exact assignment (moe/partition.py).
Ours: gated layers, shared experts, routers that stock classes hold, one block in memory at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.classes import config_of
from modelwright.core.model.writer import Blueprint
from modelwright.moe.partition import even_sizes
from modelwright.reshape.experts.select import captured, centres, least_squares, masses, train_mlp
from modelwright.reshape.experts.split import split_cmoe, split_coactivation, split_kmeans, split_random, split_shared
from modelwright.reshape.experts.stock import Target, choose
from modelwright.reshape.experts.walk import Step, calibration_ids, walk


@dataclass(frozen=True)
class Knobs:
    experts: int = knob(16, "experts per layer that a router chooses from", low=2)
    top_k: int = knob(4, "experts per token", low=1)
    shared: int = knob(0, "experts' worth of neurons that are always on", low=0)
    split: Literal["kmeans", "random", "coactivation", "cmoe"] = knob("kmeans", "which neurons make an expert")
    features: Literal["gate", "up", "both"] = knob("gate", "kmeans: rows that are clustered")
    router: Literal["similarity", "linear", "ridge", "mlp", "oracle"] = knob(
        "similarity", "what chooses; linear: distilled from the paper's MLP; mlp and oracle only in the report"
    )
    router_norm: float | None = knob(
        None, "largest norm of a router row; empty: so small that chosen experts weigh 1 / k each; 1 where training follows", low=0
    )
    data: Data = knob(Data(), "calibration text; needed by coactivation, cmoe, linear and ridge")
    tokens: int = knob(16384, "calibration tokens, at most", low=2)
    context: int = knob(256, "tokens per calibration row", low=2)
    target: Literal["auto", "granitemoe", "granitemoeshared", "qwen2_moe", "qwen3_moe", "mixtral"] = knob(
        "auto", "stock class of the result"
    )


_ALIGN = 8
_ORDER = ("granitemoe", "granitemoeshared", "qwen2_moe", "qwen3_moe", "mixtral")  # the exact ones first


def moefy(source: Checkpoint, knobs: Knobs, seed: int = 0) -> tuple[Blueprint, str]:
    """The split checkpoint as a blueprint, and what it promises: 'same function' when all experts are on."""
    target, size = _plan(source, knobs)
    ids = None
    if knobs.data.path:
        ids = calibration_ids(source, knobs.data, knobs.tokens, knobs.context)
    anatomy = Anatomy(source.skeleton)
    facts: dict[str, Any] = {"target": target.model_type, "split": knobs.split, "router": knobs.router, "neurons per expert": size}
    facts |= {"zero neurons per expert": _aligned(size) - size} if size % _ALIGN else {}
    facts |= {} if ids is None else {"calibration tokens": ids.numel()}
    found: list[dict[str, float]] = []

    def stream() -> Iterator[Any]:
        found.clear()
        for part in anatomy:
            if not part.role.startswith("ffn."):
                yield from _dense_part(source, part)
        for step in walk(source, ids):
            dtype = source.dtype(anatomy.ffn(step.block).down.name)
            yield from _layer(step, target, knobs, size, seed, dtype, found)
        for name in found[0] if found else ():
            facts[name] = round(sum(row[name] for row in found) / len(found), 4)

    blueprint = Blueprint(
        target.config.to_dict() | {"architectures": target.config.architectures},
        _dtypes(source, anatomy, target, knobs),
        stream,
        source,
        facts,
    )
    same = knobs.top_k == knobs.experts and knobs.router_norm is None
    return blueprint, "same function" if same else "changed function"


# ---- plan ------------------------------------------------------------------------------------------------------------
def _plan(source: Checkpoint, knobs: Knobs) -> tuple[Target, int]:
    """The stock class, its config set to the size of an expert, and that size. Raises UserError for all that cannot work."""
    if knobs.top_k > knobs.experts:
        raise UserError(f"top_k={knobs.top_k} but there are {knobs.experts} experts", how="lower top_k or raise experts")
    if knobs.router in ("mlp", "oracle"):
        why = "its router is not linear" if knobs.router == "mlp" else "it needs the activations of the whole layer"
        raise UserError(f"no stock class holds router={knobs.router}", why, "set router=linear, which is distilled from the MLP")
    needs = [
        w for w in (f"split={knobs.split}", f"router={knobs.router}") if w.split("=")[1] in ("coactivation", "cmoe", "linear", "ridge")
    ]
    if needs and not knobs.data.path:
        raise UserError(f"{' and '.join(needs)} needs calibration text", "it looks at what neurons do", "give --data FILE")
    anatomy = Anatomy(source.skeleton)
    target = _choose(source, anatomy, knobs)
    neurons = int(source.hf_config.intermediate_size)
    size = even_sizes(neurons, knobs.experts + knobs.shared)[0]
    return _resized(target, knobs, size), size


def _choose(source: Checkpoint, anatomy: Anatomy, knobs: Knobs) -> Target:
    choose(source, anatomy, knobs.experts, knobs.top_k)  # says why where nothing fits
    if knobs.target != "auto":
        if knobs.shared and knobs.target not in ("granitemoeshared", "qwen2_moe"):
            raise UserError(f"target={knobs.target} has no shared expert", how="set shared=0, or leave target at auto")
        return choose(source, anatomy, knobs.experts, knobs.top_k, knobs.target)
    for kind in _ORDER:
        if knobs.shared and kind not in ("granitemoeshared", "qwen2_moe") or not knobs.shared and kind == "granitemoeshared":
            continue
        try:
            return choose(source, anatomy, knobs.experts, knobs.top_k, kind)
        except UserError:
            continue
    raise UserError(
        "no stock class holds shared experts beside this model's attention",
        "only Granite-MoE-shared and Qwen2-MoE have them",
        "set shared=0",
    )


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _resized(target: Target, knobs: Knobs, size: int) -> Target:
    fields, padded = target.config.to_dict(), _aligned(size)
    shared = target.shared
    if target.model_type.startswith("qwen"):
        fields["moe_intermediate_size"] = padded
        if target.model_type == "qwen2_moe":
            shared = knobs.shared * size or min(target.shared, padded, int(fields["hidden_size"]))
            fields["shared_expert_intermediate_size"] = shared
    else:
        fields["intermediate_size"] = padded
        if target.model_type == "granitemoeshared":
            shared = fields["shared_intermediate_size"] = knobs.shared * size
    return replace(target, config=config_of(fields), shared=shared)


# ---- one layer -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def strengths(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, act: Any) -> Tensor:
    """|h_i| * |W_down[:, i]| of each neuron on each token: x (n, d) -> (n, F)."""
    return ((act(x @ gate.T) * (x @ up.T)).abs_()).mul_(down.norm(dim=0))


def _layer(
    step: Step, target: Target, knobs: Knobs, size: int, seed: int, dtype: torch.dtype, found: list[dict[str, float]]
) -> Iterator[Any]:
    """Stream pieces of one layer: experts, router, shared expert. Appends what was measured to `found`."""
    from transformers.activations import ACT2FN

    strength = None
    if step.ffn_input is not None:
        strength = strengths(step.ffn_input, step.gate, step.up, step.down, ACT2FN[target.config.hidden_act])
    labels = split(step, strength, knobs, size, seed)
    rows = _router(step, strength, labels, knobs, seed, found)
    rows = _scaled(rows, target, knobs, dtype)
    yield target.names(step.block.path, knobs.experts)[0], rows.to(dtype)
    for e in range(knobs.experts):
        own, pad = labels == e, (0, 0, 0, _aligned(size) - size)
        gate, up, down = step.gate[own], step.up[own], step.down[:, own].T * knobs.top_k  # (neurons, d) each
        gate, up, down = (torch.nn.functional.pad(m, pad).to(dtype) for m in (gate, up, down))
        yield from target.pieces(step.block.path, e, gate, up, down.T)
    yield from _shared(step, target, labels, dtype)


def split(step: Step, strength: Tensor | None, knobs: Knobs, size: int, seed: int) -> Tensor:
    """The expert of each neuron (F,), -1 for those that are always on."""
    e, layer = knobs.experts, step.block.index
    if knobs.split == "cmoe":
        assert strength is not None
        return split_cmoe(strength, e, knobs.shared, size)
    labels = torch.full((len(step.gate),), -1)
    routed = torch.ones(len(labels), dtype=torch.bool)
    if knobs.shared:
        routed[split_shared(strength, step.gate, knobs.shared, size)] = False
    if knobs.split == "random":
        labels[routed] = split_random(int(routed.sum()), e, seed, layer)
    elif knobs.split == "kmeans":
        labels[routed] = split_kmeans(step.gate[routed], step.up[routed], e, knobs.features, seed)
    else:
        assert strength is not None
        labels[routed] = split_coactivation(strength[:, routed], e, seed)
    return labels


def _router(step: Step, strength: Tensor | None, labels: Tensor, knobs: Knobs, seed: int, found: list[dict[str, float]]) -> Tensor:
    """Router rows (E, d); measures on the last tenth of the text what share of the mass each way to choose captures."""
    start = centres(step.gate, labels, knobs.experts)
    if knobs.router == "similarity":
        start = torch.nn.functional.normalize(start, dim=1)
    if strength is None or step.ffn_input is None:
        return start
    x, mass = step.ffn_input, masses(strength, labels, knobs.experts)
    held = slice(len(x) - max(1, len(x) // 10), None)
    fitted, k = slice(0, max(1, len(x) - max(1, len(x) // 10))), knobs.top_k
    rows, row = start, {"captured mass, oracle": captured(mass[held], mass[held], k)}
    if knobs.router == "linear":
        with torch.enable_grad():
            mlp = train_mlp(x, mass, start, k, seed=seed, layer=step.block.index)
        rows = least_squares(x[fitted], mlp(x[fitted]))
        row["captured mass, mlp"] = captured(mlp(x[held]), mass[held], k)
    elif knobs.router == "ridge":
        rows = least_squares(x[fitted], mass[fitted])
    row[f"captured mass, {knobs.router}"] = captured(x[held].float() @ rows.T, mass[held], k)
    row["captured mass, random choice"] = k / knobs.experts
    found.append(row)
    return rows


def _scaled(rows: Tensor, target: Target, knobs: Knobs, dtype: torch.dtype) -> Tensor:
    """The rows at the scale that the stock class needs. Only their ratios decide which experts are chosen."""
    rows = rows / rows.norm(dim=1).max().clamp(min=1e-30)
    if knobs.router_norm is not None:
        return rows * knobs.router_norm
    if target.model_type.startswith("granite"):
        return rows * (1e-3 if dtype == torch.float16 else 1e-8)  # fp16 has no smaller numbers of full precision
    return rows * (0.0 if knobs.top_k == knobs.experts else 1e-3)


def _shared(step: Step, target: Target, labels: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    if not target.shared:
        return
    own, at = labels == -1, f"{step.block.path}"
    gate, up, down = step.gate[own], step.up[own], step.down[:, own]
    if target.model_type == "granitemoeshared":
        yield f"{at}.shared_mlp.input_linear.weight", torch.cat([gate, up]).to(dtype)
        yield f"{at}.shared_mlp.output_linear.weight", down.to(dtype)
        return
    if not own.any():  # the class wants one: it is silent
        gate, up, down = step.gate[: target.shared], step.up[: target.shared], torch.zeros_like(step.down[:, : target.shared])
    at += f".{target.moe}.shared_expert"
    for name, tensor in (("gate_proj", gate), ("up_proj", up), ("down_proj", 2 * down)):  # the gate of the class is 1 / 2
        yield f"{at}.{name}.weight", tensor.to(dtype)
    yield f"{at}_gate.weight", torch.zeros(1, step.gate.shape[1], dtype=dtype)


# ---- everything else -------------------------------------------------------------------------------------------------
def _dense_part(source: Checkpoint, part: Any) -> Iterator[tuple[str, Tensor]]:
    tensor = source.get(part.name)
    if part.role == "attn.qkv":
        for piece, slices in part.rows.items():
            yield part.name.replace("qkv_proj", f"{piece}_proj"), torch.cat([tensor[s] for s in slices])
    else:
        yield part.name, tensor


def _dtypes(source: Checkpoint, anatomy: Anatomy, target: Target, knobs: Knobs) -> dict[str, torch.dtype]:
    found: dict[str, torch.dtype] = {}
    for part in anatomy:
        if part.role == "attn.qkv":
            found |= {part.name.replace("qkv_proj", f"{p}_proj"): source.dtype(part.name) for p in part.rows}
        elif not part.role.startswith("ffn."):
            found[part.name] = source.dtype(part.name)
    for b in anatomy.blocks:
        dtype = source.dtype(anatomy.ffn(b).down.name)
        found |= dict.fromkeys(target.names(b.path, knobs.experts), dtype)
        if target.model_type == "granitemoeshared" and target.shared:
            found |= dict.fromkeys([f"{b.path}.shared_mlp.{n}_linear.weight" for n in ("input", "output")], dtype)
        elif target.shared:
            at = f"{b.path}.{target.moe}.shared_expert"
            found |= dict.fromkeys([f"{at}.gate_proj.weight", f"{at}.up_proj.weight", f"{at}.down_proj.weight", f"{at}_gate.weight"], dtype)
    return found


METHOD = moefy
