"""RMoE: the cell is torch's, gradients reach earlier routers exactly when they should, and the state survives checkpointing."""

import csv
import json

import pytest
import torch

from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.models.rmoe import RMoEConfig, RMoEForCausalLM
from modelwright.moe.execute import use
from modelwright.moe.rmoe import RecurrentRouter, RouterCell, extra_parameters, gain_by_depth, mutual_information, similarity
from modelwright.moe.watch import watch
from modelwright.reshape.rmoe import Knobs, rmoe

_SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}


def _model(layers: int = 4, seed: int = 0, **changes) -> RMoEForCausalLM:
    torch.manual_seed(seed)
    values = {"num_hidden_layers": layers, "num_local_experts": 4, "router_width": 8, "max_position_embeddings": 64, **_SIZES, **changes}
    model = RMoEForCausalLM(RMoEConfig(**values))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def _ids() -> torch.Tensor:
    return torch.randint(3, 96, (2, 11))


def test_cell_is_torch_s_gru_and_the_written_equations() -> None:
    cell, u, h = RouterCell(6).double(), torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    core = cell.core
    (ir, iz, in_), (hr, hz, hn) = (
        (x @ w.T + b).chunk(3, 1) for x, w, b in ((u, core.weight_ih, core.bias_ih), (h, core.weight_hh, core.bias_hh))
    )
    z = (iz + hz).sigmoid()
    want = (1 - z) * (in_ + (ir + hr).sigmoid() * hn).tanh() + z * h
    torch.testing.assert_close(cell(u, h), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["gru", "rnn", "lstm"])
def test_first_layer_is_a_cell_on_a_zero_state_and_passes_it_on(kind: str) -> None:
    cell, router, x = RouterCell(6, kind), RecurrentRouter(16, 6, 4, 2), torch.randn(5, 16)
    logits, weights, index, state = router(x, router.begin(x, cell), cell)
    assert state.shape == (5, 12 if kind == "lstm" else 6)
    torch.testing.assert_close(logits, state[:, :6] @ router.weight.T)
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    assert not torch.equal(router(x, state, cell)[0], logits)


def test_not_passing_equals_passing_with_one_layer_only() -> None:
    ids = _ids()
    for layers, equal in ((1, True), (2, False)):
        one, other = (_model(layers, router_passing=p) for p in ("full", "none"))
        assert torch.equal(one(ids).logits, other(ids).logits) == equal


@pytest.mark.parametrize(("passing", "flows"), [("full", True), ("detach", False), ("none", False)])
def test_gradient_of_a_router_reaches_earlier_routers_only_when_passed(passing: str, flows: bool) -> None:
    cell, x = RouterCell(6), torch.randn(5, 16)
    first, second = (RecurrentRouter(16, 6, 4, 2, passing) for _ in range(2))
    state = first(x, first.begin(x, cell), cell)[3]
    second(x, state, cell)[1][:, 0].sum().backward()
    reached = first.project.weight.grad is not None and bool(first.project.weight.grad.any())
    assert reached == flows and second.project.weight.grad.any()


def test_residual_adds_the_previous_layer_s_probabilities_to_the_scores() -> None:
    cell, x = RouterCell(6), torch.randn(50, 16)
    first, second = (RecurrentRouter(16, 6, 4, 2, "none", 0.5) for _ in range(2))
    logits, *_, state = first(x, first.begin(x, cell), cell)
    after, weights, index, _ = second(x, state, cell)
    scores = after.softmax(-1) + 0.5 * logits.softmax(-1)
    assert torch.equal(index, scores.topk(2).indices)
    torch.testing.assert_close(weights, scores.gather(1, index) / scores.gather(1, index).sum(1, keepdim=True))


def test_what_a_residual_adds_is_the_probabilities_and_not_the_scores_handed_on() -> None:
    """From the third router on the two differ: scores would carry the first router's share on and on."""
    cell, x = RouterCell(6), torch.randn(50, 16)
    routers = [RecurrentRouter(16, 6, 4, 2, "none", 0.5) for _ in range(3)]
    for router in routers:
        torch.nn.init.normal_(router.weight)
    state, probs = routers[0].begin(x, cell), []
    for router in routers:
        logits, weights, index, state = router(x, state, cell)
        probs.append(logits.softmax(-1))
    scores = probs[2] + 0.5 * probs[1]
    assert torch.equal(index, scores.topk(2).indices)
    torch.testing.assert_close(weights, scores.gather(1, index) / scores.gather(1, index).sum(1, keepdim=True))
    assert not torch.equal((scores + 0.25 * probs[0]).topk(2).indices, index)


def test_parameter_count_of_the_published_model_is_3_59_million() -> None:
    assert extra_parameters(p=128, d=1280, experts=16, layers=24) == 3_588_864
    model, plain = _model(3), 3 * 4 * 32
    routers = sum(p.numel() for n, p in model.named_parameters() if ".gate." in n or "router_cell" in n)
    assert routers - plain == extra_parameters(8, 32, 4, 3)


@pytest.mark.parametrize("residual", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient_with_dense_layers_between(residual: float, reentrant: bool) -> None:
    ids, found = _ids(), []
    for recompute in (False, True):
        model = _model(dense_layers=[1], router_residual=residual).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids, output_router_logits=True, use_cache=False).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


def test_a_dense_layer_does_not_reset_the_state() -> None:
    """The official port hands an undefined state on; here layer 2 sees what layer 0 decided."""
    model, ids = _model(3, dense_layers=[1]), _ids()
    before = model(ids, output_router_logits=True).router_logits
    assert len(before) == 2
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
        first = model.model.layers[0].mlp
        first.experts.down_proj.zero_()  # layer 0 reaches layer 2 through the state alone
        still = model(ids, output_router_logits=True).router_logits[1]
        first.gate.project.weight.neg_()
    assert not torch.equal(model(ids, output_router_logits=True).router_logits[1], still)


