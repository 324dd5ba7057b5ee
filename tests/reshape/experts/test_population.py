"""Checkpoints as a population: DARE is unbiased, the least alike pair has a child once, adapters and states are read."""

from pathlib import Path

import pytest
import torch

from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.reshape.experts.population import Member, Population, cosines, dare, least_alike
from modelwright.reshape.experts.routers import generator

NAMES = [f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 1) for m in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The base and three models that differ from it."""
    found = []
    for seed in (0, 1, 2, 3):
        found.append(tmp_path_factory.mktemp("one"))
        model_of("llama", seed=seed).save_pretrained(found[-1])
    return found


def population(folders: list[Path], drop: float = 0.5, seed: int = 0) -> Population:
    base = Checkpoint(folders[0])
    return Population(base, [Member(f, base) for f in folders[1:]], NAMES, drop=drop, merge="weights", seed=seed)


def test_dare_is_unbiased() -> None:
    x, g = torch.tensor([1.0, -2.0, 0.5]), generator("x")
    mean = torch.stack([dare(x, 0.7, g) for _ in range(20_000)]).mean(0)
    assert torch.allclose(mean, x, atol=0.06)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_a_child_without_dropping_is_the_linear_merge_of_its_parents(drop: float, folders: list[Path]) -> None:
    p = population(folders, drop)
    p.breed(4)
    j, k, a = p.children[0]
    linear = a * p.weight(j, NAMES[2]) + (1 - a) * p.weight(k, NAMES[2])
    assert torch.allclose(p.weight(3, NAMES[2]), linear, atol=1e-6) == (drop == 0)


def test_the_mean_of_many_children_is_the_linear_merge(folders: list[Path]) -> None:
    p = population(folders)
    p.children = [(0, 1, 0.3)] * 400
    mean = torch.stack([p.delta(3 + i, NAMES[0]) for i in range(400)]).mean(0)
    linear = 0.3 * p.delta(0, NAMES[0]) + 0.7 * p.delta(1, NAMES[0])
    assert float((mean - linear).norm() / linear.norm()) < 0.06


def test_the_pair_of_lowest_cosine_is_chosen_and_ties_go_to_the_first() -> None:
    dots = torch.tensor([[1.0, 0.9, 2.0], [0.9, 1.0, -0.2], [2.0, -0.2, 100.0]], dtype=torch.float64)  # cosines .9, .2, -.02
    assert torch.allclose(cosines(dots)[0], torch.tensor([1.0, 0.9, 0.2], dtype=torch.float64))
    assert least_alike(dots, set()) == (1, 2)
    assert least_alike(dots, {(1, 2)}) == (0, 2)
    assert least_alike(torch.eye(3, dtype=torch.float64), set()) == (0, 1)


def test_a_checkpoint_that_is_the_base_is_no_parent_before_others() -> None:
    dots = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)
    assert least_alike(dots, set()) == (1, 2)


def test_no_pair_has_two_children_and_children_become_parents(folders: list[Path]) -> None:
    p = population(folders)
    p.breed(9)
    pairs = [c[:2] for c in p.children]
    assert len(p) == 9 and len(set(pairs)) == 6
    assert any(max(pair) > 2 for pair in pairs)
    assert all(0 < a < 1 for _, _, a in p.children)


def test_products_that_grow_with_the_children_are_those_of_all_at_once(folders: list[Path]) -> None:
    p = population(folders)
    before = p._dots()
    p.children = [(0, 2, 0.25)]
    assert torch.allclose(p._with_last(before), p._dots(), rtol=1e-5)


def test_weights_do_not_depend_on_the_order_of_reading(folders: list[Path]) -> None:
    one, two = population(folders), population(folders)
    one.breed(5), two.breed(5)
    first = [one.weight(4, n) for n in NAMES]
    assert all(torch.equal(a, two.weight(4, n)) for a, n in reversed(list(zip(first, NAMES, strict=True))))
    assert not torch.equal(first[0], _bred(folders, seed=1))


def _bred(folders: list[Path], seed: int) -> torch.Tensor:
    p = population(folders, seed=seed)
    p.breed(5)
    return p.weight(4, NAMES[0])


def test_a_state_of_a_run_is_read_as_a_checkpoint_and_what_was_frozen_is_the_base(folders: list[Path], tmp_path: Path) -> None:
    base, tuned = Checkpoint(folders[0]), Checkpoint(folders[1])
    torch.save({n: tuned.get(n) for n in NAMES}, tmp_path / "weights-0.pt")
    (tmp_path / "complete.json").write_text("{}")
    state = Member(tmp_path, base)
    assert torch.equal(state.get(NAMES[0]), tuned.get(NAMES[0]))
    assert torch.equal(state.get("model.embed_tokens.weight"), base.get("model.embed_tokens.weight"))
    torch.save({}, tmp_path / "weights-1.pt")
    with pytest.raises(UserError, match="spread over several processes"):
        Member(tmp_path, base)


@pytest.fixture(scope="module")
def adapters(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from peft import LoraConfig, get_peft_model

    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        settings = LoraConfig(r=3, lora_alpha=6, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
        found.append(tmp_path_factory.mktemp("adapter"))
        get_peft_model(Checkpoint(folders[0]).model(), settings).save_pretrained(found[-1])
    return found


def test_an_adapter_is_the_checkpoint_that_it_merges_to(folders: list[Path], adapters: list[Path]) -> None:
    from peft import PeftModel

    merged = PeftModel.from_pretrained(Checkpoint(folders[0]).model(), adapters[0]).merge_and_unload()
    member = Member(adapters[0], Checkpoint(folders[0]))
    for name in (*NAMES, "model.layers.0.self_attn.q_proj.weight"):
        assert torch.allclose(member.get(name), merged.get_parameter(name), atol=1e-6)


def test_factors_are_merged_as_peft_merges_them(folders: list[Path], adapters: list[Path]) -> None:
    """Without dropping, PEFT's own dare_linear of two adapters gives the same weights."""
    from peft import PeftModel

    base = Checkpoint(folders[0])
    p = Population(base, [Member(a, base) for a in adapters], NAMES, drop=0.0, merge="factors", seed=0)
    p.children = [(0, 1, 0.3)]
    model = PeftModel.from_pretrained(base.model(), adapters[0], adapter_name="a")
    model.load_adapter(adapters[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "c", combination_type="dare_linear", density=1.0)
    model.set_adapter("c")
    merged = model.merge_and_unload()
    for name in NAMES:
        assert torch.allclose(p.weight(2, name), merged.get_parameter(name), atol=1e-5), name


def test_factors_of_whole_checkpoints_are_refused(folders: list[Path]) -> None:
    base = Checkpoint(folders[0])
    with pytest.raises(UserError, match="merge=weights"):
        Population(base, [Member(folders[1], base)], NAMES, drop=0.5, merge="factors", seed=0)
