"""Mixtures in bf16 and fp16, of any width, and with weights of several types in one model."""

import pytest
import torch
import torch.nn.functional as F

from families import model_of
from modelwright.moe.execute import NAME, experts, use
from modelwright.moe.hyper import HyperNetwork, SetCode, adapt
from modelwright.moe.layer import Layer, TokenChoice
from modelwright.moe.lora import LoraMoeLinear, merged
from modelwright.moe.rmoe import RecurrentRouter, RouterCell

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STOCK = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared")
ODD = {"intermediate_size": 42, "moe_intermediate_size": 22}  # rows of 84 and 44 bytes in bf16


def _odd(kind: str, dtype: torch.dtype):
    model = model_of(kind, dtype="float32", **{n: v for n, v in ODD.items() if hasattr(model_of(kind).config, n)})
    for p in model.parameters():  # the buffers of rotary embeddings stay fp32, as when a checkpoint is loaded
        p.data = p.data.to(dtype)
    return model.train()


def _loss_and_gradients(model) -> list[torch.Tensor]:
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    model.zero_grad()
    loss.backward()
    return [loss.detach().float(), *(p.grad.float() for n, p in model.named_parameters() if "experts" in n)]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("kind", STOCK)
def test_stock_mixtures_of_any_width_train_as_transformers_loads_them(kind: str, dtype: torch.dtype) -> None:
    """transformers' grouped_mm, its default, stops at rows that are no whole 16 bytes."""
    model = _odd(kind, dtype)
    assert model.config._experts_implementation == "grouped_mm"
    found = _loss_and_gradients(model)
    want = _loss_and_gradients(use(_odd(kind, dtype), "eager"))
    for a, b in zip(found, want, strict=True):
        near = 8 * torch.finfo(dtype).eps if dtype != FP32 else 2e-5
        assert float((a - b).norm() / b.norm()) < near


def test_widths_and_types_that_fit_keep_transformers_own_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelwright.moe import execute

    seen = []
    theirs = execute.grouped_mm_experts_forward
    monkeypatch.setattr(execute, "grouped_mm_experts_forward", lambda *a: seen.append(1) or theirs(*a))
    _loss_and_gradients(model_of("mixtral", dtype="bfloat16"))
    assert len(seen) == 2
    _loss_and_gradients(_odd("mixtral", BF16))
    assert len(seen) == 2
    with torch.autocast("cpu", BF16):  # as they are kept in fp32 here, it would multiply them in fp32
        _loss_and_gradients(model_of("mixtral"))
    assert len(seen) == 2


def test_layouts_with_biases_and_odd_widths_run_in_bf16() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    module = GptOssExperts(GptOssConfig(hidden_size=20, intermediate_size=12, num_local_experts=4)).to(BF16)
    [torch.nn.init.normal_(p, std=0.3) for p in module.parameters()]
    x, index, w = torch.randn(9, 20, dtype=BF16), torch.randint(0, 4, (9, 2)), torch.rand(9, 2, dtype=BF16)
    found = {}
    for name in ("eager", "grouped_mm", NAME):
        module.config._experts_implementation = name
        found[name] = module(x, index, w).float().detach()
    for name in ("grouped_mm", NAME):
        assert float((found[name] - found["eager"]).norm() / found["eager"].norm()) < 0.02


def _layer(weights: torch.dtype, tokens: torch.dtype, scores: torch.dtype, f: int = 22):
    g = torch.Generator().manual_seed(0)
    x, gu, dn = (torch.randn(s, generator=g).div(4) for s in ((24, 20), (4, 2 * f, 20), (4, 20, f)))
    index, w = torch.randint(0, 4, (24, 2), generator=g), torch.rand(24, 2, generator=g)
    leaves = [x.to(tokens), w.to(scores), gu.to(weights), dn.to(weights)]
    return index, [t.requires_grad_() for t in leaves]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scores", [BF16, FP32])
