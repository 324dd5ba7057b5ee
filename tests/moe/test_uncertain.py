"""GW-MoE: the entropy rule, the two ends of the threshold, and who gets a gradient."""

import math

import pytest
import torch

from families import model_of
from modelwright.moe.execute import execute, experts, use
from modelwright.moe.reroute import rerouted
from modelwright.moe.routing import select
from modelwright.moe.uncertain import broadcast, entropy, uncertain


def _layer(T: int = 20, E: int = 5):
    x = torch.randn(T, 6, dtype=torch.float64)
    gu, dn = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((E, 8, 6), (E, 6, 4)))
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    return x, gu, dn, logits, *select(logits.softmax(-1), 2)


def test_entropy_of_a_uniform_router() -> None:
    assert float(entropy(torch.full((1, 8), 1 / 8, dtype=torch.float64))) == pytest.approx(-math.log(1 / 8 + 1e-5), abs=1e-12)


def test_threshold_zero_is_the_soft_mixture_and_above_ln_e_nothing_changes() -> None:
    x, gu, dn, logits, index, w = _layer()
    p = logits.softmax(-1)
    every = broadcast(logits, w, index, uncertain(p, 0.0))
    soft = experts(x, *select(p, 5, renormalise=False), gu, dn)
    torch.testing.assert_close(execute(x, every, gu, dn), soft, rtol=1e-12, atol=1e-12)
    none = broadcast(logits, w, index, uncertain(p, math.log(5)))
    assert torch.equal(execute(x, none, gu, dn), experts(x, index, w, gu, dn))


def test_mixed_tokens_are_each_their_own_rule() -> None:
    x, gu, dn, logits, index, w = _layer()
    where = uncertain(logits.softmax(-1), 0.3, "share")
    assert int(where.sum()) == 6 and entropy(logits.softmax(-1))[where].min() >= entropy(logits.softmax(-1))[~where].max()
    y = execute(x, broadcast(logits, w, index, where), gu, dn)
    soft, hard = experts(x, *select(logits.softmax(-1), 5, renormalise=False), gu, dn), experts(x, index, w, gu, dn)
    torch.testing.assert_close(y, torch.where(where[:, None], soft, hard), rtol=1e-12, atol=1e-12)


def test_released_code_sends_the_input_past_the_experts() -> None:
    x, gu, dn, logits, index, w = _layer()
    where = uncertain(logits.softmax(-1), 0.5, "share")
    y = execute(x, broadcast(logits, w, index, where, mode="released"), gu, dn)
    torch.testing.assert_close(y[where], (logits.softmax(-1)[:, -1:] * x)[where])
    torch.testing.assert_close(y[~where], experts(x, index, w, gu, dn)[~where])


def test_limit_counts_per_sequence_in_order_and_padding_is_never_sent() -> None:
    p = torch.full((12, 4), 0.25)
    real = torch.arange(12) != 0
    assert uncertain(p, 1.0, limit=2, real=real, length=6).nonzero().flatten().tolist() == [1, 2, 6, 7]
    assert not uncertain(p, 1.0, limit=0, length=6).any() and int(uncertain(p, 1.0).sum()) == 12
    assert uncertain(p, 0.999, "normalised").all() and not uncertain(p, 1.01, "normalised").any()


def test_matched_scale_has_the_weight_of_the_chosen() -> None:
    _, _, _, logits, index, w = _layer()
    w = w * 0.4
    routing = broadcast(logits, w, index, torch.ones(20, dtype=torch.bool), match_scale=True)
    total = torch.zeros(20, dtype=torch.float64).index_add(0, routing.token, routing.weight)
    torch.testing.assert_close(total, w.sum(1))


@pytest.mark.parametrize(("threshold", "all_learn"), [(0.0, True), (5.0, False)])
def test_every_expert_gets_a_gradient_exactly_when_something_is_broadcast(threshold: float, all_learn: bool) -> None:
    x, gu, dn, logits, index, w = _layer(T=2)
    routing = broadcast(logits, w, index, uncertain(logits.softmax(-1), threshold))
    g = torch.autograd.grad(execute(x, routing, gu, dn).square().sum(), gu)[0]
    assert bool(g.flatten(1).any(1).all()) == all_learn or not all_learn and len(index.unique()) == 5


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe"])
def test_stock_models_above_the_threshold_are_bit_equal(kind: str) -> None:
    model, ids = use(model_of(kind)), torch.randint(3, 96, (2, 9))
    want = model(ids).logits

    def change(layer, logits, w, index, real, threshold=5.0):
        return broadcast(logits, w, index, uncertain(logits.softmax(-1), threshold), real=real)

    with rerouted(model, change):
        assert torch.equal(model(ids).logits, want)
    with rerouted(model, lambda *a: change(*a, threshold=0.0)):
        assert not torch.equal(model(ids).logits, want)
