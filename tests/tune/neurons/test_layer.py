"""A feed-forward part as experts: all of them are the dense layer, its order does not matter, tokens run through those they choose."""

import pytest
import torch

from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.tune.neurons.layer import Layer, rand_index

KINDS = ("llama", "qwen2", "phi3", "gpt2", "gpt_neox", "gemma", "t5", "t5_v1_1")
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


def layers(model: object, experts: int = 6, top_k: int = 6) -> list[Layer]:
    anatomy = Anatomy(model)
    return [Layer(model, anatomy, b, experts, top_k) for b in anatomy.blocks]


def logits(model: object) -> torch.Tensor:
    given = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **given).logits


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_experts_on_it_is_the_dense_layer_and_so_are_its_gradients(kind: str) -> None:
    """Fused and transposed matrices, biases, with and without a gate."""
    model = model_of(kind)
    neurons = Layer(model, Anatomy(model), Anatomy(model).blocks[0], 1, 1).neurons
    layer = layers(model, *(8, 8) if neurons % 6 else (6, 6))[0]
    layer.require_module("it")
    found = []
    for run in (layer.module, layer.sparse):
        model.zero_grad()
        x = X.clone().requires_grad_()
        y = run(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad.clone() for p in layer.module.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_another_order_of_the_neurons_is_the_same_function(kind: str) -> None:
    model = model_of(kind)
    before = logits(model)
    for layer in layers(model, 2, 2):
        rows = layer.rows().clone()
        order = torch.randperm(layer.neurons)
        layer.permute(order, None)
        assert torch.equal(layer.rows(), rows[order])
    assert torch.allclose(logits(model), before, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_token_runs_through_the_experts_nearest_to_it(kind: str) -> None:
    model = model_of(kind)
    layer = layers(model, 4, 2)[1]
    size = layer.neurons // 4
    flat, seen = X.view(-1, 32), []
    chosen = (flat @ torch.nn.functional.normalize(layer.rows(), dim=1).view(4, size, 32).mean(1).T).topk(2, 1).indices
    keep = torch.zeros(len(flat), 4).scatter_(1, chosen, 1.0).repeat_interleave(size, 1)
    down = model.get_submodule(layer.views.down.name.rpartition(".")[0])
    handle = down.register_forward_pre_hook(lambda m, args: (seen.append(1), args[0] * keep.view(*args[0].shape))[1:])
    masked = layer.module(X)
    handle.remove()
    assert seen and torch.allclose(layer.sparse(X), masked, atol=1e-5)
    assert not torch.allclose(layer.module(X), masked, atol=1e-2)


def test_neurons_that_are_not_chosen_have_no_gradient() -> None:
    model = model_of("llama")
    layer = layers(model, 48, 1)[0]
    layer.sparse(X[:1, :1]).sum().backward()
    grad = model.model.layers[0].mlp.up_proj.weight.grad
    assert int((grad != 0).any(1).sum()) == 1


@pytest.mark.parametrize("kind", ["bert", "opt"])
def test_a_feed_forward_part_that_is_no_module_of_its_own_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match="no module of its own"):
        layers(model_of(kind))[0].require_module("it")


def test_the_rand_index_is_scikit_learns() -> None:
    from sklearn.metrics import adjusted_rand_score

    g = torch.Generator().manual_seed(0)
    for a, b in ((3, 3), (5, 2), (8, 8)):
        one, two = torch.randint(a, (60,), generator=g), torch.randint(b, (60,), generator=g)
        assert rand_index(one, two) == pytest.approx(adjusted_rand_score(one, two), abs=1e-12)
        assert rand_index(one, (one + 1) % a) == pytest.approx(1.0)
    assert rand_index(torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long)) == 1.0
