"""Dense to mixture of experts by copying the feed-forward part E times.

What for: a dense checkpoint and some compute left: the mixture starts from everything the dense model knows and gets
more parameters at the same cost per token times top_k.

Methods and sources
- sparse: Sparse Upcycling (Komatsuzaki et al., 2212.05055). Every expert is the dense FFN, the router is N(0, 0.02).
  With identical experts and renormalised top-k weights the function is unchanged: sum_e g_e f(x) = f(x).
- noise: the "noise upcycling" baseline of the Drop-Upcycling code: N(0, std) is added to a share `ratio` of each expert's neurons.
- drop: Drop-Upcycling (2502.19261). Per expert a random set of ratio * F neurons is drawn again from N(mean, std) of the
  values it replaces, with one index set for gate, up and down (the paper's text).
- btx: Branch-Train-MiX (2403.07816). Non-FFN weights are averaged over the checkpoints, expert e is the FFN of checkpoint
  e * n // E (the official rule: 8 experts from 4 models, e // 2).

Official code, where it differs: it draws a fresh index set for each of the three matrices, permutes the neurons first
(no functional effect) and starts the router from U[0, 1). `compat="official"` does all three. It loads whole models; here
tensors are streamed, so memory does not grow with the number of experts.
Ours: ratio=0 is bit-equal to sparse; every draw has its own seed, so the bytes do not depend on shards or order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import Blueprint
from modelwright.reshape.experts.assemble import dense_parts, dtypes_of, matrices, silent_shared, written_config, zero_biases
from modelwright.reshape.experts.routers import from_data, from_gates, generator, plain_router
from modelwright.reshape.experts.stock import Target, choose


@dataclass(frozen=True)
class Knobs:
    experts: int = knob(8, "experts per layer", low=2)
    top_k: int = knob(2, "experts per token", low=1)
    method: Literal["sparse", "noise", "drop", "btx"] = knob("sparse", "how the copies are made to differ")
    ratio: float = knob(0.5, "noise, drop: share of each expert's neurons that is changed", low=0, high=1)
    std: float = knob(0.02, "noise: standard deviation", low=0)
    others: list[str] = knob([], "btx: further checkpoints, all of the base's shape", path=True)
    router: Literal["normal", "zero", "uniform", "gate_means", "prompts", "text", "ridge"] = knob("normal", "router initialisation")
    router_std: float = knob(0.02, "normal: standard deviation", low=0)
    prompts: list[list[str]] = knob([], "router=prompts: one list of prompts per expert")
    negatives: list[list[str]] = knob([], "router=prompts: what each expert is not for; empty: the mean of all experts")
    texts: list[str] = knob([], "router=text or ridge: one text file per expert", path=True)
    ridge: float = knob(1e-2, "router=ridge: lambda, in units of the mean squared state", low=0)
    target: Literal["auto", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "granitemoeshared"] = knob(
        "auto", "stock class of the result"
    )
    compat: Literal["ours", "official"] = knob("ours", "official: the published Drop-Upcycling script's draws")


def upcycle(source: Checkpoint, knobs: Knobs, seed: int = 0) -> tuple[Blueprint, str]:
    """The upcycled checkpoint as a blueprint, and what it promises: 'same function' or 'changed function'."""
    if knobs.top_k > knobs.experts:
        raise UserError(f"top_k={knobs.top_k} but there are {knobs.experts} experts", how="lower top_k or raise experts")
    for name, routers in (("prompts", ["prompts"]), ("negatives", ["prompts"]), ("texts", ["text", "ridge"])):
        if getattr(knobs, name) and knobs.router not in routers:
            raise UserError(
                f"{name} is given and router={knobs.router} does not use it", how=f"set router={routers[0]}, or leave {name} out"
            )
    anatomy = Anatomy(source.skeleton)
    target = choose(source, anatomy, knobs.experts, knobs.top_k, knobs.target)
    sources = [source, *_others(source, knobs, target)]
    router_rows: dict[int, Tensor] = {}  # by layer, where the router is made from data
    if knobs.router in ("prompts", "text", "ridge"):
        router_rows = from_data(knobs.router, source.model(torch.float32), source.tokenizer(), knobs)

    dtypes = dtypes_of(source, anatomy, target, knobs.experts)
    added = zero_biases(target, dtypes)

    def stream() -> Iterator[Any]:
        yield from dense_parts([s.get for s in sources], anatomy, source)
        yield from added.items()
        for block in anatomy.blocks:
            dtype = source.dtype(anatomy.ffn(block).down.name)
            ffns = [matrices(s.get, anatomy.ffn(block), dtype) for s in sources]
            experts = (_expert(ffns[e * len(ffns) // knobs.experts], knobs, seed, block.index, e) for e in range(knobs.experts))
            gate_means = []
            for e, expert in enumerate(experts):  # one expert in memory at a time
                if knobs.router == "gate_means":
                    gate_means.append(expert[0].float().mean(0))
                yield from target.pieces(block.path, e, *expert)
            width = ffns[0][0].shape[1]
            router = router_rows[block.index] if router_rows else _router(knobs, seed, block.index, width, gate_means)
            yield target.names(block.path, knobs.experts)[0], router.to(dtype)
            yield from silent_shared(target, block.path, ffns[0])

    facts = {"target": target.model_type, "method": knobs.method, "router": knobs.router, "sources": len(sources)}
    scaling = str(source.config.get("rope_scaling") or source.config.get("rope_parameters"))
    if source.config["model_type"] == "phi3" and "longrope" in scaling:
        facts["note"] = "logits are equal at every length, but Phi-3 drops its cache where longrope switches, and Mixtral keeps it"
    blueprint = Blueprint(written_config(target), dtypes, stream, source, facts)
    return blueprint, "same function" if _experts_are_copies(knobs) else "changed function"


def _experts_are_copies(knobs: Knobs) -> bool:
    """Whether every expert is the dense feed-forward part, so that the function cannot change."""
    if knobs.method == "noise":
        return knobs.ratio == 0 or knobs.std == 0
    if knobs.method == "drop":
        return knobs.ratio == 0
    return knobs.method == "sparse"


def _router(knobs: Knobs, seed: int, layer: int, width: int, gate_means: list[Tensor]) -> Tensor:
    """The router (E, width) of a layer: from the experts' mean gates, (width,) each, or drawn."""
    if knobs.router == "gate_means":
        return from_gates(torch.stack(gate_means), knobs.router_std)
    official = knobs.compat == "official" and knobs.router == "normal"
    kind = "uniform" if official else knobs.router
    return plain_router(kind, seed, layer, knobs.experts, width, knobs.router_std)


