"""DHA: nothing changes at step 0, at the fold and for equal heads; the budget is met; a stopped run goes on bit for bit."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import modelwright
from families import model_of
from modelwright.cli import app as cli
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.models.dha import CLASSES
from modelwright.tune.dha import Dha, Knobs
from modelwright.tune.heads.mixes import costs_of, fusion_loss, group_rows, mixed
from small import Fatal, go, rows, same, weights

IDS = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(0))
FOUR = {"num_key_value_heads": 4}


def attached(model: Any, **knobs: Any) -> Dha:
    technique = Dha(Knobs(**{"budget": 0.5, **knobs}))
    technique.attach(model, Anatomy(model))
    technique.terms()
    return technique


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


# ---- the maths
def test_the_fusion_loss_is_the_mean_over_groups_of_the_mean_over_pairs() -> None:
    g = torch.Generator().manual_seed(0)
    omega, labels = (
        torch.randn(2, 2, 5, 5, generator=g),
        torch.tensor([[[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]], [[0, 0, 1, 2, 1], [0, 0, 0, 0, 0]]]),
    )
    each = []
    for layer, kind in itertools.product(range(2), range(2)):
        for group in range(5):
            own = [i for i in range(5) if labels[layer, kind, i] == group]
            if len(own) > 1:
                x = omega[layer, kind]
                each.append(sum(float((x[a, own] - x[b, own]).square().mean()) for a, b in itertools.combinations(own, 2)))
                each[-1] /= len(own) * (len(own) - 1) / 2
    assert float(fusion_loss(omega, labels)) == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_the_fusion_loss_begins_at_two_over_the_size_and_is_0_where_rows_are_equal() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert float(fusion_loss(torch.eye(5), labels)) == pytest.approx((2 / 2 + 2 / 3) / 2)
    rows_of = group_rows(torch.randn(5, 5), labels)[labels]
    assert float(fusion_loss(rows_of, labels)) == 0.0
    assert float(fusion_loss(torch.eye(5), torch.arange(5))) == 0.0


def test_costs_are_symmetric_and_0_for_equal_rows() -> None:
    omega = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    assert torch.allclose(costs_of(omega), torch.tensor([[0, 0, 5 / 3], [0, 0, 5 / 3], [5 / 3, 5 / 3, 0]]))


# ---- what stays as it was
@pytest.mark.parametrize("kind", CLASSES)
def test_at_step_0_the_function_is_unchanged(kind: str) -> None:
    plain, model = model_of(kind, **FOUR), model_of(kind, **FOUR)
    attached(model, search=3)
    assert float((logits(model) - logits(plain)).abs().max()) == 0.0


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_folding_the_mixes_into_the_weights_keeps_the_function(kind: str) -> None:
    model = model_of(kind, **FOUR)
    technique = attached(model, search=3)
    parts = model.constraint["parts"]
    with torch.no_grad():
        parts.omega.add_(torch.randn(parts.omega.shape) * 0.2)
        before = logits(model)
        technique.step = 3
        technique.leave(parts)
    assert technique.groups_of is not None and torch.equal(parts.omega[0, 0], torch.eye(4))
    assert torch.allclose(logits(model), before, atol=2e-5)


@torch.no_grad()
def planted(kind: str, groups: torch.Tensor) -> Any:
    """A model whose heads of one group are equal; groups (layers, 2, 4)."""
    model = model_of(kind, **FOUR, num_attention_heads=8, head_dim=8)
    for layer in range(2):
        attention = model.model.layers[layer].self_attn
        for i, name in enumerate(("k_proj", "v_proj")):
            for p in getattr(attention, name).parameters():
                heads = p.unflatten(0, (4, -1))
                p.copy_(heads[[int((groups[layer, i] == g).nonzero()[0]) for g in groups[layer, i]]].flatten(0, 1))
    return model


@pytest.mark.parametrize("kind", CLASSES)
def test_equal_heads_fuse_without_loss_each_layer_and_kind_in_its_own_groups(kind: str, tmp_path: Path) -> None:
    groups = torch.tensor([[[0, 1, 0, 2], [0, 0, 1, 0]], [[0, 0, 0, 0], [0, 1, 2, 3]]])
    model = planted(kind, groups)
    before, technique = logits(model), attached(model, search=3)
    technique.groups_of = groups
    made = technique.export(model, tmp_path)
    assert made.config.dha_keys[0] == [0, 0, 1, 1, 0, 0, 2, 2] and not made.training
    assert float((logits(made) - before).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", CLASSES)
def test_export_gqa_is_a_stock_model_that_computes_the_same_wherever_the_heads_of_a_group_stood(kind: str, tmp_path: Path) -> None:
    groups = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 1]])[:, None].repeat(1, 2, 1)
    model = planted(kind, groups)
    before, technique = logits(model), attached(model, search=3, export="gqa")
    technique.groups_of = groups
    made = technique.export(model, tmp_path)
    assert type(made) is type(model) and made.config.num_key_value_heads == 2
    assert float((logits(made) - before).abs().max()) < 1e-5


# ---- training
def test_the_search_finds_heads_that_are_equal(tmp_path: Path) -> None:
    """Keys and values of heads 0 and 3 are one; the others are not. The groups of three of four heads put those two together."""
    groups = torch.tensor([0, 1, 2, 0]).repeat(2, 2, 1)
    technique = Dha(Knobs(budget=0.75, search=30, layers="uniform", search_weight=10.0))
    go(technique, planted("llama", groups), tmp_path, rows(16), epochs=8, lr=1e-3, save_every=1000)
    assert technique.groups_of is not None
    assert (technique.groups_of == groups).all(-1).float().mean() >= 0.75


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dha, Any]:
    technique, model = Dha(Knobs(budget=0.5, search=4, omega_lr=2e-2)), model_of("llama", **FOUR)
    go(technique, model, tmp_path_factory.mktemp("run"), rows(16), epochs=15, lr=1e-3)
    return technique, model


def test_the_constraint_brings_the_rows_of_a_group_together(trained: tuple[Dha, Any]) -> None:
    """60 steps: the loss of fusion falls to a twentieth of what it begins with."""
    technique, _ = trained
    assert technique.measured["fusion"] < 0.05 * 2 / 4 and technique.target("fusion") == 0.0


def test_the_budget_is_met_exactly_and_one_head_stands_for_each_group(trained: tuple[Dha, Any], tmp_path: Path) -> None:
    technique, model = trained
    labels = technique._labels()
    assert int((labels.amax(-1) + 1).sum()) == 8  # half of 2 layers x 2 kinds x 4 heads
    omega = technique._masked(model.constraint["parts"].omega.detach())
    p = model.model.layers[1].self_attn.v_proj.weight
    first = mixed(p, group_rows(omega[1, 1], labels[1, 1]))
    made = technique.export(model, tmp_path)
    assert torch.equal(made.model.layers[1].self_attn.v_proj.weight, first)
    facts = technique.facts()
    assert facts["heads kept"] == "8 of 16" and "note" not in facts
    technique.measured["fusion"] = 0.5
    assert "train longer" in technique.facts()["note"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    model = model_of("llama", **FOUR)
    go(Dha(Knobs(budget=0.5, search=2)), model, tmp_path_factory.mktemp("whole"), rows(), epochs=2)
    return weights(model)


@pytest.mark.parametrize("stop", [1, 3])  # in the search, after it
def test_a_run_that_was_stopped_goes_on_bit_for_bit(stop: int, unbroken: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model, settings = model_of("llama", **FOUR), {"epochs": 2, "save_every": stop}
    with pytest.raises(Fatal):
        go(Dha(Knobs(budget=0.5, search=2)), model_of("llama", **FOUR), tmp_path, rows(), stop=stop + 1, **settings)
    go(Dha(Knobs(budget=0.5, search=2)), model, tmp_path, rows(), **settings)
    assert same(unbroken, weights(model))


@pytest.mark.parametrize(
    ("knobs", "counts"),
    [
        ({"layers": "uniform", "budget": 0.75}, [[3, 3], [3, 3]]),
        ({"layers": "adaptive", "budget": 0.75}, [[4, 1], [4, 3]]),
        ({"export": "gqa"}, [[2, 2], [2, 2]]),
        ({"grouping": "neighbours"}, [[2, 2], [2, 2]]),
    ],
)
def test_heads_are_shared_out_by_cost_or_evenly(knobs: dict[str, Any], counts: list[list[int]]) -> None:
    """Heads that are alike cost nothing to fuse: all values of the first layer are one, the others differ from each other."""
    technique = attached(model_of("llama", **FOUR), search=3, **knobs)
    costs = torch.ones(2, 2, 4, 4) * torch.tensor([[3.0, 0.0], [2.0, 1.0]])[..., None, None]
    found = technique._neighbours() if "grouping" in knobs else technique._grouped(costs)
    assert (found.amax(-1) + 1).tolist() == counts
    if "export" in knobs:
        assert torch.equal(found[:, 0], found[:, 1]) and all(torch.bincount(g).tolist() == [2, 2] for g in found[:, 0])


def data(folder: Path) -> str:
    lines = [{"input_ids": [(7 * i + j) % 90 + 3 for j in range(20)]} for i in range(12)]
    (folder / "ids.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return str(folder / "ids.jsonl")


@pytest.mark.parametrize(
    ("knobs", "cls"),
    [
        ({}, "DhaQwen2ForCausalLM"),
        ({"export": "gqa"}, "Qwen2ForCausalLM"),
    ],
)
def test_a_run_saves_a_smaller_cache(knobs: dict[str, Any], cls: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    train = {"epochs": 1, "batch": 2, "context": 16, "lr": 1e-3}
    given = {"budget": 0.5, "search": 2, "train": train, "data": data(tmp_path), **knobs}
    result = modelwright.run("tune.dha", base=tiny("qwen2", **FOUR), to=tmp_path / "out", **given)
    c = result.certificate
    assert c["loads_in"] == cls
    assert c["kv_bytes_per_token"] == c["before"]["kv_bytes_per_token"] * given["budget"]
    assert len(Checkpoint(result.to).model().generate(IDS, max_new_tokens=3, do_sample=False)[0]) == 17


@pytest.mark.parametrize(
    ("kind", "knobs", "words"),
    [
        ("gpt2", {}, ["one matrix"]),
        ("gemma2", {}, ["only llama, mistral, qwen2, qwen3"]),
        ("llama", {"budget": 0.2}, ["budget=0.2", "give 0.25"]),
        ("llama", {"budget": 1.0}, ["budget=1.0"]),
        ("llama", {"export": "gqa", "budget": 0.75}, ["budget=0.75", "0.25, 0.5"]),
        ("llama", {"layers": "uniform", "budget": 0.6}, ["budget=0.6", "0.25, 0.5, 0.75"]),
        ("llama", {"search": 240}, ["the search takes 240", "lower search"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_done_is_refused(
    kind: str, knobs: dict[str, Any], words: list[str], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    given = {"search": 1, "train": {"batch": 2, "context": 16}, "data": data(tmp_path / "in"), **knobs}
    base = tiny(kind, **({} if kind == "gpt2" else FOUR))
    with pytest.raises(UserError) as caught:
        modelwright.run("tune.dha", base=base, to=tmp_path / "out", **given)
    assert all(w in str(caught.value) for w in words), caught.value
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    common = ["tune", "dha", "--base", str(tiny("llama", **FOUR)), "--data", data(tmp_path), "--json", "--budget", "0.5", "--search", "3"]
    common += ["--train.context", "16", "--train.epochs", "2", "--train.lr", "1e-4"]
    for to, own in (("one", ["--train.batch", "4"]), ("two", ["--train.batch", "2", "--nproc", "2"])):
        with pytest.raises(SystemExit) as end:
            cli.main([*common, "--to", str(tmp_path / to), *own])
        assert not end.value.code
    one, two = (load_file(tmp_path / to / "model.safetensors") for to in ("one", "two"))
    assert one.keys() == two.keys() and max(float((one[n] - two[n]).abs().max()) for n in one) <= 2e-5
