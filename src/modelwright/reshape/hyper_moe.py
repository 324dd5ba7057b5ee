"""A Mixtral with a hypernetwork that gives each set of chosen experts its own adapter (HyperMoE, 2402.12656).

What for: fine-tuning a mixture of experts that runs few of many. See modelwright.moe.hyper for the equations, what the
official code does and why one adapter per set is exact. From a dense model make a mixture first (reshape.upcycle).

The sizes are the paper's. init zero starts the adapters at exactly zero and keeps the function; paper is the hyperfan-in start.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import Built


@dataclass(frozen=True)
class Knobs:
    init: Literal["paper", "zero"] = knob("paper", "hyperfan-in, or adapters that start at exactly zero")
    a: int = knob(64, "neurons of a generated adapter", low=1)
    b: int = knob(128, "width of the hypernetwork's bottleneck", low=1)
    e: int = knob(128, "width of an expert's embedding", low=1)
    hidden: int = knob(128, "width inside the set's code", low=1)
    q: int = knob(128, "width of the set's code", low=1)
    c: int = knob(10, "width of a layer's embedding", low=1)


def hyper_moe(source: Checkpoint, knobs: Knobs, seed: int = 0) -> tuple[Built, str]:
    """The model in memory, and what it promises: 'same function' with init zero."""
    from modelwright.models.causal import cast_weights
    from modelwright.models.hyper_moe import HyperMoEConfig, HyperMoEForCausalLM

    if source.config["model_type"] != "mixtral":
        raise UserError(
            f"{type(source.skeleton).__name__} cannot become a HyperMoE",
            "its blocks are not Mixtral's",
            "give a Mixtral, or make one with reshape.upcycle target: mixtral",
        )
    settings = {k: v for k, v in source.hf_config.to_dict().items() if k not in ("model_type", "architectures")}
    settings |= {"hyper_init": knobs.init, "hyper_adapter": knobs.a, "hyper_bottleneck": knobs.b, "hyper_expert_embedding": knobs.e}
    settings |= {"hyper_process": knobs.hidden, "hyper_code": knobs.q, "hyper_layer_embedding": knobs.c, "norm_topk_prob": True}
    old = source.model()
    torch.manual_seed(seed)
    model: Any = HyperMoEForCausalLM(HyperMoEConfig(**settings, architectures=["HyperMoEForCausalLM"]))
    cast_weights(model, old.dtype)
    missing, unknown = model.load_state_dict(old.state_dict(), strict=False)
    if unknown or [n for n in missing if ".code." not in n and ".hyper." not in n]:
        raise RuntimeError(f"weights without a place: {unknown}; without a value: {missing}")
    model.tie_weights()
    new = sum(p.numel() for n, p in model.named_parameters() if ".code." in n or ".hyper." in n)
    promise = "same function" if knobs.init == "zero" else "changed function"
    return Built(model, None, source, {"hypernetwork parameters": new, "init": knobs.init}), promise


METHOD = hyper_moe