def test_tokens_are_independent_and_decoding_is_the_whole_pass() -> None:
    model, ids = _model().eval(), _ids()
    block, cell = model.model.layers[0].mlp, model.model.router_cell
    x, p = torch.randn(1, 7, 32), torch.randperm(7)
    torch.testing.assert_close(block(x[:, p], None, cell)[0], block(x, None, cell)[0][:, p])
    cached = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0))


def test_balance_loss_is_per_layer_and_without_padding() -> None:
    model, ids = _model(), _ids()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    a = model(ids, attention_mask=mask, output_router_logits=True).aux_loss
    ids[1, 6:] = 5
    torch.testing.assert_close(model(ids, attention_mask=mask, output_router_logits=True).aux_loss, a)
    with watch(model) as seen:
        model(ids, attention_mask=mask)
    assert seen.counts.sum(1).tolist() == [34] * 4


def test_balance_loss_counts_the_experts_that_a_residual_chose() -> None:
    from modelwright.moe.balance import counts_of, switch

    model, ids, chosen = _model(router_residual=4.0), _ids(), []
    hooks = [layer.mlp.gate.register_forward_hook(lambda m, a, out: chosen.append(out[2])) for layer in model.model.layers]
    out = model(ids, output_router_logits=True)
    assert len(hooks) == len(chosen) == 4
    assert any(not torch.equal(i.sort(1).values, x.topk(2).indices.sort(1).values) for i, x in zip(chosen, out.router_logits, strict=True))
    want = [switch(x.softmax(-1), counts_of(i, 4)) for i, x in zip(chosen, out.router_logits, strict=True)]
    torch.testing.assert_close(out.aux_loss, torch.stack(want).mean())


def test_a_tuple_instead_of_a_dict_and_generation_with_router_logits() -> None:
    model, ids = _model(output_router_logits=True).eval(), _ids()
    want, found = model(ids), model(ids, return_dict=False)
    assert isinstance(found, tuple) and len(found) == len(want.to_tuple()) and torch.equal(found[1], want.logits)
    assert torch.equal(model.model(ids, return_dict=False)[0], model.model(ids).last_hidden_state)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    assert model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape == (2, 14)


def test_executors_agree() -> None:
    model, ids = _model().eval(), _ids()
    want = use(model, "eager")(ids).logits
    torch.testing.assert_close(use(model)(ids).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_from_a_dense_model_the_function_is_unchanged(kind: str, tiny) -> None:
    source = Checkpoint(tiny(kind))
    built, promise = rmoe(source, Knobs(experts=4, p=8, dense=[0]))
    ids = _ids()
    assert promise == "same function"
    torch.testing.assert_close(built.model.eval()(ids).logits, source.model()(ids).logits, rtol=1e-4, atol=1e-4)


def test_from_mixtral_the_experts_stay(tiny) -> None:
    source = Checkpoint(tiny("mixtral"))
    built, promise = rmoe(source, Knobs(p=8))
    old, new = source.model().state_dict(), built.model.state_dict()
    assert promise == "changed function"
    assert all(torch.equal(new[n], t) for n, t in old.items() if ".mlp.gate." not in n)


@pytest.mark.parametrize(
    ("kind", "knobs", "words"),
    [
        ("qwen3_moe", {}, "not Mixtral's"),
        ("mixtral", {"dense": [0]}, "experts already"),
        ("mixtral", {"experts": 16}, "experts=16 but the model has experts=4"),
        ("mixtral", {"top_k": 4}, "top_k=4 but the model has top_k=2"),
        ("llama", {"dense": [7]}, "layer 7"),
    ],
)
def test_what_cannot_be_is_said(kind: str, knobs: dict, words: str, tiny) -> None:
    with pytest.raises(UserError, match=words):
        rmoe(Checkpoint(tiny(kind)), Knobs(p=8, **knobs))


def test_mutual_information_of_equal_and_of_independent_gates() -> None:
    a = torch.rand(200_000)
    assert mutual_information(a, a) > 4.4 and mutual_information(a, torch.rand(200_000)) < 0.05


def test_published_depth_table_and_similarities(shared) -> None:
    with open(shared / "rmoe_analysis" / "bpc_by_layers.csv") as file:
        rows = list(csv.DictReader(file))
    assert gain_by_depth(rows) == {6: 0.001, 12: 0.007, 18: 0.008, 24: 0.016, 32: 0.010}
    assert gain_by_depth(rows, "test_bpc")[24] == 0.019
    info = {n: json.loads((shared / "rmoe_analysis" / f"similarity_info_{n}.json").read_text()) for n in (12, 18, 24, 32)}
    found = {n: [round(similarity(i)[m], 3) for m in ("RMoE", "SMoE")] for n, i in info.items()}
    assert found == {12: [0.824, 0.831], 18: [0.942, 0.832], 24: [1.043, 0.914], 32: [0.893, 1.044]}, "not always less similar"
    base = similarity(json.loads((shared / "rmoe_analysis" / "similarity_info_baselines.json").read_text()))
    assert round(base["HyperMoE"], 3) == 0.762 and round(base["SMoE"], 3) == 0.832
    last = json.loads((shared / "rmoe_analysis" / "mega.json").read_text())["10000"]
    big = similarity({m: {"sims": last[f"{m}_expert_sims"]} for m in ("SMoE", "RMoE")}, "sims")
    assert {m: round(v, 3) for m, v in big.items()} == {"SMoE": 0.439, "RMoE": 0.386}
