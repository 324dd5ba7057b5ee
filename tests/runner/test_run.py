"""Runs: artifacts flow, a stopped run is taken up, a finished one is not run again, lineage tells all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import modelwright
from modelwright.cli import app as cli
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.runner import recipe
from modelwright.runner import reshape as reshape_step
from modelwright.runner import run as runner
from modelwright.runner import tune as tune_step

IDS = [{"input_ids": [(5 * i + j * j) % 90 + 3 for j in range(24)]} for i in range(16)]


@pytest.fixture
def three_steps(tmp_path: Path, tiny) -> recipe.Recipe:
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(r) + "\n" for r in IDS))
    train = {"tokens": 256, "batch": 2, "context": 16, "save_every": 2}
    return recipe.parse(
        {
            "name": "three",
            "seed": 1,
            "base": str(tiny("llama")),
            "save": {"to": str(tmp_path / "out")},
            "steps": [
                {"reshape.upcycle": {"experts": 4}},
                {"tune.full": {"data": "ids.jsonl", "train": train}},
                {"tune.lora": {"data": "ids.jsonl", "train": train, "r": 2}},
            ],
        },
        tmp_path,
    )


def test_steps_feed_each_other_and_leave_one_plain_folder(three_steps: recipe.Recipe, tiny) -> None:
    result = runner.run_recipe(three_steps)
    lineage = json.loads((result.to / "modelwright.json").read_text())
    assert [s["step"] for s in lineage["steps"]] == ["reshape.upcycle", "tune.full", "tune.lora"]
    assert lineage["base_fingerprint"] == Checkpoint(tiny("llama")).fingerprint() and lineage["seed"] == 1
    assert lineage["versions"]["torch"] == torch.__version__.split("+")[0] or lineage["versions"]["torch"] == torch.__version__
    assert (result.to / "steps" / "1-tune.full" / "dynamics.parquet").is_file()
    assert (result.to / "steps" / "2-tune.lora" / "adapter" / "adapter_model.safetensors").is_file()
    assert (result.to / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    assert {p.name for p in result.to.parent.iterdir()} == {"out", "ids.jsonl"}
    assert not [p for p in result.to.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pth")], "safetensors only"


def test_the_next_result_remembers_the_steps_before(three_steps: recipe.Recipe, tmp_path: Path) -> None:
    first = runner.run_recipe(three_steps)
    again = modelwright.run(
        "tune.full", base=first.to, to=tmp_path / "again", data=str(tmp_path / "ids.jsonl"), train={"tokens": 64, "batch": 2, "context": 16}
    )
    assert [s["step"] for s in json.loads((again.to / "modelwright.json").read_text())["steps"]] == [
        "reshape.upcycle",
        "tune.full",
        "tune.lora",
        "tune.full",
    ]


def test_a_run_stopped_between_steps_continues_with_the_same_result(three_steps: recipe.Recipe, tmp_path: Path, monkeypatch) -> None:
    whole = load_file(runner.run_recipe(three_steps).to / "model.safetensors")
    (tmp_path / "out").rename(tmp_path / "whole")
    real, calls = {"tune": tune_step.tune, "reshape": reshape_step.reshape}, []

    def tune(r, step, folder):
        calls.append(step.entry.name)
        if len(calls) == 2:
            raise RuntimeError("pulled the plug")
        return real["tune"](r, step, folder)

    def reshape(r, step, folder):
        calls.append(step.entry.name)
        return real["reshape"](r, step, folder)

    monkeypatch.setattr(tune_step, "tune", tune)
    monkeypatch.setattr(reshape_step, "reshape", reshape)
    calls.append("start")
    with pytest.raises(RuntimeError, match="plug"):
        calls.clear()
        runner.run_recipe(three_steps)
    assert calls == ["reshape.upcycle", "tune.full"] and not (tmp_path / "out").exists()
    calls[:] = ["again", "again"]
    resumed = load_file(runner.run_recipe(three_steps).to / "model.safetensors")
    assert calls == ["again", "again", "tune.full", "tune.lora"], "the finished step is not run again"
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[n], resumed[n]) for n in whole)


def test_a_finished_recipe_is_not_run_again(three_steps: recipe.Recipe, monkeypatch) -> None:
    first = runner.run_recipe(three_steps)
    monkeypatch.setattr(runner, "_run_steps", None)
    assert runner.run_recipe(three_steps).plain() == first.plain()


def test_another_recipe_does_not_overwrite(three_steps: recipe.Recipe, tiny) -> None:
    to = runner.run_recipe(three_steps).to
    before = (to / "model.safetensors").read_bytes()
    with pytest.raises(modelwright.UserError, match="exists already"):
        modelwright.run("reshape.upcycle", base=tiny("llama"), to=to, experts=2)
    assert (to / "model.safetensors").read_bytes() == before


def test_a_failed_certificate_is_not_saved_unless_told(tiny, tmp_path: Path, monkeypatch) -> None:
    from modelwright.reshape import upcycle

    honest = upcycle.upcycle

    def broken(source, knobs, seed=0):
        blueprint, promise = honest(source, upcycle.Knobs(method="drop", experts=4), seed)
        return blueprint, "same function"

    monkeypatch.setattr(upcycle, "METHOD", broken)
    with pytest.raises(modelwright.UserError, match="failed its certificate"):
        modelwright.run("reshape.upcycle", base=tiny("llama"), to=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    forced = modelwright.run("reshape.upcycle", base=tiny("llama"), to=tmp_path / "out", save={"force": True})
    assert forced.certificate["passed"] is False and (forced.to / "model.safetensors").is_file()


def test_json_output_has_the_certificate_at_hand(tiny, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["reshape", "upcycle", "--base", str(tiny("qwen2")), "--to", str(tmp_path / "o"), "--experts", "4", "--top-k", "2", "--json"]
        )
    assert not stop.value.code
    out = json.loads(capsys.readouterr().out)
    assert out["certificate"]["max_abs_dlogit"] <= 1e-4 and out["certificate"]["passed"] is True
    assert out["loads_in"] == "Qwen2MoeForCausalLM" and out["params_total"] > out["params_active"] > 0


def test_deep_check_tells_sizes_and_first_rows(three_steps: recipe.Recipe, tmp_path: Path) -> None:
    from modelwright.runner.preview import preview

    base, up, tune, _ = preview(three_steps)
    assert base["class"] == "LlamaForCausalLM" and up["class"] == "MixtralForCausalLM" and up["promise"] == "same function"
    assert tune["format"] == "token ids" and tune["first tokens"] == IDS[0]["input_ids"][:12]
    assert not (tmp_path / "out").exists()


def test_a_diverged_run_stops_with_a_sentence_and_leaves_nothing(tiny, tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(r) + "\n" for r in IDS))
    train = {"tokens": 512, "batch": 2, "context": 16, "lr": 1e12, "clip": 0, "save_every": 1, "eval_every": 1, "warmup": 0}
    with pytest.raises(modelwright.UserError, match="not finite at step"):
        modelwright.run("tune.full", base=tiny("llama"), to=tmp_path / "out", data=str(tmp_path / "ids.jsonl"), train=train)
    assert [p.name for p in tmp_path.iterdir()] == ["ids.jsonl"]


def test_a_finished_measurement_is_found_again_and_a_changed_one_is_noticed(tmp_path: Path) -> None:
    from modelwright.testing import made

    knobs = {**made("chains", tmp_path), "n": 4}
    first = modelwright.run("judge.select", to=tmp_path / "out", **knobs)
    again = modelwright.run("judge.select", to=tmp_path / "out", **knobs)
    assert again.steps[0]["metrics"] == first.steps[0]["metrics"]
    (tmp_path / "out" / "report.json").write_text("{")
    with pytest.raises(modelwright.UserError, match="damaged"):
        modelwright.run("judge.select", to=tmp_path / "out", **knobs)


def test_states_that_are_kept_become_experts(tiny, tmp_path: Path) -> None:
    from modelwright.testing import made

    train = {"tokens": 256, "batch": 2, "context": 16, "lr": 1e-2, "save_every": 2, "keep": 3}
    modelwright.run("tune.full", base=tiny("llama"), to=tmp_path / "tuned", train=train, **made("tokens", tmp_path))
    states = tmp_path / "tuned" / "steps" / "0-tune.full"
    assert len(list(states.glob("checkpoint-*"))) == 3 and not list(states.glob("*/optimizer*"))
    result = modelwright.run(
        "reshape.upit", base=tiny("llama"), to=tmp_path / "moe", checkpoints=[str(states)], experts=3, top_k=1, **made("tokens", tmp_path)
    )
    assert result.certificate["passed"] in (True, None) and not list(tmp_path.glob("*.run"))
