"""HyperMoE: three forms of one adapter agree, zero init is the base model, and the table is the hypernetwork."""

import pytest
import torch

from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.moe.hyper import HyperNetwork, SetCode, adapt, distinct, table
from modelwright.reshape.hyper_moe import Knobs, hyper_moe

_SMALL = {"a": 4, "b": 6, "e": 5, "hidden": 7, "q": 6, "c": 3}


def _parts(E: int = 6, d: int = 16) -> tuple[SetCode, HyperNetwork]:
    code, hyper = SetCode(E, e=5, hidden=7, q=6).double(), HyperNetwork(d, 3, a=4, b=8, q=6, c=3).double()
    return code, hyper


def _naive(x, index, code, hyper, layer):
    """One adapter per token, as the paper writes it and the official code runs it."""
    out = []
    for t in range(len(x)):
        idle = [j for j in range(len(code.embedding)) if j not in index[t].tolist()]
        s = code.embedding[idle].sum(0)
        z = torch.relu(hyper.mix(torch.cat([code.process(s), hyper.layer_embedding[layer]])))
        down, up = hyper.down(z).view(hyper.d, hyper.a), hyper.up(z).view(hyper.a, hyper.d)
        out.append(torch.relu(x[t] @ down + hyper.down_bias(z)) @ up + hyper.up_bias(z))
    return torch.stack(out)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_grouped_reordered_and_per_token_forms_agree(k: int) -> None:
    code, hyper = _parts()
    x = torch.randn(20, 16, dtype=torch.float64, requires_grad=True)
    index = torch.rand(20, 6).topk(k).indices
    leaves, g = [x, code.embedding, hyper.down.weight, hyper.up.weight, hyper.mix.weight], torch.randn(20, 16, dtype=torch.float64)
    sets, of = index.sort(1).values.unique(dim=0, return_inverse=True)
    z = hyper.codes(code(sets), 1)
    forms = [_naive(x, index, code, hyper, 1), hyper.adapters(z)(x, of), hyper.reordered(x, z[of]), adapt(x, index, code, hyper, 1)]
    grads = [torch.autograd.grad(y, leaves, g, retain_graph=True, allow_unused=True) for y in forms]
    for y, grad in zip(forms[1:], grads[1:], strict=True):
        torch.testing.assert_close(y, forms[0], rtol=1e-10, atol=1e-12)
        for a, b in zip(grad, grads[0], strict=True):
            if b is not None and b.any():
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("experts", "k"), [(6, 1), (6, 2), (6, 3), (64, 11)])
def test_distinct_sets_hold_every_token_s_experts(experts: int, k: int) -> None:
    index = torch.rand(40, experts).topk(k).indices
    sets, of = distinct(index, experts)
    assert torch.equal(sets[of].sort(1).values, index.sort(1).values) and len(sets.unique(dim=0)) == len(sets)


def test_equal_sets_have_equal_adapters_in_any_order_of_choice() -> None:
    code, hyper = _parts()
    x = torch.randn(1, 16, dtype=torch.float64).expand(2, -1)
    y = adapt(x, torch.tensor([[1, 4], [4, 1]]), code, hyper, 0)
    assert torch.equal(y[0], y[1])
    assert not torch.equal(adapt(x, torch.tensor([[1, 4], [4, 2]]), code, hyper, 0)[1], y[1])


@pytest.mark.parametrize("k", [1, 2])
def test_table_is_the_hypernetwork_s_answer(k: int) -> None:
    code, hyper = _parts()
    x, index = torch.randn(20, 16, dtype=torch.float64), torch.rand(20, 6).topk(k).indices
    adapters, number = table(code, hyper, 2, k)
    torch.testing.assert_close(adapters(x, number[tuple(index.T)]), adapt(x, index, code, hyper, 2), rtol=1e-10, atol=1e-12)


def test_no_table_of_too_many_sets() -> None:
    with pytest.raises(UserError, match="too many sets"):
        table(*_parts(), 0, 3)


def test_paper_sizes_give_the_published_number_of_generator_weights() -> None:
    with torch.device("meta"):
        hyper = HyperNetwork(768, 12)
    assert hyper.down.weight.numel() + hyper.up.weight.numel() == 2 * 128 * 768 * 64 == 12_582_912


def test_zero_init_is_the_base_bit_for_bit_and_still_learns(tiny) -> None:
    source, ids = Checkpoint(tiny("mixtral")), torch.randint(3, 96, (2, 11))
    base = source.model()
    built, promise = hyper_moe(source, Knobs(init="zero", **_SMALL))
    assert promise == "same function" and torch.equal(built.model.eval()(ids).logits, base(ids).logits)
    built.model.train()(ids, labels=ids).loss.backward()
    assert built.model.model.hyper.up.weight.grad.any() and built.model.model.hyper.up_bias.weight.grad.any()
    paper, promise = hyper_moe(source, Knobs(**_SMALL))
    drift = (paper.model.eval()(ids).logits - base(ids).logits).abs().max().item()
    assert promise == "changed function" and 0 < drift < 0.05


