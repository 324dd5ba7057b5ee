"""What masks leave: a stock mixture, or a narrower dense model, that gives what the masked model gives."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.constraint import keep_largest
from modelwright.tune.pruning.mixture import narrower, require_masks

IDS = torch.arange(3, 43).view(2, 20) % 96
CLASSES = {
    "llama": "GraniteMoeSharedForCausalLM",
    "granite": "GraniteMoeSharedForCausalLM",
    "qwen2": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
}


def masked_logits(model: Any, masks: Tensor, router: Tensor, top_k: int) -> Tensor:
    """The dense model with masks, written a second time: token by token over the chosen experts."""
    handles = []
    for i, layer in enumerate(model.model.layers):
        box: dict[str, Tensor] = {}

        def route(m: Any, args: tuple, i: int = i, box: dict[str, Tensor] = box) -> None:
            p = F.linear(args[0], router[i]).softmax(-1)
            top, index = p.topk(top_k, -1)
            box["m"] = ((top / top.sum(-1, keepdim=True))[..., None] * masks[i].float()[index]).sum(-2)

        handles.append(layer.mlp.register_forward_pre_hook(route))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda m, args, box=box: args[0] * box["m"]))
    with torch.no_grad():
        found = model(IDS).logits
    for h in handles:
        h.remove()
    return found


def random_masks(experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    masks = torch.rand(2, experts, 48, generator=g) < 0.6
    masks[..., :5], masks[..., 5:9] = True, False  # shared and inactive
    return masks, torch.randn(2, experts, 32, generator=g)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("kind", CLASSES)
def test_the_stock_mixture_gives_what_the_masked_model_gives(kind: str, top_k: int) -> None:
    model = model_of(kind)
    masks, router = random_masks(3)
    made = narrower(model, masks, router, top_k)
    assert type(made).__name__ == CLASSES[kind]
    with torch.no_grad():
        apart = (made(IDS).logits - masked_logits(model, masks, router, top_k)).abs().max()
    assert apart < 1e-5 * max(1.0, float(made(IDS).logits.detach().abs().max())), apart


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"head_dim": 16}, {"tie_word_embeddings": True}], ids=str)
def test_biases_heads_and_tied_embeddings_go_along(changes: dict[str, Any]) -> None:
    model = model_of("llama", **changes)
    masks, router = random_masks(2)
    made = narrower(model, masks, router, 1)
    with torch.no_grad():
        assert (made(IDS).logits - masked_logits(model, masks, router, 1)).abs().max() < 1e-4


def test_positions_of_the_source_are_kept() -> None:
    model = model_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    masks, router = random_masks(2)
    made = narrower(model, masks, router, 1)
    assert made.config.rope_parameters["rope_theta"] == 77.0
    with torch.no_grad():
        assert (made(IDS).logits - masked_logits(model, masks, router, 1)).abs().max() < 1e-4


def test_equal_masks_leave_a_dense_model() -> None:
    model = model_of("llama")
    g = torch.Generator().manual_seed(0)
    one = keep_largest(torch.rand(2, 48, generator=g), torch.tensor([16, 13]))
    masks = one[:, None].expand(-1, 4, -1)
    router = torch.randn(2, 4, 32, generator=g)
    made = narrower(model, masks, router, 2)
    assert type(made) is type(model) and made.config.intermediate_size == 16
    with torch.no_grad():
        assert (made(IDS).logits - masked_logits(model, masks, router, 2)).abs().max() < 1e-4


def test_the_neurons_are_counted_by_set() -> None:
    masks, router = random_masks(2)
    made = Anatomy(narrower(model_of("llama"), masks, router, 1))
    shared, own = masks.all(1), masks & ~masks.all(1)[:, None]
    up = lambda n: -(-n // 8) * 8  # noqa: E731
    assert made.config.shared_intermediate_size == up(int(shared.sum(1).max()))
    assert made.config.intermediate_size == up(int(own.sum(2).max()))


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("gpt2", {}, "cannot become a mixture of masks"),
        ("gemma2", {}, "cannot become a mixture of masks"),
        ("mixtral", {}, "a mixture of experts already"),
        ("bert", {}, "cannot become a mixture of masks"),
        ("llama", {"mlp_bias": True}, "its feed-forward part has biases"),
        ("mistral", {"sliding_window": 8}, "a sliding window"),
    ],
)
def test_what_no_stock_class_holds_is_refused(kind: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        require_masks(Anatomy(model_of(kind, device="meta", **changes)))
