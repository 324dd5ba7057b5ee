"""Our mixtures made from bf16 checkpoints whose widths are no multiple of 8."""

from pathlib import Path

import pytest
import torch

from modelwright.core.model.checkpoint import Checkpoint
from modelwright.reshape import hyper_moe, rmoe

MADE = {
    "rmoe of llama": ("llama", rmoe.rmoe, rmoe.Knobs(experts=4, p=6)),
    "rmoe of mixtral": ("mixtral", rmoe.rmoe, rmoe.Knobs(p=6, cell="lstm", residual=0.3)),
    "hyper_moe": ("mixtral", hyper_moe.hyper_moe, hyper_moe.Knobs(a=4, b=6, e=5, hidden=7, q=6, c=3)),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_saved_is_what_was_in_memory(name: str, tiny, tmp_path: Path) -> None:
    """Bit for bit: no buffer was rounded with the weights."""
    kind, method, knobs = MADE[name]
    built, _ = method(Checkpoint(tiny(kind, dtype="bfloat16", intermediate_size=42)), knobs)
    assert {p.dtype for p in built.model.parameters()} == {torch.bfloat16}
    built.model.save_pretrained(tmp_path)
    again, ids = Checkpoint(tmp_path).model(), torch.randint(3, 96, (2, 30))
    assert torch.equal(built.model.eval()(ids).logits, again(ids).logits)
    loss = again.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in again.parameters() if p.grad is not None)
