"""Shearing: the source at the start, the shape at the end, the same bits when resumed, baselines behind the same export."""

from pathlib import Path
from typing import Any

import pytest
import torch

from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.loop import Outcome
from modelwright.tune.shear import Knobs, Shear
from small import Fatal, go, rows, same, weights

IDS = torch.arange(3, 43).view(2, 20) % 96
SIZES = {"layers": 2, "heads": 2, "ffn": 24, "hidden": 24}


def make(**knobs: Any) -> Shear:
    return Shear(Knobs(**SIZES | {"mask_lr": 0.3, "multiplier_lr": 3.0} | knobs))


def source(kind: str = "llama") -> Any:
    return model_of(kind, num_hidden_layers=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Shear, Outcome, torch.Tensor]:
    model, technique = source(), make()
    out = go(technique, model, tmp_path_factory.mktemp("shear"), rows(16), epochs=30.0, lr=1e-3, schedule="linear")
    technique._handles.clear()
    technique.terms()
    with torch.no_grad():
        logits = model.eval()(IDS).logits
    for h in technique._handles:
        h.remove()
    return model, technique, out, logits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "granite"])
def test_evaluation_begins_with_the_source(kind: str) -> None:
    model, technique = source(kind), make()
    with torch.no_grad():
        before = model(IDS).logits
        technique.attach(model, Anatomy(model))
        technique.steps = 10
        technique.terms()
        technique.leave(model.constraint.parts)
        assert (model.eval()(IDS).logits - before).abs().max() < 1e-5 * max(1.0, float(before.abs().max()))
        assert (model.train()(IDS).logits - before).abs().max() > 1e-5  # a pass of training draws gates


def test_every_block_is_held_to_its_target_within_a_unit(trained: tuple[Any, Shear, Outcome, torch.Tensor]) -> None:
    parts, of = trained[0].constraint.parts, {"layers": (3, 2), "heads": (2, 1), "ffn": (48, 24), "hidden": (32, 24)}
    for kind, (n, keep) in of.items():
        expected = parts[kind].active().detach().mean(-1) * n
        assert (expected - keep).abs().max() < 1, (kind, expected)
    assert trained[2].facts["shear"]["wanted"] == {k: keep / n for k, (n, keep) in of.items()}
    assert len(trained[2].facts["shear"].get("kept blocks", [])) in (0, 2)


def test_a_shape_that_was_cut_early_is_said(trained: tuple[Any, Shear, Outcome, torch.Tensor], tmp_path: Path) -> None:
    assert "cut early" not in trained[2].facts["shear"]
    assert "raise multiplier_lr" in go(make(multiplier_lr=1e-3), source(), tmp_path, lr=1e-3).facts["shear"]["cut early"]


def test_the_export_is_the_last_evaluation(trained: tuple[Any, Shear, Outcome, torch.Tensor], tmp_path: Path) -> None:
    model, technique, _, logits = trained
    added = model.constraint
    made = technique.export(model, tmp_path)
    model.add_module("constraint", added)
    with torch.no_grad():
        assert (made(IDS).logits - logits).abs().max() < 2e-5 * max(1.0, float(logits.abs().max()))
    assert (made.config.num_hidden_layers, made.config.hidden_size) == (2, 24)


def test_gates_stay_within_their_limits(trained: tuple[Any, Shear, Outcome, torch.Tensor]) -> None:
    assert all(g.log_alpha.abs().max().item() <= 4.6052 for g in trained[0].constraint.parts.values())


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 4.0, "schedule": "linear", "save_every": 3}
    whole, again = source(), source()
    first = go(make(), whole, tmp_path / "whole", **settings)
    with pytest.raises(Fatal):
        go(make(), source(), tmp_path / "again", stop=5, **settings)
    second = go(make(), again, tmp_path / "again", **settings)
    assert same(weights(whole), weights(again)) and first.facts == second.facts


@pytest.mark.parametrize("how", ["magnitude", "activation", "random", "uniform"])
def test_baselines_choose_once_and_train_what_is_left(how: str, tmp_path: Path) -> None:
    model, technique = source(), make(how=how)
    go(technique, model, tmp_path, lr=1e-3)
    gates = technique.settle(model.constraint.parts, final=True)
    assert {k: int(v[..., :].count_nonzero(-1).max()) for k, v in gates.items()} == {"layers": 2, "heads": 1, "ffn": 24, "hidden": 24}
    assert all(set(v.unique().tolist()) == {0.0, 1.0} for v in gates.values())
    with torch.no_grad():
        technique._handles.clear()
        technique.terms()
        logits = model.eval()(IDS).logits
    assert (technique.export(model, tmp_path)(IDS).logits - logits).abs().max() < 2e-5 * max(1.0, float(logits.abs().max()))


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"layers": 4}, "layers=4 is more than the model has"),
        ({"heads": 6}, "heads=6 is more than the model has"),
        ({"heads": 3}, "heads=3 cuts a group in two"),
        ({"layers": 3, "heads": 4, "ffn": 48, "hidden": 32}, "nothing is to become smaller"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(knobs: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        go(make(**knobs), source(), tmp_path)
