"""Measures S1 to S5 on planted experts."""

import math

import numpy as np
import pytest
import torch

from families import sigmoid_moe
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.inspect.mixture.layers import KINDS, MixtureLayer, chunks, mixture_layers
from modelwright.inspect.mixture.weights import compare, kendall, r_squared, reorder, reordered

E, F, D = 5, 24, 12


def layer_of(experts: list[list[torch.Tensor]], router: torch.Tensor | None = None) -> MixtureLayer:
    """A layer from [gate, up, down] of each expert, each (F, d)."""
    layer = MixtureLayer(0, len(experts), router=None if router is None else lambda: router)
    for e, matrices in enumerate(experts):
        for kind, m in zip(KINDS, matrices, strict=True):
            layer.readers[str(e), kind] = lambda m=m: m
    return layer


def random_experts(n: int = E, neurons: int = F) -> list[list[torch.Tensor]]:
    return [[torch.randn(neurons, D) for _ in KINDS] for _ in range(n)]


def test_identical_experts_have_similarity_one_and_an_undefined_r2() -> None:
    one = random_experts(1)[0]
    found = compare(layer_of([one] * E, torch.randn(E, D)))
    for kind in KINDS:
        assert (found.matrix[kind] - 1).abs().max() < 1e-12 and (found.neuron[kind] - 1).abs().max() < 1e-12
        assert math.isnan(found.r2[kind])
        assert torch.equal(found.pca[kind], torch.zeros(E, 2, dtype=torch.float64))


def test_cosines_are_those_of_the_flattened_matrices_and_of_the_mean_neurons() -> None:
    experts = random_experts()
    found = compare(layer_of(experts))
    flat = torch.nn.functional.normalize(torch.stack([m[1].double().flatten() for m in experts]), dim=1)
    mean = torch.nn.functional.normalize(torch.stack([m[2].double().mean(0) for m in experts]), dim=1)
    torch.testing.assert_close(found.matrix["up"], flat @ flat.T)
    torch.testing.assert_close(found.neuron["down"], mean @ mean.T)
    assert found.router is None and math.isnan(found.r2["gate"])


def test_a_router_of_mean_gate_rows_has_r2_one_with_gate_only() -> None:
    experts = random_experts(8)
    found = compare(layer_of(experts, torch.stack([m[0].mean(0) for m in experts])))
    assert found.r2["gate"] == pytest.approx(1)
    assert found.r2["up"] < 0.5 and found.r2["down"] < 0.5


def test_r2_is_that_of_a_least_squares_line() -> None:
    x, y = torch.rand(6, 6, dtype=torch.float64), torch.rand(6, 6, dtype=torch.float64)
    i, j = np.tril_indices(6, -1)
    assert r_squared(x, y) == pytest.approx(np.corrcoef(x.numpy()[i, j], y.numpy()[i, j])[0, 1] ** 2)


def test_coordinates_are_the_principal_components_of_the_standardised_matrices() -> None:
    experts = random_experts()
    x = torch.stack([m[0].double().flatten() for m in experts])
    z = (x - x.mean(0)) / x.std(0, correction=0)
    u, s, _ = torch.linalg.svd(z, full_matrices=False)
    found = compare(layer_of(experts)).pca["gate"]
    torch.testing.assert_close(found.abs(), (u * s)[:, :2].abs())


def test_permuted_copies_are_found_and_the_permutation_comes_back() -> None:
    one, order = random_experts(1)[0], torch.randperm(F)
    layer = layer_of([one, [m[order] for m in one]])
    assert float(compare(layer).matrix["gate"][0, 1]) < 0.5
    found = reordered(layer, [(0, 1)])
    for kind in (*KINDS, "neuron"):
        match = found[kind][0]
        assert match.cosine == pytest.approx(1) and match.before < 0.5
        assert order[torch.tensor(match.order)].tolist() == list(range(F))


def test_a_neuron_permutation_of_one_matrix_only_is_no_permuted_copy() -> None:
    one, order = random_experts(1)[0], torch.randperm(F)
    found = reordered(layer_of([one, [one[0][order], one[1], one[2]]]), [(0, 1)])
    assert found["gate"][0].cosine == pytest.approx(1) and found["neuron"][0].cosine < 0.9


def test_kendall_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(17)
        assert kendall(order) == pytest.approx(stats.kendalltau(np.arange(17), order).statistic)
    assert kendall(np.arange(9)) == 1 and kendall(np.arange(9)[::-1]) == -1


def test_reordering_in_bf16_is_computed_in_fp32() -> None:
    one, order = torch.randn(F, D).bfloat16(), torch.randperm(F)
    assert reorder(one, one[order]).cosine == pytest.approx(1, abs=1e-6)


def test_ranges_of_neurons_cover_each_once() -> None:
    for budget in (1, 7, 40, 1000):
        assert [i for part in chunks(23, 5, budget) for i in range(23)[part]] == list(range(23))


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared"])
def test_experts_read_from_disk_are_those_in_the_model(kind: str, tiny) -> None:
    _check_read(Checkpoint(tiny(kind)), {"granitemoe": "block_sparse_moe", "granitemoeshared": "block_sparse_moe"}.get(kind, "mlp"))


def test_experts_of_a_sigmoid_mixture_are_read_too(tmp_path) -> None:
    sigmoid_moe().save_pretrained(tmp_path)
    _check_read(Checkpoint(tmp_path), "mlp")


def _check_read(source: Checkpoint, path: str) -> None:
    model = source.model()
    layers = mixture_layers(source)
    assert [x.index for x in layers] == [0, 1]
    for layer in layers:
        block = getattr(model.model.layers[layer.index], path)
        gate, up = block.experts.gate_up_proj.chunk(2, 1)
        for kind, want in (("gate", gate), ("up", up), ("down", block.experts.down_proj.transpose(1, 2))):
            torch.testing.assert_close(torch.stack(layer.rows(kind)[: layer.experts]), want.detach())
        router = block.gate if hasattr(block, "gate") else block.router
        assert layer.router is not None and torch.equal(layer.router(), router.weight)


def test_members_of_other_widths_are_compared_by_their_mean_neuron_only(tiny) -> None:
    source = Checkpoint(tiny("qwen2_moe"))
    found = compare(mixture_layers(source)[0])
    at = found.members.index("shared")
    assert torch.isnan(found.matrix["gate"][at, :4]).all() and found.matrix["gate"][at, at] == 1
    assert torch.isfinite(found.neuron["gate"]).all()


def test_a_dense_model_is_one_more_member(tiny) -> None:
    layer = mixture_layers(Checkpoint(tiny("mixtral")), Checkpoint(tiny("llama")))[1]
    model = Checkpoint(tiny("llama")).model()
    assert layer.members[-1] == "dense"
    assert torch.equal(layer.rows("down")[-1], model.model.layers[1].mlp.down_proj.weight.T)
