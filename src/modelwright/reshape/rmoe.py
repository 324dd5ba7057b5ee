"""A mixture of experts whose routers are recurrent over depth (RMoE, 2408.06793), from a dense model or from Mixtral.

What for: continued pre-training with routers that see what earlier routers decided. See modelwright.moe.rmoe for the
equations and what is wrong in the official code.

From a dense Llama or Mistral every expert is a copy of its feed-forward part (Sparse Upcycling, 2212.05055); with
renormalised top-k weights the function is unchanged whatever the router. From Mixtral the experts stay and the routers are
new, so the function changes until they are trained. Ours: both ways in; the paper trains from nothing.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import Built
from modelwright.reshape.experts.stock import choose


@dataclass(frozen=True)
class Knobs:
    experts: int | None = knob(None, "experts per layer, from a dense model; empty: 8, or Mixtral's own", low=2)
    top_k: int | None = knob(None, "experts per token, from a dense model; empty: 2, or Mixtral's own", low=2)
    p: int = knob(128, "width of the routers' state", low=1)
    cell: Literal["gru", "rnn", "lstm"] = knob("gru", "the recurrent cell, shared by all layers")
    passing: Literal["full", "detach", "none"] = knob("full", "what a layer gets of the state before; none is the paper's NP")
    residual: float = knob(0.0, "alpha: share of the previous layer's probabilities added to the scores", low=0)
    dense: list[int] = knob([], "layers that stay dense, from a dense model")
    balance: float = knob(0.01, "router_aux_loss_coef of the config, which other trainers read; here train with tune.balance", low=0)


def rmoe(source: Checkpoint, knobs: Knobs, seed: int = 0) -> tuple[Built, str]:
    """The model in memory, and what it promises: 'same function' from a dense model, else 'changed function'."""
    from modelwright.models.causal import cast_weights
    from modelwright.models.rmoe import RMoEConfig, RMoEForCausalLM

    anatomy = Anatomy(source.skeleton)
    sparse = bool(anatomy.experts)
    if sparse and source.config["model_type"] != "mixtral":
        raise UserError(
            f"{type(source.skeleton).__name__} cannot become an RMoE", "its blocks are not Mixtral's", "give a Mixtral, Llama or Mistral"
        )
    if sparse and knobs.dense:
        raise UserError("dense is given and the model is a mixture of experts", "every layer has experts already", "leave dense out")
    for name, given, own in (("experts", knobs.experts, anatomy.experts), ("top_k", knobs.top_k, anatomy.top_k)):
        if sparse and given not in (None, own):
            raise UserError(f"{name}={given} but the model has {name}={own}", "from a mixture of experts they stay", f"leave {name} out")
    experts, top_k = knobs.experts or 8, knobs.top_k or 2
    if bad := [i for i in knobs.dense if not 0 <= i < len(anatomy.blocks)]:
        raise UserError(f"dense has layer {bad[0]}", f"the model has layers 0 to {len(anatomy.blocks) - 1}")
    if not sparse and len(set(knobs.dense)) == len(anatomy.blocks):
        raise UserError("dense names every layer", "no layer is left for experts", "leave some out")
    if not sparse and top_k > experts:
        raise UserError(f"top_k={top_k} but there are {experts} experts", how="lower top_k or raise experts")
    stock = source.hf_config if sparse else choose(source, anatomy, experts, top_k, "mixtral").config
    settings = {k: v for k, v in stock.to_dict().items() if k not in ("model_type", "architectures")}
    settings |= {"router_width": knobs.p, "router_cell": knobs.cell, "router_passing": knobs.passing, "router_residual": knobs.residual}
    settings |= {"dense_layers": sorted(set(knobs.dense)), "router_aux_loss_coef": knobs.balance}
    config = RMoEConfig(**settings, architectures=["RMoEForCausalLM"])
    old = source.model()
    torch.manual_seed(seed)
    model: Any = RMoEForCausalLM(config)
    cast_weights(model, old.dtype)
    weights = {n: p for n, p in old.state_dict().items() if ".mlp." not in n or ".experts." in n}
    for b in [] if sparse else anatomy.blocks:
        ffn = anatomy.ffn(b)
        gate, up, down = (view.read(old.get_parameter) for view in (ffn.gate, ffn.up, ffn.down))  # type: ignore[union-attr]
        at = f"{b.path}.mlp."
        if b.index in knobs.dense:
            weights |= {f"{at}{n}_proj.weight": t for n, t in (("gate", gate), ("up", up), ("down", down))}
        else:
            weights[f"{at}experts.gate_up_proj"] = torch.cat([gate, up]).expand(experts, -1, -1)
            weights[f"{at}experts.down_proj"] = down.expand(experts, -1, -1)
    missing, unknown = model.load_state_dict(weights, strict=False)
    if unknown or [n for n in missing if ".mlp.gate." not in n and ".router_cell." not in n and n != "lm_head.weight"]:
        raise RuntimeError(f"weights without a place: {unknown}; without a value: {missing}")
    model.tie_weights()
    facts = {"p": knobs.p, "cell": knobs.cell, "passing": knobs.passing, "dense layers": len(set(knobs.dense))}
    facts["router parameters"] = sum(p.numel() for n, p in model.named_parameters() if ".gate." in n or ".router_cell." in n)
    return Built(model, None, source, facts), "changed function" if sparse else "same function"


METHOD = rmoe