@pytest.mark.parametrize("tokens", [BF16, FP32])
@pytest.mark.parametrize("weights", [BF16, FP32])
def test_experts_tokens_and_scores_may_be_of_different_types(weights, tokens, scores, autocast: bool) -> None:
    index, (x, w, gu, dn) = _layer(weights, tokens, scores)
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = experts(x, index, w, gu, dn)
    grads = torch.autograd.grad(y.float().square().sum(), (x, w, gu, dn))
    assert y.dtype == tokens and [g.dtype for g in grads] == [tokens, scores, weights, weights]
    exact, leaves = _layer(FP32, FP32, FP32)
    want = experts(leaves[0], exact, *leaves[1:])
    for a, b in zip((y, *grads), (want, *torch.autograd.grad(want.square().sum(), leaves)), strict=True):
        near = 1e-5 if {weights, tokens, scores} == {FP32} and not autocast else 0.03
        assert float((a.float() - b).detach().norm() / b.norm()) < near


def test_fp32_experts_under_autocast_are_the_bf16_experts() -> None:
    """What trains in fp32 is computed, and later saved, as the bf16 model that it came from."""
    index, (x, w, gu, dn) = _layer(FP32, BF16, FP32)
    with torch.autocast("cpu", BF16):
        y = experts(x, index, w, gu, dn)
    assert torch.equal(y, experts(x, index, w, gu.to(BF16), dn.to(BF16)))


def _mixed(module: torch.nn.Module, bits: int) -> torch.nn.Module:
    """Parameter i in bf16 where bit i of `bits` is set, else fp32."""
    for i, p in enumerate(module.parameters()):
        torch.nn.init.normal_(p, std=0.3)
        p.data = p.data.to(BF16 if bits >> i & 1 else FP32)
    return module


class _Rmoe(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.cells = RecurrentRouter(20, 6, 4, 2), torch.nn.ModuleList([RouterCell(6, "gru")])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (cell,) = self.cells
        _, weights, _, state = self.gate(x, self.gate.begin(x, cell), cell)  # type: ignore[arg-type]
        return weights.sum(1) * state.to(x.dtype).sum(1)


class _Hyper(torch.nn.Module):
    def __init__(self, experts: int, k: int) -> None:
        super().__init__()
        self.code, self.hyper, self.k = SetCode(experts, e=5, hidden=7, q=6), HyperNetwork(20, 2, a=4, b=6, q=6, c=3), k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = torch.rand(len(x), len(self.code.embedding), generator=torch.Generator().manual_seed(0)).topk(self.k).indices
        return adapt(x, index, self.code, self.hyper, 1)


MODULES = {
    "rmoe": _Rmoe,
    "hyper, an adapter per set": lambda: _Hyper(4, 1),
    "hyper, reordered": lambda: _Hyper(12, 4),
    "lora_moe": lambda: LoraMoeLinear(20, 11, True, experts=3, r=2, alpha=4.0),
    "layer": lambda: Layer(TokenChoice(20, 4, 2), 20, 22, 4, shared=6, mix="gated"),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_every_part_of_our_mixtures_takes_parameters_of_mixed_types(name: str, autocast: bool) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    cell = {"rmoe": 0b111100}.get(name, 0)  # the parameters of one recurrent cell are of one type
    for bits in (0, -1, *(1 << i for i in range(len(list(module.parameters()))) if not cell >> i & 1), cell):
        for tokens in (FP32, BF16):
            torch.manual_seed(1)
            _mixed(module, bits)
            x = torch.randn(16, 20).to(tokens).requires_grad_()
            with torch.autocast("cpu", BF16, enabled=autocast):
                y = module(x)
            y = y[0] if isinstance(y, tuple) else y
            y.float().sum().backward()
            assert torch.isfinite(y).all() and all(p.grad is None or p.grad.dtype == p.dtype for p in module.parameters())
            module.zero_grad()


def test_a_merged_gate_of_bf16_experts_is_rounded_once() -> None:
    layer = _mixed(LoraMoeLinear(20, 11, False, experts=3, r=2, alpha=4.0), -1)
    wide = [p.detach().double() for p in (layer.weight, layer.lora_B, layer.lora_A)]
    assert merged(layer).dtype == BF16
    assert torch.equal(merged(layer), (wide[0] + wide[1] * (layer.scale / 3) @ wide[2]).to(BF16))
    x = torch.randn(5, 20, dtype=BF16)
    torch.nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
