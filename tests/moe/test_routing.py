"""Stages of routing: what is chosen, with which weight, in which order slots fill, and what padding never does."""

import math

import pytest
import torch

from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.moe.layer import ExpertChoice, Layer, TokenChoice
from modelwright.moe.routing import Routing, capacity, expert_choice, place, score, select, top_k


def _probs(T: int = 40, E: int = 8) -> torch.Tensor:
    return torch.randn(T, E, dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_ties_choose_the_lower_index(k: int) -> None:
    assert top_k(torch.zeros(5, 8), k).tolist() == [list(range(k))] * 5
    p = torch.rand(50, 8)
    assert torch.equal(top_k(p, k), p.topk(k).indices)


def test_softmax_then_renormalise_is_softmax_over_the_chosen_logits() -> None:
    logits = torch.randn(30, 8, dtype=torch.float64)
    index, weights = select(logits.softmax(-1), 2)
    torch.testing.assert_close(weights, logits.gather(1, index).softmax(-1), rtol=1e-12, atol=0)


def test_scores_are_fp32_under_autocast_and_jitter_touches_the_router_only() -> None:
    x, w = torch.randn(4, 16), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits, probs = score(x.bfloat16(), w.bfloat16())
    assert logits.dtype == probs.dtype == torch.float32
    assert not torch.equal(score(x, w, jitter=0.01)[0], score(x, w)[0])


def test_weights_without_renormalisation_are_the_scores_times_the_scale() -> None:
    p = _probs()
    index, weights = select(p, 3, renormalise=False, scale=2.5)
    assert torch.equal(weights, p.gather(1, index) * 2.5)


def test_one_renormalised_expert_is_refused_and_plain_top_1_trains_the_router() -> None:
    with pytest.raises(UserError, match="never learn"):
        select(_probs(), 1)
    layer = Layer(TokenChoice(16, 4, 1), 16, 8, 4)
    layer(torch.randn(10, 16))[0].square().sum().backward()
    assert float(layer.router.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(("renormalise", "want"), [(False, [0.6439, 0.2369]), (True, [0.7311, 0.2689])])
def test_softmax_is_over_all_experts_before_the_choice(renormalise: bool, want: list[float]) -> None:
    """Megatron-LM#955, litgpt#1286, mlxcel#391: the two orders agree only where the chosen weights are renormalised."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    index, weights = select(logits.softmax(-1), 2, renormalise=renormalise)
    assert index.tolist() == [[0, 1]] and weights[0].tolist() == pytest.approx(want, abs=5e-5)
    assert float(weights.sum()) == pytest.approx(1.0 if renormalise else 0.8808, abs=5e-5)


@pytest.mark.parametrize("renormalise", [False, True])
def test_a_stock_router_s_own_flag_says_whether_weights_are_renormalised(renormalise: bool, tmp_path) -> None:
    model = model_of("qwen2_moe", norm_topk_prob=renormalise)
    model.save_pretrained(tmp_path)
    again = Checkpoint(tmp_path).model()
    assert again.config.norm_topk_prob == renormalise
    gate, x = again.model.layers[0].mlp.gate, torch.randn(9, 32)
    logits, weights, index = gate(x)
    ours = select(logits.softmax(-1), 2, renormalise=renormalise)
    assert torch.equal(index, ours[0])
    torch.testing.assert_close(weights, ours[1])


def test_top_1_weights_keep_their_axis_and_the_router_learns() -> None:
    """minimind#858 and #859, megablocks#87: without the axis of k, weights were normalised over the tokens."""
    logits = torch.randn(3, 4, requires_grad=True)
    index, weights = select(logits.softmax(-1), 1, renormalise=False)
    assert index.shape == weights.shape == (3, 1) and torch.equal(weights[:, 0], logits.softmax(-1).amax(1))
    (gradient,) = torch.autograd.grad((weights * torch.tensor([[1.0], [2.0], [3.0]])).sum(), logits)
    assert gradient.abs().sum(1).min() > 1e-3


def test_selection_bias_moves_the_choice_and_not_the_weight() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]])
    index, weights = select(p, 1, renormalise=False, bias=torch.tensor([0.0, 0.0, 1.0]))
    assert index.tolist() == [[2]] and weights.tolist() == [[pytest.approx(0.2)]]


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_no_expert_is_chosen_twice_where_few_scores_are_finite(k: int) -> None:
    scores = torch.full((2, 6), -math.inf)
    scores[0, 4] = 1.0
    assert top_k(scores, k).tolist() == [[4, 0, 1, 2, 3][:k], [0, 1, 2, 3, 4][:k]]


def test_group_limited_choice_takes_no_tokens_at_all() -> None:
    assert TokenChoice(8, 4, 2, kind="sigmoid", groups=2)(torch.zeros(0, 8)).token.shape == (0,)


def test_group_limited_choice_is_deepseek_v3_s() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=16, moe_intermediate_size=8, n_routed_experts=16, num_experts_per_tok=3, n_group=4, topk_group=2, n_shared_experts=1,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    moe = DeepseekV3MoE(config)
    torch.nn.init.normal_(moe.gate.weight)
    moe.gate.e_score_correction_bias.normal_(0, 0.3)
    x = torch.randn(50, 16)
    found = moe.gate(x)
    want_w, want_i = (found[1], found[2]) if isinstance(found, tuple) else moe.route_tokens_to_experts(found)
    logits, s = score(x, moe.gate.weight, "sigmoid")
    index, weights = select(s, 3, bias=moe.gate.e_score_correction_bias, groups=4, top_groups=2, scale=2.5)
    assert torch.equal(index.sort(1).values, want_i.sort(1).values)
    torch.testing.assert_close(weights.sum(1), want_w.sum(1))
    torch.testing.assert_close(weights.gather(1, index.argsort(1)), want_w.gather(1, want_i.argsort(1)))


