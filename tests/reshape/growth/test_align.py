"""Turns of heads: they keep every score, they find what was hidden, and they never make heads less alike."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.reshape.growth.align import agreement, blocks, phases, rotations, turn_matrix, turn_pairs


def rotation(d: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def gram_of(heads: list[torch.Tensor]) -> torch.Tensor:
    x = torch.cat(heads, 1)
    return blocks(x.T @ x, list(range(len(heads))), heads[0].shape[1])


def test_blocks_are_the_products_between_heads() -> None:
    heads = [torch.randn(20, 4, dtype=torch.float64) for _ in range(3)]
    cross = gram_of(heads)
    for m in range(3):
        for k in range(3):
            torch.testing.assert_close(cross[m, k], heads[m].T @ heads[k])


def test_hidden_rotation_is_found_exactly() -> None:
    x = torch.randn(50, 6, dtype=torch.float64)
    heads = [x @ rotation(6, s) for s in range(3)]
    turned = rotations(gram_of(heads))
    one, *others = [h @ r for h, r in zip(heads, turned, strict=True)]
    assert all(float((o - one).abs().max()) < 1e-9 for o in others)
    assert abs(agreement(gram_of(heads), turned)[0] - 1) < 1e-9


def test_hidden_phases_are_found_exactly() -> None:
    x = torch.randn(50, 8, dtype=torch.float64)
    angles = [torch.rand(4, dtype=torch.float64) * 6 for _ in range(3)]
    heads = [turn_pairs(x.T, a).T for a in angles]
    found = phases(gram_of(heads))
    one, *others = [turn_pairs(h.T, a).T for h, a in zip(heads, found, strict=True)]
    assert all(float((o - one).abs().max()) < 1e-9 for o in others)


def test_turn_of_pairs_is_its_matrix_and_commutes_with_rope() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, y, a = torch.randn(7, 8), torch.randn(7, 8), torch.rand(4) * 6
    torch.testing.assert_close(turn_pairs(x.T, a).T, x @ turn_matrix(a))
    at = torch.arange(7)[:, None] * torch.rand(4)
    cos, sin = torch.cat([at, at], -1).cos()[None], torch.cat([at, at], -1).sin()[None]

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        q, k = apply_rotary_pos_emb(q[None, None], k[None, None], cos, sin)
        return (q @ k.transpose(-1, -2))[0, 0]

    torch.testing.assert_close(scores(turn_pairs(x.T, a).T, turn_pairs(y.T, a).T), scores(x, y))


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 1000), n=st.integers(2, 4))
def test_turning_never_makes_heads_less_alike(seed: int, n: int) -> None:
    g = torch.Generator().manual_seed(seed)
    heads = [torch.randn(30, 4, dtype=torch.float64, generator=g) for _ in range(n)]
    cross = gram_of(heads)
    before = agreement(cross)[0]
    assert agreement(cross, rotations(cross))[0] >= before - 1e-9
    assert agreement(cross, torch.stack([turn_matrix(a) for a in phases(cross)]))[0] >= before - 1e-9


def test_factor_gives_the_mean_the_size_of_its_members() -> None:
    heads = [torch.randn(30, 4, dtype=torch.float64) for _ in range(2)]
    alike, factor = agreement(gram_of(heads))
    pooled, members = sum(heads) / 2, sum(h.norm() for h in heads) / 2
    assert abs(alike - float(pooled.norm() / members)) < 1e-9
    assert abs(float((pooled * factor).norm() / members) - 1) < 1e-9


def test_silent_heads_do_no_harm() -> None:
    zero = gram_of([torch.zeros(5, 4, dtype=torch.float64)] * 2)
    assert agreement(zero) == (0.0, 1.0)
    assert torch.isfinite(rotations(zero)).all() and torch.isfinite(phases(zero)).all()
