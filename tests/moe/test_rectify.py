"""Rectify-Router: identical experts are the dense layer at any capacity, fill-ins displace nobody, weights sum to 1."""

import json
import math

import pytest
import torch

from families import model_of
from modelwright.core.errors import UserError
from modelwright.moe.execute import execute
from modelwright.moe.rectify import averages, rectify, relative_gains
from modelwright.moe.reroute import rerouted
from modelwright.moe.routing import CHOSEN, FILLED, LOCAL, capacity


def _logits(T: int = 64, E: int = 8, skew: float = 1.5) -> torch.Tensor:
    return torch.randn(T, E, dtype=torch.float64) + torch.linspace(0, skew, E)


def _rows(routing, *sources: int) -> set[tuple[int, int]]:
    keep = torch.isin(routing.source, torch.tensor(sources, dtype=torch.uint8))
    return set(zip(routing.token[keep].tolist(), routing.expert[keep].tolist(), strict=True))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("fill_in", [False, True])
def test_identical_experts_are_the_dense_layer_at_any_capacity(k, factor, ranks, fill_in) -> None:
    x = torch.randn(64, 6, dtype=torch.float64)
    gu, dn = torch.randn(1, 10, 6).double().expand(8, -1, -1), torch.randn(1, 6, 5).double().expand(8, -1, -1)
    gate, up = (x @ gu[0].T).chunk(2, -1)
    dense = (torch.nn.functional.silu(gate) * up) @ dn[0].T
    options = {"factor": factor, "fill_in": fill_in, "ranks": ranks}
    torch.testing.assert_close(execute(x, rectify(_logits(), k, **options), gu, dn), dense, rtol=1e-9, atol=1e-9)
    routing = rectify(_logits(), k, **options | {"intra": False})
    served = torch.zeros(64, dtype=torch.bool).index_fill(0, routing.token, True)
    y = execute(x, routing, gu, dn)
    assert not y[~served].any() and (factor == 1.0 or (~served).any())
    torch.testing.assert_close(y[served], dense[served], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", ["paper", "code"])
@pytest.mark.parametrize("k", [1, 2])
def test_fill_ins_displace_nobody_and_no_expert_has_more_than_its_slots(k: int, order: str) -> None:
    logits = _logits()
    plain = rectify(logits, k, fill_in=False, intra=False)
    filled = rectify(logits, k, fill_in=True, intra=False, fill_order=order)
    assert _rows(plain, CHOSEN) == _rows(filled, CHOSEN) and _rows(filled, FILLED)
    assert int(filled.counts().max()) <= capacity(64, 8, k, 1.0)
    want = logits.softmax(-1).argsort(1, descending=True)[:, k]
    assert all(want[t] == e for t, e in _rows(filled, FILLED))


def test_the_paper_fills_by_the_fill_in_s_own_score() -> None:
    p = torch.tensor([[0.6, 0.4, 1e-6], [0.52, 0.48, 1e-6], [0.9, 0.05, 0.05], [1e-6, 0.1, 0.9]], dtype=torch.float64)
    options = {"factor": 0.75, "intra": False}  # one slot per expert
    assert _rows(rectify(p.log(), 1, fill_order="paper", **options), FILLED) == {(1, 1)}
    assert _rows(rectify(p.log(), 1, fill_order="code", **options), FILLED) == {(2, 1)}


def test_without_limit_fill_in_is_top_k_plus_1_and_intra_does_nothing() -> None:
    logits = _logits()
    routing = rectify(logits, 2, factor=math.inf)
    assert _rows(routing, CHOSEN, FILLED) == {(t, e) for t, row in enumerate(logits.topk(3).indices.tolist()) for e in row}
    assert not _rows(routing, LOCAL)


def test_every_token_s_weights_sum_to_1_and_rectified_ones_stay_on_their_rank() -> None:
    for k, unrouted in ((1, "all"), (2, "any"), (2, "all")):
        routing = rectify(_logits(), k, factor=0.4, fill_in=False, unrouted=unrouted, ranks=4)
        total = torch.zeros(64, dtype=torch.float64).index_add(0, routing.token, routing.weight)
        torch.testing.assert_close(total, torch.ones(64, dtype=torch.float64))
        local = _rows(routing, LOCAL)
        assert local and all(t // 16 == e // 2 for t, e in local)


def _numerators(routing, k: int) -> torch.Tensor:
    """What a list's weights are before they are divided by their sum: p of kept rows, (K - n) p_h of rectified ones."""
    kept = torch.zeros(len(routing.probs)).index_add(0, routing.token, (routing.source != LOCAL).float())
    p = routing.probs[routing.token, routing.expert]
    return torch.where(routing.source == LOCAL, (k - kept)[routing.token] * p, p)


@pytest.mark.parametrize("fill_in", [False, True])
@pytest.mark.parametrize("unrouted", [None, "all", "any", "ignore_last"])
def test_a_rectified_row_weighs_for_all_the_choices_that_were_lost(fill_in: bool, unrouted: str | None) -> None:
    routing = rectify(_logits(), 2, factor=0.4, fill_in=fill_in, unrouted=unrouted, ranks=4)
    up = _numerators(routing, 2 + fill_in)
    total = torch.zeros(64, dtype=torch.float64).index_add(0, routing.token, up)
    torch.testing.assert_close(routing.weight, up / total[routing.token])


@pytest.mark.parametrize(
    ("fill_in", "most_kept"), [(True, {"all": 0, "ignore_last": 1, "any": 2}), (False, {"all": 0, "ignore_last": 0, "any": 1})]
)
def test_which_tokens_are_rectified(fill_in: bool, most_kept: dict[str, int]) -> None:
    """A missing fill-in, the last choice, is no drop under ignore_last, which is the default with fill-ins; else any is."""
    logits = _logits()
    for unrouted, most in most_kept.items():
        routing = rectify(logits, 2, factor=0.4, fill_in=fill_in, unrouted=unrouted)
        kept = torch.zeros(64, dtype=torch.long).index_add(0, routing.token, (routing.source != LOCAL).long())
        assert set(routing.token[routing.source == LOCAL].tolist()) == set((kept <= most).nonzero().flatten().tolist())
        assert (kept == most).any()
    default, named = (rectify(logits, 2, factor=0.4, fill_in=fill_in, unrouted=u) for u in (None, "ignore_last" if fill_in else "any"))
    assert torch.equal(default.token, named.token) and torch.equal(default.weight, named.weight)


def test_gradient_is_that_of_the_numerator_alone() -> None:
    logits = _logits(T=10).requires_grad_()
    routing = rectify(logits, 2, factor=0.5, fill_in=False, unrouted="any")
    v = torch.randn(len(routing.weight), dtype=torch.float64)
    (found,) = torch.autograd.grad((routing.weight * v).sum(), logits, retain_graph=True)
    n = torch.zeros(10).index_add(0, routing.token, (routing.source == CHOSEN).float())
    times = torch.where(routing.source == LOCAL, 2 - n[routing.token], 1.0)
    p = logits.softmax(-1)[routing.token, routing.expert] * times
    whole = torch.zeros(10, dtype=torch.float64).index_add(0, routing.token, p.detach())[routing.token]
    torch.testing.assert_close(found, torch.autograd.grad((p / whole * v).sum(), logits)[0])
    single = rectify(logits, 1, fill_in=False)
    assert torch.equal(single.weight, torch.ones_like(single.weight))
    (g,) = torch.autograd.grad(single.weight.sum(), logits, retain_graph=True)
    torch.testing.assert_close(g, torch.autograd.grad(logits.softmax(-1)[single.token, single.expert].sum(), logits)[0])


def test_padding_takes_no_slot() -> None:
    logits, real = _logits(), torch.arange(64) < 50
    with_it, without = (rectify(x, 2, factor=0.6, real=r) for x, r in ((logits, real), (logits[:50], None)))
    assert _rows(with_it, CHOSEN, FILLED, LOCAL) == _rows(without, CHOSEN, FILLED, LOCAL)


def test_unequal_shares_are_refused() -> None:
    with pytest.raises(UserError, match="8 experts cannot lie on 3 ranks"):
        rectify(_logits(), 1, ranks=3)


def test_a_stock_model_follows_and_is_itself_again() -> None:
    model, ids = model_of("mixtral"), torch.randint(3, 96, (2, 16))
    with torch.no_grad():
        for layer in model.model.layers:
            for p in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                p.copy_(p[:1].expand_as(p))
    want, before = model(ids).logits, model.config._experts_implementation
    run = lambda **o: lambda layer, logits, w, i, real: rectify(logits, 2, real=real, **o)  # noqa: E731
    with rerouted(model, run(factor=0.3)):
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
    with rerouted(model, run(factor=0.3, intra=False)):
        assert not torch.allclose(model(ids).logits, want, atol=1e-2)
    assert model.config._experts_implementation == before and torch.equal(model(ids).logits, want)


def test_published_averages_and_gains(shared) -> None:
    tables = json.loads((shared / "rectify_tables" / "tables.json").read_text())
    published = {
        "32e": [37.86, 40.33, 38.06, 39.98, 38.82, 39.62, 38.74, 40.54],
        "8e": [38.75, 39.97, 38.51, 40.03, 39.82, 40.13, 40.48, 40.79],
    }
    for n, values in published.items():
        assert list(averages(tables[f"acc_{n}"]).values()) == pytest.approx(values, abs=0.0050001)
    gains = {n: {m: round(100 * v, 1) for m, v in relative_gains(tables[f"acc_{n}"]).items()} for n in ("32e", "8e")}
    assert (gains["32e"]["Top-1+KR+LR"], gains["8e"]["Top-1+KR+LR"]) == (5.6, 3.3)
    assert (gains["8e"]["Top-1+KR"], gains["32e"]["Top-1+KR"]) == (-0.6, 0.5), "filling in alone is within noise"
