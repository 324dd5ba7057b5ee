"""Balance losses: closed forms, conventions, the pooled mistake, the global batch, and a recomputed forward pass."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from modelwright.moe import balance
from modelwright.moe.routing import select


def _layer(T: int = 60, E: int = 8, k: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    return logits, select(logits.softmax(-1), k)[0]


def test_switch_is_1_at_uniform_and_hf_s_convention_is_k_times_larger() -> None:
    p, counts = torch.full((16, 8), 1 / 8), torch.full((8,), 4)
    assert balance.switch(p, counts).item() == pytest.approx(1.0)
    assert balance.switch(p, counts, k=2, convention="hf").item() == pytest.approx(2.0)


def test_hf_convention_is_transformers_loss_on_one_layer_with_padding() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits, real = torch.randn(60, 8), (torch.arange(60) % 4 > 0)
    index = select(logits.softmax(-1), 2)[0]
    ours = balance.switch(logits.softmax(-1), balance.counts_of(index, 8, real), real=real, k=2, convention="hf")
    torch.testing.assert_close(ours, load_balancing_loss_func((logits,), 8, 2, real.long().view(1, -1)))


def test_gradient_of_switch_is_the_closed_form() -> None:
    logits, index = _layer()
    counts = balance.counts_of(index, 8)
    p = logits.softmax(-1)
    balance.switch(p, counts).backward()
    f = counts.double() / counts.sum()
    torch.testing.assert_close(logits.grad, 8 / 60 * p * (f - (p * f).sum(1, keepdim=True)), rtol=1e-12, atol=1e-16)


def test_eight_collapsed_layers_look_perfect_when_pooled() -> None:
    """The incumbent's fault: each layer sends everything to one expert, another one in each layer."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = [torch.full((32, 8), -50.0).index_fill(1, torch.tensor([layer]), 50.0) for layer in range(8)]
    layers = [(x.softmax(-1), balance.counts_of(x.argmax(1, keepdim=True), 8)) for x in logits]
    assert torch.stack([balance.switch(p, c) for p, c in layers]).mean().item() == pytest.approx(8.0)
    assert balance.pooled(layers).item() == pytest.approx(1.0)
    assert float(load_balancing_loss_func(tuple(logits), 8, 1)) == pytest.approx(1.0)


def test_micro_batches_with_global_counts_are_the_unsplit_batch() -> None:
    logits, index = _layer(64)
    counts = balance.GlobalCounts(1, 8)
    for part in index.chunk(4):
        counts.add(0, balance.counts_of(part, 8))
    assert torch.equal(counts.summed()[0], balance.counts_of(index, 8)), "bit-equal"
    (whole,) = torch.autograd.grad(balance.switch(logits.softmax(-1), counts.counts[0]), logits)
    split = torch.stack([balance.switch(p.softmax(-1), counts.counts[0]) for p in logits.chunk(4)]).mean()
    torch.testing.assert_close(torch.autograd.grad(split, logits)[0], whole, rtol=1e-12, atol=1e-16)
    counts.reset()
    assert not counts.counts.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_pass_is_counted_once(reentrant: bool) -> None:
    counts, w = balance.GlobalCounts(1, 4), torch.randn(4, 8, requires_grad=True)
    passes = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        logits = x @ w.T
        passes.append(balance.recomputing())
        counts.add(0, balance.counts_of(logits.topk(2).indices, 4))
        return logits.softmax(-1)

    checkpoint(layer, torch.randn(10, 8, requires_grad=True), use_reentrant=reentrant).square().sum().backward()
    assert passes == [False, True] and int(counts.counts.sum()) == 20


def test_per_sequence_is_the_mean_of_switch_inside_each_and_is_stricter() -> None:
    logits = torch.zeros(2, 10, 4)
    logits[0, :, 0] = logits[1, :, 1] = 9.0
    p, index = logits.softmax(-1), logits.argmax(-1, keepdim=True)
    real = torch.ones(2, 10, dtype=torch.bool)
    real[1, 6:] = False
    want = torch.stack([balance.switch(p[b][real[b]], balance.counts_of(index[b][real[b]], 4)) for b in range(2)]).mean()
    torch.testing.assert_close(balance.per_sequence(p, index, real), want)
    assert balance.per_sequence(p, index) > 1.9 * balance.switch(p.flatten(0, 1), balance.counts_of(index, 4))
    assert torch.equal(balance.per_sequence(p, index, torch.stack([real[0], ~real[0]])), balance.per_sequence(p[:1], index[:1]))


def test_padding_changes_no_loss() -> None:
    logits, index = _layer()
    real = torch.arange(60) < 45
    counts = balance.counts_of(index, 8, real)
    assert torch.equal(counts, balance.counts_of(index[:45], 8))
    p = logits.softmax(-1)
    torch.testing.assert_close(balance.switch(p, counts, real=real), balance.switch(p[:45], counts))
    torch.testing.assert_close(balance.z(logits, real), balance.z(logits[:45]))
    assert balance.switch(p, counts * 0, real=real & False).item() == 0


def test_z_and_cv_squared_values() -> None:
    assert balance.z(torch.zeros(3, 8)).item() == pytest.approx(torch.tensor(8.0).log().item() ** 2)
    assert balance.cv_squared(torch.full((5,), 3.0)).item() == 0
    assert balance.cv_squared(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.5)


@pytest.mark.parametrize("centred", [True, False])
def test_nudged_bias_balances_a_skewed_router(centred: bool) -> None:
    logits = torch.randn(4000, 8) + torch.linspace(0, 2, 8)
    bias = torch.zeros(8)
    for _ in range(300):
        index, weights = select(logits.sigmoid(), 2, bias=bias)
        counts = balance.counts_of(index, 8)
        bias = balance.nudge(bias, counts, 5e-3, centred)
    assert (
        balance.facts(counts[None])["MaxVio"]
        < 0.1
        < 0.5
        < balance.facts(balance.counts_of(select(logits.sigmoid(), 2)[0], 8)[None])["MaxVio"]
    )
    assert abs(float(bias.mean())) < 1e-6 or not centred
    torch.testing.assert_close(weights.sum(1), torch.ones(4000))


def test_facts_of_a_load() -> None:
    found = balance.facts(torch.tensor([[5, 5, 5, 5], [10, 10, 0, 0]]), 50, 10)
    assert found == pytest.approx({"MaxVio": 1.0, "load entropy": 0.75, "dead experts": 2, "dropped share": 0.2})