# settings of a checkpoint that its function does not depend on
_FREE = {"dtype", "transformers_version", "initializer_range", "use_cache", "attention_dropout", "max_position_embeddings"}
_FREE |= {"bos_token_id", "eos_token_id", "pad_token_id"}


def _others(source: Checkpoint, knobs: Knobs, target: Target) -> list[Checkpoint]:
    if (knobs.method == "btx") != bool(knobs.others):
        raise UserError(
            "btx needs 'others'" if knobs.method == "btx" else "'others' is for method=btx",
            "Branch-Train-MiX mixes several checkpoints of one shape",
            "give others: [FOLDER, ...] with method: btx",
        )
    found = [Checkpoint(o) for o in knobs.others]
    words = source.tokenizer().get_vocab() if source.tokenizer() else None
    for other in found:
        if other.config.get("vocab_size") != source.config.get("vocab_size") or (
            words and other.tokenizer() and other.tokenizer().get_vocab() != words
        ):
            raise UserError(
                f"{other.folder} has another vocabulary than {source.folder}",
                "embeddings of different tokens cannot be averaged",
                "mix models of one tokenizer",
            )
        for name in source.skeleton.state_dict():
            if name in source and (name not in other or other.shape(name) != source.shape(name)):
                raise UserError(
                    f"{other.folder} does not have the shape of {source.folder}", f"{name} differs", "mix models of one architecture"
                )
        theirs, ours = (
            written_config(t) for t in (choose(other, Anatomy(other.skeleton), knobs.experts, knobs.top_k, knobs.target), target)
        )
        if differs := sorted(k for k in (ours.keys() | theirs.keys()) - _FREE if ours.get(k) != theirs.get(k)):
            raise UserError(
                f"{other.folder} computes otherwise than {source.folder}",
                f"they differ in {', '.join(differs)}",
                "mix models of one architecture",
            )
    if len(found) + 1 > knobs.experts:
        raise UserError(f"{len(found) + 1} checkpoints do not fit into {knobs.experts} experts", how="raise experts")
    return found


def _expert(dense: tuple[Tensor, Tensor, Tensor], knobs: Knobs, seed: int, layer: int, e: int) -> tuple[Tensor, Tensor, Tensor]:
    """One expert from the dense matrices, rows of gate and up and columns of down being its neurons."""
    if knobs.method not in ("noise", "drop"):
        return dense
    neurons = dense[0].shape[0]
    count = int(neurons * knobs.ratio)
    by_neuron = [dense[0], dense[1], dense[2].T]  # (F, d) each
    if knobs.compat == "official":
        order = torch.randperm(neurons, generator=generator(seed, layer, e, "order"))
        by_neuron = [m[order] for m in by_neuron]
    elif count == 0:
        return dense
    index = torch.randperm(neurons, generator=generator(seed, layer, e, "neurons"))[:count]
    changed = []
    for name, matrix in zip(("gate", "up", "down"), by_neuron, strict=True):
        g = generator(seed, layer, e, name)
        if knobs.compat == "official":
            index = torch.randperm(neurons, generator=g)[:count]
        out = matrix.clone()
        block = matrix[index].float()
        noise = torch.randn(block.shape, generator=g)
        if knobs.method == "noise":
            block = block + noise * knobs.std
        elif count:
            block = noise * block.std(correction=0) + block.mean()
        out[index] = block.to(matrix.dtype)
        changed.append(out)
    return changed[0], changed[1], changed[2].T


METHOD = upcycle
