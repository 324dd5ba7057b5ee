"""Measures D1 to D4 on tiny mixtures."""

import math

import pytest
import torch
from test_expert_weights import layer_of, random_experts

from modelwright.core.data.rows import IGNORE, Rows
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.inspect.mixture import outputs as module
from modelwright.inspect.mixture.advice import advise, groups
from modelwright.inspect.mixture.outputs import LayerOutputs, all_outputs, look, pair_similarity, rank_counts
from modelwright.inspect.mixture.weights import compare
from modelwright.moe.load import expert_load
from modelwright.moe.watch import routers

KINDS = ["mixtral", "qwen2_moe", "olmoe", "granitemoe", "granitemoeshared"]


def ragged() -> Rows:
    ids, lengths = torch.randint(3, 96, (3, 12)), torch.tensor([12, 7, 9])
    return Rows(ids.int(), torch.where(torch.arange(12) < lengths[:, None], ids, IGNORE).int(), lengths)


def test_angular_similarity_is_one_half_and_zero_for_equal_orthogonal_and_opposite() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    angle, cosine = pair_similarity(x[None])
    assert angle[0, 0].tolist() == pytest.approx([1, 1, 0.5, 0]) and cosine[0, 0].tolist() == pytest.approx([1, 1, 0, -1])
    angle, _ = pair_similarity(torch.randn(50, 6, 8))
    assert angle.min() >= 0 and angle.max() <= 1 and torch.isfinite(angle).all()
    assert torch.equal(angle.diagonal(dim1=1, dim2=2), torch.ones(50, 6, dtype=torch.float64))


def test_equal_outputs_have_no_nan() -> None:
    angle, _ = pair_similarity(torch.randn(20, 1, 8).expand(20, 5, 8))
    assert (angle - 1).abs().max() < 1e-7


def test_ranks_are_on_the_diagonal_where_the_score_is_the_norm() -> None:
    norms = torch.rand(30, 5)
    assert torch.equal(rank_counts(norms, norms), torch.eye(5, dtype=torch.long) * 30)
    counts = rank_counts(norms, -norms)
    assert torch.equal(counts, torch.eye(5, dtype=torch.long).flip(1) * 30)
    assert int(rank_counts(norms, torch.rand(30, 5)).sum()) == 150


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_all_experts_are_those_of_the_formula(kind: str, tiny) -> None:
    model = Checkpoint(tiny(kind)).model()
    experts = module.block_of(model, routers(model)[0][0]).experts
    x = torch.randn(6, 32)
    with torch.no_grad():
        found = all_outputs(experts, x, 4)
        for e in range(4):
            gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, 1)
            torch.testing.assert_close(found[:, e], (torch.nn.functional.silu(gate) * up) @ experts.down_proj[e].T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_look_counts_what_the_model_did_and_no_padding(kind: str, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = Checkpoint(tiny(kind)).model(), ragged()
    inputs: list[torch.Tensor] = []
    handle = routers(model)[1][1].register_forward_hook(lambda m, a, o: inputs.append(a[0].detach().reshape(-1, 32)))
    monkeypatch.setattr(module, "_VALUES", 4 * 32 * 5)  # several parts
    found = look(model, rows, batch=2)
    handle.remove()
    assert [o.tokens for o in found] == [28, 28]
    torch.testing.assert_close(torch.stack([o.share for o in found]).float(), expert_load(model, rows))
    block = module.block_of(model, routers(model)[1][0])
    real = (torch.arange(12) < rows.lengths[:, None]).flatten()
    x = torch.cat([inputs[0], inputs[1][:9]])[torch.cat([real[:24], torch.ones(9, dtype=torch.bool)])]
    with torch.no_grad():
        y = all_outputs(block.experts, x, 4).double()
    want = sum(1 - math.acos(float(torch.nn.functional.cosine_similarity(t[0], t[2], dim=0))) / math.pi for t in y)
    assert float(found[1].angle[0, 2]) == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(found[1].norm[:4], y.norm(dim=2).sum(0), rtol=1e-5, atol=1e-5)
    assert found[0].members == ["0", "1", "2", "3", *(["shared"] if kind == "qwen2_moe" else [])]


def test_a_look_leaves_no_hook_and_changes_no_logit(tiny) -> None:
    model = Checkpoint(tiny("mixtral")).model()
    ids = torch.randint(3, 96, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
        look(model, ragged())
        assert torch.equal(model(ids).logits, before)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_chosen_experts_are_the_routers_own(tiny) -> None:
    model, rows = Checkpoint(tiny("mixtral")).model(), ragged()
    with torch.no_grad():
        logits = model(rows.ids[:1].long(), output_router_logits=True).router_logits[0]
    found = look(model, rows, keep=10)[0].chosen
    assert len(found) == 10
    assert [sorted(c) for c in found] == logits.topk(2).indices.sort(1).values[:10].tolist()


def test_act_of_the_gate_is_summed_by_expert_and_neuron(tiny) -> None:
    model, rows = Checkpoint(tiny("mixtral")).model(), ragged()
    seen: list[torch.Tensor] = []
    handle = routers(model)[0][1].register_forward_hook(lambda m, a, o: seen.append(a[0].detach().reshape(-1, 32)))
    found = look(model, rows, batch=3)[0].hidden
    handle.remove()
    x = seen[0][(torch.arange(12) < rows.lengths[:, None]).flatten()]
    weight = module.block_of(model, routers(model)[0][0]).experts.gate_up_proj[2, :48]
    torch.testing.assert_close(found[2].float(), torch.nn.functional.silu(x @ weight.T).abs().sum(0).detach(), rtol=1e-4, atol=1e-4)


def test_advice_names_copies_dead_rows_and_idle_experts() -> None:
    experts = random_experts(4)
    experts[3] = experts[1]
    router = torch.randn(4, 12)
    router[2] = 0
    o = LayerOutputs(["0", "1", "2", "3"], 4, tokens=400)
    o.angle, o.load = torch.eye(4, dtype=torch.float64) * 400, torch.tensor([300.0, 300.0, 1.0, 199.0], dtype=torch.float64)
    given = advise(7, compare(layer_of(experts, router)), {}, o, 2)
    assert [(a.kind, a.experts) for a in given] == [("copies", [1, 3]), ("dead", [2]), ("dead", [2])]
    assert all(a.layer == 7 and a.act for a in given)


def test_advice_wants_fewer_experts_where_one_does_the_work() -> None:
    o = LayerOutputs(list("01234567"), 8, tokens=1000)
    o.angle, o.load = torch.eye(8, dtype=torch.float64), torch.tensor([930.0] + [10.0] * 7, dtype=torch.float64)
    assert "fewer" in [a.kind for a in advise(0, None, {}, o, 1)]
    o.load = torch.full((8,), 125.0, dtype=torch.float64)
    assert advise(0, None, {}, o, 1) == []


def test_no_expert_is_called_dead_on_too_few_tokens() -> None:
    o = LayerOutputs(["0", "1", "2", "3"], 4, tokens=10)
    o.angle, o.load = torch.eye(4, dtype=torch.float64), torch.tensor([10.0, 10.0, 0.0, 0.0], dtype=torch.float64)
    assert advise(0, None, {}, o, 2) == []


def test_groups_are_connected() -> None:
    assert groups([(0, 2), (2, 5), (3, 4)], 7) == [[0, 2, 5], [3, 4]]
