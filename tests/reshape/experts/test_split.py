"""Splits, routers, and the walk through one block at a time."""

import pytest
import torch

from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.hooks import capture
from modelwright.reshape.experts.select import captured, centres, least_squares, masses, train_mlp
from modelwright.reshape.experts.split import (
    contiguous,
    fires,
    split_cmoe,
    split_coactivation,
    split_kmeans,
    split_random,
    split_shared,
)
from modelwright.reshape.experts.walk import calibration_ids, walk


def planted(tokens: int = 240, groups: int = 6, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Strengths (n, F) of neurons that fire group by group, and each neuron's group."""
    group = torch.arange(groups).repeat_interleave(size)[torch.randperm(groups * size)]
    active = torch.randint(groups, (tokens,))
    return (active[:, None] == group).float() * (0.5 + torch.rand(tokens, groups * size)), group


def same_groups(a: torch.Tensor, b: torch.Tensor) -> bool:
    return len({(int(x), int(y)) for x, y in zip(a, b, strict=True)}) == int(b.max()) + 1


# ---- splits ----------------------------------------------------------------------------------------------------------
def test_every_split_makes_experts_of_one_size() -> None:
    strength, _ = planted()
    gate, up = torch.randn(48, 16), torch.randn(48, 16)
    for labels in (
        split_random(48, 6, 0, 0),
        contiguous(48, 6),
        *(split_kmeans(gate, up, 6, f, 0) for f in ("gate", "up", "both")),
        split_coactivation(strength, 6, 0),
        split_cmoe(strength, 6, 0, 8),
    ):
        assert torch.bincount(labels).tolist() == [8] * 6


def test_random_splits_differ_by_seed_and_layer_and_are_no_blocks() -> None:
    a = split_random(48, 6, 0, 0)
    assert torch.equal(a, split_random(48, 6, 0, 0))
    assert not torch.equal(a, split_random(48, 6, 1, 0)) and not torch.equal(a, split_random(48, 6, 0, 1))
    assert not torch.equal(a, contiguous(48, 6))


def test_neurons_that_fire_together_come_together() -> None:
    strength, group = planted()
    assert same_groups(split_coactivation(strength, 6, 0), group)
    assert same_groups(split_cmoe(strength, 6, 0, 8, k_act=8), group)


def test_always_strong_neurons_are_the_shared_ones() -> None:
    strength, _ = planted()
    always = torch.tensor([3, 11, 12, 20, 31, 40, 41, 47])
    strength[:, always] = 3 + torch.rand(len(strength), 8)
    assert split_shared(strength, torch.zeros(48, 4), 1, 8).sort().values.tolist() == always.tolist()
    labels = split_cmoe(strength, 5, 1, 8)
    assert (labels == -1).nonzero().flatten().tolist() == always.tolist()
    assert torch.bincount(labels[labels >= 0]).tolist() == [8] * 5


def test_no_more_than_a_share_of_the_neurons_fires_and_none_at_zero() -> None:
    strength = torch.tensor([[0.0, 0, 0, 0, 5], [1, 2, 3, 4, 5]])
    assert fires(strength, 0.4).tolist() == [[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]


# ---- routers ---------------------------------------------------------------------------------------------------------
def test_captured_mass_rises_with_k_to_one_and_the_oracle_is_best() -> None:
    strength = torch.rand(60, 48) ** 4
    mass = masses(strength, split_random(48, 6, 0, 0), 6)
    torch.testing.assert_close(mass.sum(1), strength.sum(1))
    values = [captured(mass, mass, k) for k in range(1, 7)]
    assert values == sorted(values) and values[-1] == pytest.approx(1)
    for k in range(1, 6):
        assert captured(torch.rand(60, 6), mass, k) < captured(mass, mass, k)
    assert captured(mass * 0, mass * 0, 2) == 1  # a token without activity loses nothing


def test_shared_neurons_have_no_expert() -> None:
    labels = torch.tensor([-1, 0, 0, 1, 1, -1])
    assert masses(torch.tensor([[9.0, 1, 2, 3, 4, 9]]), labels, 2).tolist() == [[3, 7]]
    gate = torch.randn(6, 4)
    unit = torch.nn.functional.normalize(gate, dim=1)
    torch.testing.assert_close(centres(gate, labels, 2), torch.stack([unit[1:3].mean(0), unit[3:5].mean(0)]))


def test_relabelled_experts_have_the_same_mass_in_another_order() -> None:
    strength, labels = torch.rand(20, 48), split_random(48, 6, 0, 0)
    order = torch.randperm(6)
    torch.testing.assert_close(masses(strength, order[labels], 6)[:, order], masses(strength, labels, 6))


def test_a_linear_rule_is_learnt_by_mlp_and_least_squares() -> None:
    x, w = torch.randn(900, 12), torch.randn(5, 12)
    mass = torch.softmax(torch.nn.functional.normalize(x, dim=1) @ w.T * 3, 1)
    rows = least_squares(x[:800], mass[:800])
    mlp = train_mlp(x, mass, torch.nn.functional.normalize(w, dim=1), 2, epochs=5)
    best = captured(mass[800:], mass[800:], 2)
    assert captured(x[800:] @ rows.T, mass[800:], 2) > best - 0.02
    assert mlp.quality > best - 0.05 and captured(mlp(x[800:]), mass[800:], 2) > best - 0.05
    assert captured(torch.rand(100, 5), mass[800:], 2) < best - 0.1


def test_the_best_epoch_is_kept() -> None:
    x, mass = torch.randn(300, 8), torch.rand(300, 4)
    mlp = train_mlp(x, mass, torch.randn(4, 8), 1, epochs=6)
    assert captured(mlp(x[270:]), mass[270:], 1) == pytest.approx(mlp.quality)


# ---- the walk --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "granite", "phi3"])
def test_the_walk_sees_what_the_whole_model_sees(kind: str, tiny) -> None:
    source = Checkpoint(tiny(kind))
    ids = torch.randint(3, 96, (5, 14))
    model, want = source.model().eval(), {}
    feeds = {model.model.layers[i].mlp: i for i in range(2)}
    with capture(feeds, lambda m, x: want.setdefault(feeds[m], x.reshape(-1, 32)), side="input"), torch.no_grad():
        model(ids)
    steps = list(walk(source, ids, batch=2))
    assert [s.block.index for s in steps] == [0, 1]
    for s in steps:
        torch.testing.assert_close(s.ffn_input, want[s.block.index], rtol=1e-3, atol=1e-4)
        assert s.gate.shape == s.up.shape == s.down.T.shape == (48, 32)


def test_a_bf16_checkpoint_is_walked_in_fp32(tiny) -> None:
    source = Checkpoint(tiny("llama", dtype="bfloat16"))
    step = next(iter(walk(source, torch.randint(3, 96, (1, 8)))))
    assert step.gate.dtype == step.ffn_input.dtype == torch.float32
    assert all(s.ffn_input is None for s in walk(source, None))


def test_a_text_shorter_than_a_row_is_refused_and_whole_rows_are_kept(tmp_path) -> None:
    (tmp_path / "t.txt").write_text("one two three four five six seven eight nine ten\n" * 20)
    source = Checkpoint("seedling")
    assert calibration_ids(source, Data(str(tmp_path / "t.txt")), 40, 16).shape == (2, 16)
    with pytest.raises(UserError, match="one row takes 500"):
        calibration_ids(source, Data(str(tmp_path / "t.txt")), 1000, 500)
