"""Axes: which unit comes from which, how often, and that the readers of copies add up to what was read before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.core.model.anatomy import Part
from modelwright.reshape.growth.width import Axis, Width


def width(axis: Axis, noise: float = 0.1) -> Width:
    one = Axis(1, 1)
    return Width({"hidden": Axis(4, 4), "q": one, "kv": one, "ffn": axis}, noise, 0.02, False, False, 0)


def down(shape: tuple[int, int]) -> Part:
    return Part("model.layers.0.mlp.down_proj.weight", "ffn.down", "weight", shape, 0, "decoder", "out_in")


@pytest.mark.parametrize("scheme", ["tile", "repeat", "pad"])
def test_axis_of_the_same_size_is_the_identity(scheme: str) -> None:
    axis = Axis(5, 5, 2, scheme)
    assert axis.rows.tolist() == list(range(10)) and set(axis.copies.tolist()) == {1} and not len(axis.pairs[0])
    t = torch.randn(4, 5)
    assert torch.equal(width(Axis(5, 5, 1, scheme)).grow(t, down((4, 5))), t)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 9), more=st.integers(0, 20), size=st.integers(1, 3), scheme=st.sampled_from(["tile", "repeat"]))
def test_copies_count_how_often_a_unit_is_taken(n: int, more: int, size: int, scheme: str) -> None:
    axis = Axis(n, n + more, size, scheme)
    units = axis.units.tolist()
    assert set(units) == set(range(n)), "no unit is lost"
    assert max(axis.copies) - min(axis.copies) <= 1
    assert all(c == units.count(u) for u, c in zip(units, axis.copies.tolist(), strict=True))
    assert (axis.rows.view(-1, size) == torch.tensor(units)[:, None] * size + torch.arange(size)).all()


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(factor=st.sampled_from([2, 4]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), noise=st.floats(0, 0.5))
def test_readers_of_copies_add_up_exactly_in_every_type(factor: int, dtype: torch.dtype, noise: float) -> None:
    t = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    grown = width(Axis(6, 6 * factor), noise).grow(t, down((4, 6)))
    assert grown.dtype == dtype
    assert torch.equal(grown.double().view(4, factor, 6).sum(1), t.double())


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 7), more=st.integers(0, 20), size=st.integers(1, 3), scheme=st.sampled_from(["tile", "repeat"]))
def test_pairs_are_copies_of_one_unit_and_no_row_is_in_two(n: int, more: int, size: int, scheme: str) -> None:
    axis = Axis(n, n + more, size, scheme)
    one, two = axis.pairs
    assert torch.equal(axis.rows[one], axis.rows[two])
    used = torch.cat([one, two]).tolist()
    assert len(set(used)) == len(used) == 2 * size * sum(axis.units.tolist().count(u) // 2 for u in range(n))


def test_noise_has_the_asked_size() -> None:
    t = torch.ones(4, 2000)
    a, b = width(Axis(2000, 4000), 0.2).grow(t, down((4, 2000))).split(2000, 1)
    assert float((a - b).abs().max()) == pytest.approx(0.2, rel=0.02)
    assert float((a - b).mean()) == pytest.approx(0, abs=0.02)
