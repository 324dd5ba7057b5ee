"""Which block comes from which: the orders of the papers, and a factor of 1 that changes nothing."""

import pytest

from modelwright.reshape.growth.depth import block_of, plan, rename

OPERATORS = ["stack", "interpolate", "zero", "net2net"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_factor_one_is_the_identity(operator: str) -> None:
    depth = plan(6, operator, 1)
    assert depth.order == tuple(range(6)) and not depth.silent and depth.same


def test_stack_is_the_list_of_blocks_repeated() -> None:
    assert plan(6, "stack", 4).order == tuple(range(6)) * 4
    assert not plan(6, "stack", 4).same


def test_silent_blocks_are_the_later_copies() -> None:
    depth = plan(3, "zero", 3)
    assert depth.order == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert depth.silent == {1, 2, 4, 5, 7, 8} and depth.same


def test_solar_is_the_published_order() -> None:
    depth = plan(32, "stack", preset="solar")
    assert depth.order == (*range(24), *range(8, 32)) and len(depth.order) == 48 and not depth.silent


def test_llama_pro_is_the_published_order() -> None:
    depth = plan(32, "stack", preset="llama_pro")
    assert len(depth.order) == 40 and depth.same
    assert sorted(depth.silent) == [4, 9, 14, 19, 24, 29, 34, 39]


def test_order_that_leaves_a_block_out_or_swaps_two_is_another_function() -> None:
    assert plan(3, "zero", order=[0, 0, 1, 2]).same
    assert not plan(3, "zero", order=[0, 0, 2]).same
    assert not plan(3, "zero", order=[1, 0, 2]).same


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "transformer.h.3.attn.c_attn.bias", "layers.3.x"])
def test_block_of_a_tensor_is_read_and_renamed(name: str) -> None:
    assert block_of(name) == 3
    assert rename(name, 12) == name.replace("3", "12")
    assert block_of("model.embed_tokens.weight") is None