@pytest.mark.parametrize("order", ["position", "choice", "priority"])
def test_kept_and_dropped_make_all_slots_and_infinite_capacity_drops_nothing(order) -> None:
    p = (_probs() * torch.linspace(1, 4, 8)).softmax(-1)
    index, _ = select(p, 2)
    for factor in (0.1, 0.5, 1.0):
        slots = capacity(40, 8, 2, factor)
        kept = place(index, 8, slots, order=order, priority=p.amax(1))
        counts = index[kept].bincount(minlength=8)
        assert counts.max() <= slots and int(counts.sum()) + int((~kept).sum()) == 80
        assert torch.equal(counts, index.flatten().bincount(minlength=8).clamp(max=slots)), "a free slot is used"
    assert place(index, 8, capacity(40, 8, 2, math.inf), order=order, priority=p.amax(1)).all()


def test_orders_of_filling() -> None:
    index = torch.tensor([[0, 1], [1, 0], [1, 0]])
    assert place(index, 2, 2).tolist() == [[True, True], [True, True], [False, False]]
    assert place(index, 2, 2, order="choice").tolist() == [[True, False], [True, True], [True, False]]
    priority = torch.tensor([0.1, 0.2, 0.9])
    assert place(index, 2, 2, order="priority", priority=priority).tolist() == [[True, False], [True, False], [True, True]]
    assert place(index, 2, 1, sequence=torch.tensor([0, 1, 1])).tolist() == [[True, True], [True, True], [False, False]]


def test_padding_takes_no_slot_and_counts_nowhere() -> None:
    p, real = _probs(), torch.arange(40) % 3 > 0
    index, weights = select(p, 2)
    slots = capacity(int(real.sum()), 8, 2, 0.5)
    kept = place(index, 8, slots, real=real)
    assert torch.equal(kept[real], place(index[real], 8, slots)) and not kept[~real].any()
    routing = Routing.of(p.log(), p, index, weights, kept, real)
    assert real[routing.token].all() and routing.num_assignments == 2 * int(real.sum())
    assert routing.record().dropped == routing.num_assignments - int(kept.sum())


def test_expert_choice_loads_are_equal_and_a_causal_model_is_warned() -> None:
    logits = torch.randn(30, 4)
    with pytest.warns(UserWarning, match="never decode"):
        routing = expert_choice(logits, 2.0)
    assert routing.counts().tolist() == [15] * 4
    assert torch.equal(routing.weight, logits.softmax(-1)[routing.token, routing.expert])
    real = torch.arange(30) < 20
    routing = ExpertChoice(16, 4, causal=False, renormalise=True)(torch.randn(30, 16), real)
    assert routing.counts().tolist() == [10] * 4 and int(routing.token.max()) < 20
    sums = torch.zeros(30).index_add(0, routing.token, routing.weight)
    torch.testing.assert_close(sums[sums > 0], torch.ones(int((sums > 0).sum())), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("tokens", "factor", "slots"), [(10, 1.0, 3), (30, 2.5, 19), (8, 1.0, 2), (3, 0.1, 1), (2, 9.0, 2)])
def test_expert_choice_rounds_its_capacity_up_and_takes_no_token_twice(tokens: int, factor: float, slots: int) -> None:
    """C = ceil(T factor / E) with 4 experts, and at most all tokens."""
    routing = expert_choice(torch.randn(tokens, 4), factor, causal=False)
    assert routing.counts().tolist() == [slots] * 4 and routing.num_assignments == 4 * slots
    assert len(set(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))) == 4 * slots
    real = torch.arange(tokens + 5) < tokens  # padding does not raise it
    padded = expert_choice(torch.randn(tokens + 5, 4), factor, causal=False, real=real)
    assert padded.counts().tolist() == [slots] * 4 and int(padded.token.max()) < tokens


def test_output_of_a_token_depends_on_others_only_under_a_capacity() -> None:
    x, y = torch.randn(12, 16), torch.randn(12, 16)
    y[0] = x[0]
    for factor, alone in ((math.inf, True), (0.2, False)):
        torch.manual_seed(0)
        layer = Layer(TokenChoice(16, 4, 2, factor=factor, order="priority"), 16, 8, 4)
        layer.router.weight.data *= 50
        rows = {tuple(layer(z)[0][0].tolist()) for z in (x, y, torch.cat([x[:1], 100 * y[1:]]))}
        assert (len(rows) == 1) == alone


def test_dropped_tokens_give_zero_or_their_scored_input_and_the_shared_expert_adds() -> None:
    x = torch.randn(12, 16)
    router = TokenChoice(16, 4, 1, factor=0.3)
    layer = Layer(router, 16, 8, 4, dropped="identity")
    y, routing = layer(x)
    lost = torch.ones(12, dtype=torch.bool).index_fill(0, routing.token, False)
    assert lost.any() and torch.equal(y[lost], x[lost] * routing.probs.amax(1, keepdim=True)[lost])
    layer.dropped = "zero"
    assert not layer(x)[0][lost].any()
    for mix in ("sum", "gated"):
        both = Layer(router, 16, 8, 4, shared=6, mix=mix)
        both.load_state_dict(layer.state_dict(), strict=False)
        gate, up = both.shared_up(x).chunk(2, -1)
        part = both.shared_down(torch.nn.functional.silu(gate) * up)
        part = part if mix == "sum" else part * both.shared_gate(x).sigmoid()
        torch.testing.assert_close(both(x)[0], layer(x)[0] + part)
