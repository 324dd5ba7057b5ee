"""The head over chunks of tokens gives the loss and the gradients of the whole logits, for every kind of head."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from families import FAMILIES, model_of
from modelwright.core.data.rows import IGNORE
from modelwright.core.train import head as module
from modelwright.core.train.head import ChunkedHead


def _inputs(model) -> tuple[dict[str, Tensor], Tensor, Tensor, bool]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (3, 9), generator=g)
    labels = torch.where(torch.rand(3, 9, generator=g) < 0.6, ids.roll(1, 1), IGNORE)
    weights = torch.rand(3, 9, generator=g)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids}, labels, weights, True
    return {"input_ids": ids}, labels, weights, False


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_chunks_give_the_loss_and_the_gradients_of_whole_logits(kind: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOGITS", 96 * 5)
    model = model_of(kind, **({"tie_word_embeddings": tied} if kind not in ("t5", "t5_v1_1", "bert") else {}))
    model.eval()
    inputs, labels, weights, _ = _inputs(model)
    logits = model(**inputs).logits
    each = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none").view_as(labels)
    (each * weights).sum().backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    head = ChunkedHead.install(model)
    assert head is not None, "every family's head can be called alone"
    losses, total = model(**inputs, loss_of=(labels, weights, lambda h: h))
    (3 * total).backward()
    assert torch.allclose(losses, each.detach(), atol=1e-5)
    found = {n: p.grad / 3 for n, p in model.named_parameters() if p.grad is not None}
    assert whole.keys() == found.keys()
    for n, g in whole.items():
        assert float((g - found[n]).norm()) <= 2e-6 * float(g.norm() + 0.1), n
    head.remove()
    assert torch.equal(model(**inputs).logits, logits)
    assert set(model.state_dict()) == set(
        model_of(kind, **({"tie_word_embeddings": tied} if kind not in ("t5", "t5_v1_1", "bert") else {})).state_dict()
    )


def test_softcaps_and_scales_are_the_model_s_own() -> None:
    model = model_of("gemma2", final_logit_softcapping=3.0)
    ids = torch.arange(3, 12)[None]
    logits = model(input_ids=ids).logits[:, :-1]
    assert float(logits.detach().abs().max()) <= 3.0
    head = ChunkedHead.install(model)
    assert head is not None
    losses, _ = model(input_ids=ids, loss_of=(ids[:, 1:], torch.ones(1, 8), lambda h: h[:, :-1]))
    assert torch.allclose(losses, F.cross_entropy(logits[0].float(), ids[0, 1:], reduction="none")[None], atol=1e-5)


def test_without_a_target_the_loss_is_zero_and_has_a_gradient() -> None:
    model = model_of("llama")
    ids = torch.arange(3, 12)[None]
    ChunkedHead.install(model)
    losses, total = model(input_ids=ids, loss_of=(torch.full((1, 8), IGNORE), torch.ones(1, 8), lambda h: h[:, :-1]))
    total.backward()
    assert float(losses.sum()) == float(total.detach()) == 0
    assert float(model.model.layers[0].mlp.up_proj.weight.grad.abs().max()) == 0


def test_a_model_without_such_a_head_is_left_alone() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50))
    assert ChunkedHead.install(model) is None and "forward" not in model.__dict__
