"""Tune the keys or the values of the feed-forward memories (Tuning keys vs values, arXiv 2402.12233, ICLR 2024 Tiny Papers).

FFN(h) = f(h K^T) V: the first matrices are keys (when a memory fires), the last is the values (what it writes). A gated FFN
has two key matrices, gate and up. The paper finds that, at equal size, tuning keys beats tuning values.

adapt=lora is the paper's protocol: rank-8 adapters on q and v and on one FFN matrix; the official code has this part only,
for Llama. adapt=full, and every other architecture, are ours. Biases belong to their matrix. Editing one fact by keys or by
values is reshape.edit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modelwright.core.errors import UserError
from modelwright.core.knobs import Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.freeze import Freezing, memory
from modelwright.core.train.technique import Technique
from modelwright.tune import lora


@dataclass(frozen=True)
class Knobs(Tune):
    part: Literal["keys", "gate", "up", "values", "none"] = knob(
        "keys", "what to tune: all keys, one key matrix, values; none: q and v only"
    )
    adapt: Literal["full", "lora"] = knob("full", "move the matrices themselves, or adapters beside them")
    r: int = knob(8, "rank of the adapters", low=1)
    alpha: float = knob(16.0, "scale of the adapters")
    dropout: float = knob(0.1, "dropout on the adapters' input", low=0, high=1)


_ROLES = {
    "keys": ["ffn.gate", "ffn.up", "ffn.gate_up", "expert.gate_up"],
    "gate": ["ffn.gate"],
    "up": ["ffn.up"],
    "values": ["ffn.down", "expert.down"],
    "none": [],
}


class KeyValue(Freezing):
    """A selector by role; with adapters, the choice of where they go."""

    name = "key_value"

    def __init__(self, knobs: Knobs):
        super().__init__()
        self.knobs = knobs
        self.adapters = knobs.adapt == "lora"
        self.supports = Technique.supports - {"lora"}

    @property
    def adds_weights(self) -> bool:
        return self.adapters

    def attach(self, model: Any, anatomy: Anatomy) -> Any:
        if not self.adapters:
            return model
        k = self.knobs
        roles = [r for r in _ROLES[k.part] if any(p.role == r for p in anatomy)]
        if not roles and k.part != "none":
            raise UserError(
                f"part={k.part}: {type(model).__name__} has no such matrix for itself",
                "it has no gate, or gate and up are one matrix and an adapter would move both",
                "use keys, or adapt: full",
            )
        self._lora = lora.Lora(lora.Knobs(r=k.r, alpha=k.alpha, dropout=k.dropout, roles=["attn.q", "attn.v", *roles]))
        return self._lora.attach(model, anatomy)

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        if self.adapters:
            return
        chosen = set(memory(anatomy, self.knobs.part)) if self.knobs.part != "none" else set()
        if self.knobs.part == "none":
            chosen = {
                (v.name, n[0] if anatomy.parts[v.name].rows else "")
                for b in anatomy.blocks
                for n, v in anatomy.attention(b).items()
                if n[0] in "qv"  # q, v and their biases
            }
        every = [(p.name, piece) for p in anatomy for piece in (p.rows or [""])]
        self.freeze(model, anatomy, [p for p in every if p not in chosen])

    def liveness(self, moved: dict[str, Any]) -> str:
        return Technique.liveness(self, moved) if self.adapters else super().liveness(moved)

    def export(self, model: Any, folder: Path) -> Any:
        return self._lora.export(model, folder) if self.adapters else model


METHOD = KeyValue
