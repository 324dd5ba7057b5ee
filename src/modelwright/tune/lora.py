"""LoRA: low-rank adapters (Hu et al., 2106.09685), through PEFT.

W' = W + (alpha / r) B A with B zero at the start, so step 0 is the base model exactly. The paper adapts the query and value
matrices; `roles` names any role of the role map. Where a model fuses them (GPT-2, Phi-3, GPT-NeoX) the whole fused matrix
gets the adapter. The result is saved merged (a plain checkpoint) with the adapter beside it.

QLoRA (2305.14314): `quantize: nf4` trains the adapters on a base held in 4 bits (bitsandbytes, NF4 with double quantisation). They are
merged into the weights as they were stored, not into the rounded ones; what that changes is printed as the logit gap.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from modelwright.core.errors import UserError, did_you_mean, short
from modelwright.core.knobs import Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.certificate import logits_of, probe_ids
from modelwright.core.train.technique import Technique


@dataclass(frozen=True)
class Knobs(Tune):
    r: int = knob(8, "rank", low=1, alias="rank")
    alpha: float = knob(16.0, "scale: the update is alpha / r times B A", alias="lora_alpha")
    dropout: float = knob(0.0, "dropout on the adapter's input", low=0, high=1, alias="lora_dropout")
    roles: list[str] = knob(["attn.q", "attn.v"], "roles of the matrices that get an adapter")
    quantize: Literal["none", "nf4", "fp4"] = knob("none", "hold the frozen base in 4 bits (QLoRA); needs bitsandbytes")


_FUSED = {"attn.q": "attn.qkv", "attn.k": "attn.qkv", "attn.v": "attn.qkv", "ffn.gate": "ffn.gate_up", "ffn.up": "ffn.gate_up"}


class Lora(Technique):
    """Adapters on the chosen roles; everything else is frozen."""

    name = "lora"
    adapters = True

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        self.gap: float | None = None

    @property
    def supports(self) -> frozenset[str]:  # type: ignore[override]
        known = Technique.supports - {"lora"}
        return known - {"fsdp2", "ep"} | {"4bit"} if self.knobs.quantize != "none" else known

    @property
    def loads(self) -> bool:  # type: ignore[override]
        return self.knobs.quantize != "none"

    def load(self, source: Any, dtype: Any) -> Any:
        if self.knobs.quantize == "none":
            return None
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise UserError("quantize needs bitsandbytes", "it is not installed", "pip install 'modelwright[quant]'") from None
        from transformers import BitsAndBytesConfig

        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.knobs.quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        )
        return source.model(dtype, quantization_config=how)

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
        if self.knobs.quantize == "none":
            return model.merge_and_unload()
        ids = probe_ids(self.source)[0]
        rounded = logits_of(model, ids)
        whole = PeftModel.from_pretrained(self.source.model(torch.float32), folder / "adapter").merge_and_unload()
        self.gap = float((logits_of(whole, ids) - rounded).abs().max())
        return whole

    def exported(self) -> dict[str, Any]:
        return {} if self.gap is None else {"logit gap of merging into the unrounded weights": self.gap}


METHOD = Lora