def test_sets_of_experts_have_codes_of_their_own_from_the_start(tiny) -> None:
    sizes = {"e": 32, "hidden": 32, "q": 32, "b": 32}
    model = hyper_moe(Checkpoint(tiny("mixtral")), Knobs(**sizes))[0].model
    torch.manual_seed(0)
    bare = SetCode(4, **{k: sizes[k] for k in ("e", "hidden", "q")}), HyperNetwork(32, 2, b=32, q=32)
    sets = torch.combinations(torch.arange(4), 2)
    spreads = []
    for code, hyper in ((model.model.layers[0].mlp.code, model.model.hyper), bare):
        z = hyper.codes(code(sets), 0).detach()
        spreads.append(float(z.std(0).mean() / z.mean()))
    assert spreads[0] > spreads[1] / 2 > 0.1


def test_precomputed_model_saves_and_is_the_same(tiny, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = hyper_moe(Checkpoint(tiny("mixtral")), Knobs(**_SMALL))[0].model.eval(), torch.randint(3, 96, (2, 11))
    for p in model.model.hyper.parameters():
        torch.nn.init.normal_(p, std=0.3)
    want = model(ids).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, want)
    torch.testing.assert_close(again.precompute()(ids).logits, want, rtol=1e-4, atol=1e-4)
    assert again.model.layers[0].mlp.table_number is not None
    assert not [n for n in again.state_dict() if "table" in n]


def _loud(tiny, **settings):
    model = hyper_moe(Checkpoint(tiny("mixtral")), Knobs(**_SMALL))[0].model.eval()
    for p in model.model.hyper.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.config.update(settings)
    return model


def test_a_table_changes_type_with_its_model(tiny) -> None:
    model, ids = _loud(tiny).precompute().to(torch.bfloat16), torch.randint(3, 96, (2, 11))
    assert model.model.layers[0].mlp.table_down.dtype == model(ids).logits.dtype == torch.bfloat16


def test_a_model_in_training_learns_though_a_table_was_made(tiny) -> None:
    model, ids = _loud(tiny).train().precompute(), torch.randint(3, 96, (2, 11))
    model(ids, labels=ids).loss.backward()
    assert model.model.hyper.up.weight.grad.any()


@pytest.mark.parametrize("change", ["load", "train"])
def test_a_table_is_dropped_when_the_weights_change(change: str, tiny) -> None:
    model, ids = _loud(tiny).precompute(), torch.randint(3, 96, (2, 11))
    if change == "load":
        model.load_state_dict({n: torch.randn_like(p) * 0.3 for n, p in model.state_dict().items()})
    else:
        model.train()
        with torch.no_grad():
            model.model.hyper.up.weight.neg_()
    found = model.eval()(ids).logits
    assert torch.equal(found, model.precompute(False)(ids).logits)


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("length", [2, 40])  # more sets than tokens, and the other way round
def test_autocast_runs_forward_and_back(made: bool, length: int, tiny) -> None:
    model, ids = _loud(tiny).precompute(made), torch.randint(3, 96, (1, length))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(model(ids, labels=ids).loss.item(), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("made", [False, True])
def test_compiled_model_is_the_same(made: bool, tiny) -> None:
    model, ids = _loud(tiny).precompute(made), torch.randint(3, 96, (2, 20))  # more tokens than sets: products are grouped
    want = model(ids).logits
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(ids).logits, want, rtol=1e-4, atol=1e-4)


def test_a_saved_folder_opens_without_its_head(tiny, tmp_path) -> None:
    from transformers import AutoModel

    model, ids = _loud(tiny), torch.randint(3, 96, (2, 11))
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_a_tuple_instead_of_a_dict_and_generation_with_router_logits(tiny) -> None:
    model, ids = _loud(tiny, output_router_logits=True), torch.randint(3, 96, (2, 11))
    want = model(ids)
    found = model(ids, return_dict=False)
    assert isinstance(found, tuple) and len(found) == len(want.to_tuple()) and torch.equal(found[1], want.logits)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    assert model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape == (2, 14)


def test_gradient_checkpointing_changes_no_gradient(tiny) -> None:
    found, ids = [], torch.randint(3, 96, (2, 11))
    for recompute in (False, True):
        model = hyper_moe(Checkpoint(tiny("mixtral")), Knobs(**_SMALL))[0].model.train()
        if recompute:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False, output_router_logits=True).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


def test_other_models_are_refused(tiny) -> None:
    with pytest.raises(UserError, match="not Mixtral's"):
        hyper_moe(Checkpoint(tiny("llama")), Knobs())
