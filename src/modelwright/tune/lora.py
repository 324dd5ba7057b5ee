"""LoRA: low-rank adapters (Hu et al., 2106.09685), through PEFT.

W' = W + (alpha / r) B A with B zero at the start, so step 0 is the base model exactly. The paper adapts the query and value
matrices; `roles` names any role of the role map. Where a model fuses them (GPT-2, Phi-3, GPT-NeoX) the whole fused matrix
gets the adapter. The result is saved merged (a plain checkpoint) with the adapter beside it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model

from modelwright.core.errors import UserError, did_you_mean, short
from modelwright.core.knobs import Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.technique import Technique


@dataclass(frozen=True)
class Knobs(Tune):
    r: int = knob(8, "rank", low=1, alias="rank")
    alpha: float = knob(16.0, "scale: the update is alpha / r times B A", alias="lora_alpha")
    dropout: float = knob(0.0, "dropout on the adapter's input", low=0, high=1, alias="lora_dropout")
    roles: list[str] = knob(["attn.q", "attn.v"], "roles of the matrices that get an adapter")


_FUSED = {"attn.q": "attn.qkv", "attn.k": "attn.qkv", "attn.v": "attn.qkv", "ffn.gate": "ffn.gate_up", "ffn.up": "ffn.gate_up"}


class Lora(Technique):
    """Adapters on the chosen roles; everything else is frozen."""

    name = "lora"
    supports = Technique.supports - {"lora"}
    adapters = True

    def __init__(self, knobs: Knobs):
        self.knobs = knobs

    def attach(self, model: Any, anatomy: Anatomy) -> Any:
        if not self.knobs.roles:
            raise UserError("roles is empty", "nothing would be trained", "give at least one, such as attn.q")
        modules: list[str] = []
        parameters: list[str] = []
        transposed = False
        matrices = [p for p in anatomy if p.kind == "weight" and len(p.shape) > 1]
        for role in self.knobs.roles:
            found = [p for p in matrices if p.role in (role, _FUSED.get(role))]
            if not found:
                raise UserError(
                    f"roles has '{role}'", f"{type(model).__name__} has no such matrix", did_you_mean(role, {p.role for p in matrices})
                )
            for p in found:
                if p.tied:
                    raise UserError(
                        f"roles has '{role}'", f"{p.name} is tied with {p.tied[0]} and an adapter would part them", "leave it out"
                    )
                (parameters if p.orientation == "experts" else modules).append(p.name.removesuffix(".weight"))
                transposed |= p.orientation == "in_out"
        config = LoraConfig(
            r=self.knobs.r,
            lora_alpha=self.knobs.alpha,  # type: ignore[arg-type]  # PEFT says int; it divides by the rank and takes any number
            lora_dropout=self.knobs.dropout,
            task_type="CAUSAL_LM" if model.can_generate() and not model.config.is_encoder_decoder else None,
            target_modules=sorted(set(modules)) or None,
            target_parameters=sorted(set(parameters)) or None,
            fan_in_fan_out=transposed,
        )
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise UserError(
                f"PEFT cannot adapt {', '.join(self.knobs.roles)} here", short(error), "choose other roles or settings"
            ) from error

    def export(self, model: Any, folder: Path) -> Any:
        model.save_pretrained(folder / "adapter")
        return model.merge_and_unload()


METHOD = Lora
