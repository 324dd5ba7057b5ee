"""The executor: equal to transformers' own on every layout, exact gradients, and right where the others stop."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from families import model_of
from modelwright.moe import execute
from modelwright.moe.execute import experts, use
from modelwright.moe.routing import Routing, select

STOCK = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared")


def _layer(T: int = 24, E: int = 5, d: int = 16, f: int = 12, k: int = 2, dtype=torch.float32):
    w = torch.rand(T, k, dtype=dtype)
    shapes = ((T, d), (E, 2 * f, d), (E, d, f))
    x, gu, dn = (torch.randn(s, dtype=dtype).div(s[-1] ** 0.5).requires_grad_() for s in shapes)
    return x, select(torch.rand(T, E), k)[0] if k > 1 else torch.randint(0, E, (T, 1)), w.requires_grad_(), gu, dn


def _plain(x, index, w, gu, dn, act=F.silu):
    gate, up = torch.einsum("tkfd,td->tkf", gu[index], x).chunk(2, -1)
    return torch.einsum("tk,tkf,tkdf->td", w, act(gate) * up, dn[index])


def _agree(args, act=F.silu, expand: bool = False) -> None:
    x, index, w, gu, dn = args
    y, want = experts(x, index, w, gu, dn, act), _plain(x, index, w, gu, dn, act)
    tolerance = 1e-6 if x.dtype == torch.float32 else 1e-12
    scale = max(1.0, float(want.detach().abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(y, want, rtol=0, atol=tolerance * scale)
    g = torch.randn(x.shape[1], dtype=x.dtype).expand_as(y) if expand else torch.randn_like(y)
    leaves = [t for t in (x, w, gu, dn) if t.requires_grad]
    for a, b in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(want, leaves, g), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2 * tolerance * max(1.0, float(b.abs().max()) if b.numel() else 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "f"), [(16, 12), (7, 5), (50, 6)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_equals_the_plain_sum(dtype, d, f, k) -> None:
    _agree(_layer(d=d, f=f, k=k, dtype=dtype))


@pytest.mark.parametrize("act", [F.gelu, F.relu, torch.nn.SiLU(), torch.tanh], ids=["gelu", "relu", "silu", "tanh"])
def test_any_activation(act) -> None:
    _agree(_layer(), act)


def test_expanded_gradients_empty_experts_one_expert_one_token_and_none() -> None:
    _agree(_layer(), expand=True)
    x, index, w, gu, dn = _layer()
    _agree((x, torch.stack([torch.zeros(24, dtype=torch.long), torch.full((24,), 3)], 1), w, gu, dn))
    _agree((x, torch.zeros(24, 2, dtype=torch.long), w, gu, dn))
    _agree((x[:1].detach().requires_grad_(), index[:1], w[:1].detach().requires_grad_(), gu, dn))
    y = experts(x[:0], index[:0], w[:0], gu, dn)
    assert y.shape == (0, 16)
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), (gu, dn)))


@pytest.mark.parametrize("what", ["transposed", "sliced", "odd offset", "strided tokens"])
def test_weights_and_tokens_of_any_layout(what) -> None:
    x, index, w, gu, dn = _layer()
    if what == "transposed":
        gu, dn = (t.detach().mT.contiguous().mT.requires_grad_() for t in (gu, dn))
    elif what == "sliced":
        gu, dn = (torch.randn(5, n, 2 * m)[:, :, ::2].requires_grad_() for n, m in ((24, 16), (16, 12)))
    elif what == "odd offset":
        gu = torch.randn(5 * 24 * 16 + 1)[1:].view(5, 24, 16).requires_grad_()
    else:
        x = torch.randn(16, 24).T.requires_grad_()
    _agree((x, index, w, gu, dn))


def test_some_inputs_need_no_gradient() -> None:
    for free in range(4):
        x, index, w, gu, dn = _layer()
        [t.requires_grad_(False) for i, t in enumerate((x, w, gu, dn)) if i == free]
        _agree((x, index, w, gu, dn))


def test_gradcheck() -> None:
    x, index, w, gu, dn = _layer(T=5, E=3, d=3, f=2, dtype=torch.float64)
    for act in (F.silu, F.gelu):
        assert gradcheck(lambda *t, act=act: experts(t[0], index, *t[1:], act), (x, w, gu, dn))


def test_native_and_own_products_agree(monkeypatch) -> None:
    args = _layer(T=64, d=32, f=24)
    seen = []
    monkeypatch.setattr(execute.F, "grouped_mm", lambda *a, real=F.grouped_mm, **k: seen.append(1) or real(*a, **k))
    y = experts(*args)
    assert len(seen) == 2, "torch's kernel is used where it can be"
    first = torch.autograd.grad(y.square().sum(), [args[0], *args[2:]])
    monkeypatch.setattr(execute, "supports_grouped_mm", lambda *w: False)
    second = torch.autograd.grad(experts(*args).square().sum(), [args[0], *args[2:]])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_identical_experts_with_weights_that_sum_to_1_are_the_dense_layer() -> None:
    x, _, _, gu, dn = _layer(dtype=torch.float64)
    gu, dn = (t[:1].detach().expand(5, -1, -1) for t in (gu, dn))
    index, weights = select(torch.rand(24, 5, dtype=torch.float64).softmax(-1), 2)
    gate, up = (x @ gu[0].T).chunk(2, -1)
    torch.testing.assert_close(experts(x, index, weights, gu, dn), (F.silu(gate) * up) @ dn[0].T, rtol=1e-12, atol=1e-12)


def test_permuted_experts_and_router_rows_change_nothing() -> None:
    x, _, _, gu, dn = _layer(dtype=torch.float64)
    router, p = torch.randn(5, 16, dtype=torch.float64), torch.tensor([3, 0, 4, 1, 2])
    run = lambda r, gu, dn: experts(x, *select((x @ r.T).softmax(-1), 2), gu, dn)  # noqa: E731
    torch.testing.assert_close(run(router, gu, dn), run(router[p], gu[p], dn[p]), rtol=1e-12, atol=1e-12)


def test_all_experts_with_softmax_weights_are_the_soft_mixture() -> None:
    x, _, _, gu, dn = _layer(dtype=torch.float64)
    p = torch.rand(24, 5, dtype=torch.float64).softmax(-1)
    index, w = select(p, 5)
    each = torch.stack([experts(x, torch.full((24, 1), e), torch.ones(24, 1, dtype=x.dtype), gu, dn) for e in range(5)], 1)
    torch.testing.assert_close(experts(x, index, w, gu, dn), (p[:, :, None] * each).sum(1), rtol=1e-12, atol=1e-12)


def test_a_ragged_list_is_the_same_sum() -> None:
    x, index, w, gu, dn = _layer(dtype=torch.float64)
    p = torch.rand(24, 5, dtype=torch.float64).softmax(-1)
    kept = torch.rand(24, 2) < 0.6
    routing = Routing.of(p.log(), p, index, w, kept)
    torch.testing.assert_close(execute.execute(x, routing, gu, dn), experts(x, index, w * kept, gu, dn), rtol=1e-12, atol=1e-12)
    whole = Routing.of(p.log(), p, index, w)
    assert torch.equal(execute.execute(x, whole, gu, dn), experts(x, index, w, gu, dn))


@pytest.mark.parametrize("kind", STOCK)
def test_stock_models_agree_with_their_own_executors(kind) -> None:
    model, ids = model_of(kind).train(), torch.randint(3, 96, (2, 17))
    results = {}
    for name in ("eager", "grouped_mm", "batched_mm", execute.NAME):
        use(model, name).zero_grad()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        results[name] = [out.logits.detach(), *(p.grad.clone() for p in model.parameters())]
    for name in ("grouped_mm", "batched_mm", execute.NAME):
        for a, b in zip(results["eager"], results[name], strict=True):
            assert float((a - b).abs().max()) <= 2e-6 * max(1.0, float(a.abs().max())), name


def test_other_layouts_are_composed() -> None:
    """gpt-oss: transposed, interleaved, biases, a gate of its own. Nemotron-H: no gate."""
    from transformers import GptOssConfig, NemotronHConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    gpt = GptOssExperts(GptOssConfig(hidden_size=16, intermediate_size=12, num_local_experts=5))
    nemotron = NemotronHExperts(NemotronHConfig(hidden_size=16, moe_intermediate_size=12, n_routed_experts=5, num_hidden_layers=2))
    for module in (gpt, nemotron):
        [torch.nn.init.normal_(p, std=0.3) for p in module.parameters()]
        x, index, w, *_ = _layer()
        found = []
        for name in ("eager", execute.NAME):
            module.config._experts_implementation = name
            y = module(x, index, w)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, w, *module.parameters()])])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_gradient_checkpointing_and_a_second_backward_pass() -> None:
    model, ids = use(model_of("mixtral")).train(), torch.randint(3, 96, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    again = copy.deepcopy(model)
    again.zero_grad()
    again.gradient_checkpointing_enable()
    loss = again(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    for p, q in zip(plain, again.parameters(), strict=True):
        torch.testing.assert_close(p, q.grad)
    x, index, w, gu, dn = _layer()
    y = experts(x, index, w, gu, dn).sum()
    y.backward(retain_graph=True)
    once = gu.grad.clone()
    y.backward()
    torch.testing.assert_close(gu.grad, 2 * once)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_pending_list_is_followed_once(parallel: bool) -> None:
    """The call after it follows its own arguments again."""
    from modelwright.moe.parallel import Lists

    module = use(model_of("mixtral")).model.layers[0].mlp.experts
    run = module
    if parallel:  # in one process
        run = Lists.__new__(Lists)
        run.module, run.ep_mesh = module, SimpleNamespace(size=lambda: 1, get_group=lambda: None)
    x, index, w = torch.randn(7, 32), torch.randint(0, 2, (7, 2)), torch.rand(7, 2)
    own = run(x, index, w)
    other = Routing.of(torch.zeros(7, 4), torch.zeros(7, 4), index + 2, w)
    execute.PENDING[module] = other
    first, second = run(x, index, w), run(x, index, w)
    assert module not in execute.PENDING and torch.equal(second, own) and not torch.allclose(first, own)
    torch.testing.assert_close(first, run(x, index + 2, w))


def test_a_list_that_nobody_took_does_not_reach_the_next_pass() -> None:
    """A pass that breaks off between a router and its experts."""
    from modelwright.moe.reroute import rerouted

    model, ids = use(model_of("mixtral")), torch.randint(3, 96, (2, 9))
    want, mlp = model(ids).logits, model.model.layers[0].mlp
    send = [True]

    def change(layer, logits, weights, index, real):
        return Routing.of(logits, logits.softmax(-1), 3 - index, weights) if send[0] else None

    with rerouted(model, change):
        mlp.gate(torch.randn(18, 32))  # the router alone: its list stays
        assert mlp.experts in execute.PENDING
        send[0] = False
        assert torch.equal(model(ids).logits, want)
    assert not len(execute.PENDING)


def test_generation_is_the_same() -> None:
    model, ids = model_of("qwen3_moe"), torch.randint(3, 96, (2, 5))
    want = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(use(model).generate(ids, max_new_tokens=6, do_sample=False), want)
