"""The three measures of depth are what their definitions say, on models with and without windows, and leave the model alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.step import EvalResult, StepContext
from modelwright.inspect.depth import Knobs, angles, depth, gradient_norms, mean_loss, skipped, states_of

IDS = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))


def blocks_of(model: Any) -> list[Any]:
    return [b.module for b in Anatomy(model).blocks]


def inspect(base: Path, folder: Path, **knobs: Any) -> EvalResult:
    return depth(Knobs(**knobs), StepContext(folder, source=Checkpoint(base)))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"])
def test_loss_without_a_block_is_that_of_the_model_built_without_it(kind: str) -> None:
    model = model_of(kind, **({"num_hidden_layers": 3} if kind != "gpt2" else {"n_layer": 3}))
    body = model.get_submodule(Anatomy(model).blocks[0].path.rpartition(".")[0])
    blocks = blocks_of(model)
    with skipped(blocks[1]):
        passed_over = mean_loss(model, [IDS])
    del body[1]
    model.config.num_hidden_layers = 2
    assert mean_loss(model, [IDS]) == pytest.approx(passed_over, abs=1e-6)


def test_windows_of_the_other_blocks_stay_where_they_are() -> None:
    """With two kinds of attention in turn, a block that is cut out would give its successors the other's mask."""
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = model_of("gemma2", num_hidden_layers=4, layer_types=types, sliding_window=3)
    silent = model_of("gemma2", num_hidden_layers=4, layer_types=types, sliding_window=3)
    with torch.no_grad():
        for p in (silent.model.layers[1].self_attn.o_proj, silent.model.layers[1].mlp.down_proj):
            p.weight.zero_()
    with skipped(blocks_of(model)[1]):
        assert mean_loss(model, [IDS]) == pytest.approx(mean_loss(silent, [IDS]), abs=1e-6)


def test_angles_are_those_of_the_hidden_states() -> None:
    model = model_of("llama", num_hidden_layers=3)
    loss, states = states_of(model, blocks_of(model), [IDS[:3], IDS[3:]])
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states[:-1]  # the last one has been through the final norm
    found = angles(states)
    for i in range(len(hidden) - 1):
        cosine = torch.cosine_similarity(hidden[i][:, -1].double(), hidden[i + 1][:, -1].double(), dim=-1)
        assert float(found[i, 0]) == pytest.approx(float((cosine.acos() / math.pi).mean()), abs=1e-6)
    assert found[0, 2] > 0 and math.isnan(found[1, 2]) and math.isnan(found[2, 1])
    assert loss == pytest.approx(mean_loss(model, [IDS]), abs=1e-6)


def test_block_that_adds_nothing_turns_by_nothing_and_costs_nothing() -> None:
    model = model_of("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    loss, states = states_of(model, blocks_of(model), [IDS])
    assert float(angles(states)[1, 0]) < 1e-7 < float(angles(states)[0, 0])
    with skipped(blocks_of(model)[1]):
        assert mean_loss(model, [IDS]) == loss


def test_gradient_norms_are_of_the_mean_loss_and_do_not_depend_on_the_batch() -> None:
    model = model_of("llama")
    one, cut = (gradient_norms(model, blocks_of(model), b) for b in ([IDS], list(IDS.split(1))))
    assert one == pytest.approx(cut, rel=1e-5)
    model(IDS, labels=IDS).loss.backward()
    want = [math.sqrt(sum(float(p.grad.norm()) ** 2 for p in b.parameters())) for b in blocks_of(model)]
    assert one == pytest.approx(want, rel=1e-5)


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model = model_of("llama")
    block = blocks_of(model)[0]
    with pytest.raises(ZeroDivisionError), skipped(block):
        _ = 1 / 0
    states_of(model, blocks_of(model), [IDS])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_step_reports_every_block_and_names_the_least_needed(tiny: Callable[..., Path], tmp_path: Path) -> None:
    found = inspect(tiny("qwen3", num_hidden_layers=3), tmp_path)
    m = found.metrics
    assert len(m["gradient_norm"]) == len(m["angular_distance"]) == len(m["rise_without"]) == 3
    assert sorted(m["least_needed"]) == [0, 1, 2] and min(m["rise_without"]) == m["rise_without"][m["least_needed"][0]]
    assert [p["kind"] for p in found.plots] == ["bars", "line", "heat"]
    less = inspect(tiny("qwen3", num_hidden_layers=3), tmp_path, gradients=False, drops=False)
    assert "gradient_norm" not in less.metrics and "rise_without" not in less.metrics
    assert less.metrics["loss"] == m["loss"]


def test_text_of_one_s_own_is_measured_in_whole_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("import os\nfor i in range(10): print(i)\n" * 40)
    m = inspect(
        Path("seedling"), tmp_path, data=Data(path=str(tmp_path / "a.txt")), context=32, rows=4, gradients=False, drops=False
    ).metrics
    assert 0 < m["loss"] < 8


def test_what_cannot_be_measured_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="encoder"):
        inspect(tiny("t5"), tmp_path)
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(UserError, match="whole rows"):
        inspect(Path("seedling"), tmp_path, data=Data(path=str(tmp_path / "a.txt")))
