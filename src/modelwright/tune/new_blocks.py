"""Train only the blocks that growing added (LLaMA-Pro, arXiv 2401.02415); everything else stays as it was, to the last bit.

When to use it: a finished model is to learn a new field and lose nothing of the old. Grow it by silent blocks, which change nothing
(`reshape.grow: {preset: llama_pro}`: 32 blocks become 40), then train those alone. LLaMA-Pro trains 8 new blocks of a LLaMA2-7B on 80B
tokens of code and mathematics (learning rate 2e-4, cosine, warm-up 6 %, weight decay 0.1).

`reshape.grow` writes the new blocks into config.json as grown_blocks; `blocks` names others. Embeddings, final norm and head stay.
"""

from dataclasses import dataclass
from typing import Any

from modelwright.core.errors import UserError
from modelwright.core.knobs import Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.freeze import Freezing
from modelwright.core.train.technique import Technique


@dataclass(frozen=True)
class Knobs(Tune):
    blocks: list[int] = knob([], "blocks to train, from 0; empty: those that config.json names as grown_blocks")


class NewBlocks(Freezing):
    """A selector by block."""

    name = "new_blocks"
    supports = Technique.supports - {"lora"}

    def __init__(self, knobs: Knobs):
        super().__init__()
        self.knobs = knobs

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        chosen = set(self.knobs.blocks or getattr(anatomy.config, "grown_blocks", None) or [])
        if not chosen:
            raise UserError(
                "there are no new blocks to train",
                "the model's config.json has no grown_blocks",
                "grow it with reshape.grow, or name blocks",
            )
        if wrong := sorted(chosen - {b.index for b in anatomy.blocks}):
            raise UserError(
                f"blocks names {wrong[0]}", f"the model has blocks 0 to {len(anatomy.blocks) - 1}", "name blocks that are there"
            )
        self.freeze(model, anatomy, [(p.name, "") for p in anatomy if p.layer not in chosen])


METHOD = NewBlocks
