"""tune.masked: behind closed masks a grown model is the small one, they open in turn, and what is saved has none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modelwright
from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.certificate import logits_of
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import write_tensors
from modelwright.reshape import grow as growth
from modelwright.tune.masked import Knobs, Masked
from small import go, rows

Tiny = Callable[..., Path]
IDS = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))


def grown(base: Path, to: Path, **knobs: Any) -> Path:
    made, promise = growth.grow(Checkpoint(base), growth.Knobs(operator="masked", **knobs))
    assert promise == "changed function"
    to.mkdir()
    write_tensors(made, to, 10**9)
    return to


def masked(model: Any, ramp: int = 2) -> Masked:
    technique = Masked(Knobs(ramp=ramp))
    technique.attach(model, Anatomy(model))
    return technique


def logits(base: Path) -> torch.Tensor:
    return logits_of(Checkpoint(base).model(torch.float32), IDS)


@pytest.mark.parametrize(
    ("kind", "knobs", "tolerance"),
    [
        ("llama", {"depth": 2}, 0.0),
        ("mixtral", {"depth": 2}, 0.0),
        ("qwen2", {"depth": 1, "heads": 8, "ffn": 70}, 1e-6),
        ("llama", {"depth": 1, "hidden": 64}, 1e-5),
        ("qwen3", {"depth": 2, "hidden": 48}, 1e-5),
        ("gpt2", {"depth": 2}, 0.0),
        ("gpt2", {"depth": 1, "ffn": 160}, 1e-6),
    ],
)
def test_closed_masks_make_the_model_the_small_one(kind: str, knobs: dict, tolerance: float, tiny: Tiny, tmp_path: Path) -> None:
    base = tiny(kind)
    model = Checkpoint(grown(base, tmp_path / "out", **knobs)).model(torch.float32)
    plain = logits_of(model, IDS)
    technique = masked(model)
    want = logits(base)
    assert float((logits_of(model, IDS) - want).abs().max()) <= tolerance < float((plain - want).abs().max())
    technique.step = 2 * len(technique.kinds)
    torch.testing.assert_close(logits_of(model, IDS), plain, rtol=1e-5, atol=1e-5)
    technique.remove()
    assert torch.equal(logits_of(model, IDS), plain)


def test_masks_open_one_after_another(tiny: Tiny, tmp_path: Path) -> None:
    model = Checkpoint(grown(tiny("llama"), tmp_path / "out", depth=2, hidden=64)).model()
    technique, seen = masked(model), []
    assert technique.kinds == ["ffn", "hidden", "heads", "blocks"]
    for technique.step in range(9):
        seen.append([technique.open(k) for k in technique.kinds])
    assert seen[:4] == [[0, 0, 0, 0], [0.5, 0, 0, 0], [1, 0, 0, 0], [1, 0.5, 0, 0]]
    assert seen[-1] == [1, 1, 1, 1]


def test_run_ends_as_a_plain_model_and_begins_at_the_old_loss(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"input_ids": [(7 * i + j) % 90 + 3 for j in range(20)]}) + "\n" for i in range(12))
    )
    base = tiny("qwen2")
    to = modelwright.run("reshape.grow", base=base, to=tmp_path / "grown", operator="masked", depth=2, hidden=64).to
    train = {"tokens": 256, "batch": 2, "context": 16, "lr": 1e-3, "warmup": 0.0}
    result = modelwright.run("tune.masked", base=to, to=tmp_path / "out", data=str(tmp_path / "x.jsonl"), train=train, ramp=2)
    plain = modelwright.run("tune.full", base=base, to=tmp_path / "plain", data=str(tmp_path / "x.jsonl"), train=train)
    assert result.steps[0]["evals"][0]["loss"] == pytest.approx(plain.steps[0]["evals"][0]["loss"], abs=1e-4)
    assert set(result.steps[0]["facts"]["masked"].values()) == {1.0}
    assert not {"grown_from", "grown_blocks"} & Checkpoint(result.to).config.keys()


def test_stopped_run_goes_on_with_the_masks_where_they_were() -> None:
    technique = Masked(Knobs(ramp=4))
    technique.step, technique.kinds = 3, ["ffn"]
    again = Masked(Knobs(ramp=4))
    again.load_state_dict(technique.state_dict())
    again.kinds = ["ffn"]
    assert again.open("ffn") == technique.open("ffn") == 0.75


def test_run_too_short_to_open_the_masks_is_refused_before_it_starts(tiny: Tiny, tmp_path: Path) -> None:
    model = Checkpoint(grown(tiny("llama"), tmp_path / "out", depth=2)).model()
    technique = Masked(Knobs(ramp=50))
    from modelwright.core.knobs import Train

    technique.settings(rows(), Train(batch=4))
    with pytest.raises(UserError, match="masks need 50"):
        technique.attach(model, Anatomy(model))


def test_masks_that_are_still_closed_are_not_saved(tiny: Tiny, tmp_path: Path) -> None:
    technique = masked(Checkpoint(grown(tiny("llama"), tmp_path / "out", depth=2)).model())
    with pytest.raises(UserError, match="still masked"):
        technique.export(None, tmp_path)


def test_model_without_masked_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not grown by masks"):
        go(Masked(Knobs(ramp=1)), model_of("llama"), tmp_path)


def test_stream_under_layer_norm_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="LayerNorm"):
        growth.grow(Checkpoint(tiny("gpt2")), growth.Knobs(operator="masked", depth=1, hidden=64))
