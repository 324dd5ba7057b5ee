"""Mixture of Masks: dense at step 0, held to its target, exported exactly, resumed bit for bit, and its controls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.constraint import open_probability
from modelwright.core.train.loop import Outcome
from modelwright.tune.masks import Knobs, Masks
from small import Fatal, go, rows, same, weights

IDS = torch.arange(3, 43).view(2, 20) % 96
FAST = {"mask_lr": 0.3, "multiplier_lr": 3.0, "ramp": 0.4, "hard": 0.15}


def make(**knobs: Any) -> Masks:
    return Masks(Knobs(**{"experts": 4, "top_k": 2} | FAST | knobs))


def hooked(technique: Masks, model: Any, train: bool = False) -> Any:
    """The model with the technique's parts on, as in a run."""
    technique.steps = 10
    technique.attach(model, Anatomy(model))
    technique.select(model, Anatomy(model_of("llama", device="meta")), 0)
    technique.prepare(rows(2))
    technique.terms()
    return model.train(train)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Masks, Outcome, Tensor]:
    model, technique = model_of("llama"), make()
    out = go(technique, model, tmp_path_factory.mktemp("masks"), rows(16), epochs=30.0, lr=1e-3, schedule="linear")
    for handle in technique._handles:
        handle.remove()
    technique._handles.clear()
    technique.terms()
    with torch.no_grad():
        logits = model.eval()(IDS).logits
    for handle in technique._handles:
        handle.remove()
    return model, technique, out, logits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "granite"])
def test_step_0_is_the_dense_model(kind: str) -> None:
    model = model_of(kind)
    with torch.no_grad():
        dense = model(IDS).logits
        assert (hooked(make(), model)(IDS).logits - dense).abs().max() < 1e-5 * max(1.0, float(dense.abs().max()) / 10)


def test_drawn_gates_change_the_output_of_a_training_pass() -> None:
    model = model_of("llama")
    dense = model(IDS).logits
    technique = make(begin=2.5)
    technique.before_batch({"real": torch.ones(2, 20, dtype=torch.bool)})
    assert (hooked(technique, model, train=True)(IDS).logits - dense).abs().max() > 1e-3


def test_the_expected_share_is_of_the_union_of_the_chosen_masks() -> None:
    technique = make(begin=2.5)
    model = hooked(technique, model_of("llama"), train=True)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, 5:] = False
    technique.before_batch({"real": real})
    model(IDS)
    technique.penalty()
    found = technique._active(technique.model.constraint.parts.gates.active())
    p = open_probability(torch.tensor(2.5))
    assert torch.allclose(found, (1 - (1 - p) ** 2).expand(2), atol=1e-6)  # of two independent masks
    on = torch.rand(2, 4, 48, generator=torch.Generator().manual_seed(0))
    by_token = torch.stack([1 - (1 - on[i][index[real.flatten()]]).prod(1).mean() for i, (_, index) in technique.heard.items()])
    assert torch.allclose(technique._active(on), by_token, atol=1e-6)


def test_routers_start_at_clusters_of_what_they_are_given() -> None:
    a, b = hooked(make(), model_of("llama")), hooked(make(router="random"), model_of("llama"))
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    for model, unit in ((a, True), (b, False)):
        norms = model.constraint.parts.router.detach().norm(dim=-1)
        assert (float(norms.std(1).max()) < 1e-5) is unit  # centres have one length a layer
        load = (x @ model.constraint.parts.router[0].T).argmax(1).bincount(minlength=4)
        assert int(load.min()) > 0


def test_the_share_of_active_neurons_reaches_its_target(trained: tuple[Any, Masks, Outcome, Tensor]) -> None:
    facts = trained[2].facts["masks"]
    assert abs(facts["reached"]["active"] - 0.5) < 0.01 and len(facts["active by layer"]) == 2
    assert facts["shared"] + facts["specific"] + facts["inactive"] == pytest.approx(1)
    assert facts["specific"] > 0 and trained[1].fixed


def test_fixed_masks_are_the_likeliest_neurons_in_proportion(trained: tuple[Any, Masks, Outcome, Tensor]) -> None:
    technique = trained[1]
    log_alpha = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(0))
    masks = technique._as_many(log_alpha)
    ratio = masks.sum(-1) / open_probability(log_alpha).sum(-1)
    assert float(ratio.std()) < 0.05 and abs(float(technique._active(masks.float()).mean()) - 0.5) < 0.02
    assert all(log_alpha[i, e][masks[i, e]].min() > log_alpha[i, e][~masks[i, e]].max() for i in range(2) for e in range(4))


def test_the_saved_mixture_gives_what_the_masked_model_gives(trained: tuple[Any, Masks, Outcome, Tensor], tmp_path: Path) -> None:
    model, technique, _, logits = trained
    parts = model.constraint
    made = technique.export(model, tmp_path)
    model.add_module("constraint", parts)
    with torch.no_grad():
        assert (made(IDS).logits - logits).abs().max() < 1e-5 * max(1.0, float(logits.abs().max()))
    assert type(made).__name__ == "GraniteMoeSharedForCausalLM" and made.config.num_experts_per_tok == 2


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 5.0, "schedule": "linear"}
    whole = model_of("llama")
    first = go(make(hard=0.3), whole, tmp_path / "whole", **settings)
    for stop in (8, 9):  # taken up at step 7, whose pass begins with the masks being fixed, and at step 8
        again, settings["save_every"] = model_of("llama"), stop - 1
        with pytest.raises(Fatal):
            go(make(hard=0.3), model_of("llama"), tmp_path / f"again{stop}", stop=stop, **settings)
        second = go(make(hard=0.3), again, tmp_path / f"again{stop}", **settings)
        assert same(weights(whole), weights(again)) and torch.equal(whole.constraint.parts.hard, again.constraint.parts.hard)
        assert first.facts == second.facts


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    one, other = model_of("llama"), model_of("llama")
    go(make(), one, tmp_path / "one", epochs=2.0, lr=1e-4)
    go(make(), other, tmp_path / "other", epochs=2.0, lr=1e-4, gradient_checkpointing=True)
    a, b = weights(one), weights(other)
    assert max(float((a[n] - b[n]).abs().max()) for n in a) <= 2e-6


@pytest.mark.parametrize("how", ["magnitude", "random"])
def test_the_controls_are_made_once_and_leave_a_dense_model(how: str, tmp_path: Path) -> None:
    model, technique = model_of("llama"), make(how=how, target=0.5)
    before = model.model.layers[0].mlp
    scores = before.down_proj.weight.detach().norm(dim=0) * before.up_proj.weight.detach().norm(dim=1)
    go(technique, model, tmp_path, lr=1e-4)
    masks = model.constraint.parts.hard.bool()
    assert int(masks.sum()) == 2 * 4 * 24 and torch.equal(masks[:, 0], masks[:, 3])
    best = set(scores.topk(24).indices.tolist())
    assert (set(masks[0, 0].nonzero().flatten().tolist()) == best) is (how == "magnitude")
    assert technique.export(model, tmp_path).config.intermediate_size == 24


def test_masks_alone_train_where_asked(tmp_path: Path) -> None:
    model = model_of("llama")
    before = weights(model)
    go(make(trains="masks"), model, tmp_path)
    after = weights(model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not torch.equal(after["constraint.parts.gates.log_alpha"], torch.full((2, 4, 48), 5.0))


def test_the_dense_model_teaches(tmp_path: Path) -> None:
    class Source:
        def model(self, dtype: Any) -> Any:
            return model_of("llama")

    away = {}
    for weight in (0.0, 20.0):
        model, technique = model_of("llama"), make(distill=weight, trains="all", ramp=1.0, hard=0.0, begin=8.0)
        technique.source = Source()
        go(technique, model, tmp_path / str(weight), epochs=6.0, lr=3e-3, clip=0.0)
        technique.export(model, tmp_path)  # takes the masks off
        with torch.no_grad():
            away[weight] = float((model(IDS).logits - model_of("llama")(IDS).logits).abs().mean())
    assert away[20.0] < 0.9 * away[0.0], away


@pytest.mark.parametrize(
    ("knobs", "said"), [({"top_k": 5}, "top_k=5 of 4 experts"), ({"target": 0.01}, "leaves no neuron")], ids=lambda v: str(v)
)
def test_bad_input_is_one_sentence(knobs: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        go(make(**knobs), model_of("llama"), tmp_path)
