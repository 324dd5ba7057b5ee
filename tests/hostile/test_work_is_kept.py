"""What was finished or saved is not lost to a later mistake, a damaged file or a folder of somebody else's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import modelwright
from modelwright import UserError
from modelwright.core.train.states import all_states, facts_of, latest_state
from modelwright.runner.recipe import parse
from modelwright.runner.run import run_recipe
from small import Fatal

TRAIN = {"tokens": 256, "batch": 2, "context": 16, "lr": 1e-2, "save_every": 2, "warmup": 0.0, "schedule": "linear"}


def _data(folder: Path) -> str:
    file = folder / "ids.jsonl"
    file.write_text("".join(json.dumps({"input_ids": [(7 * i + j) % 90 + 3 for j in range(20)]}) + "\n" for i in range(12)))
    return str(file)


def _stopped(tiny: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, stop: int = 6, **train: Any) -> dict[str, Any]:
    """A run that ended from outside in the middle of training; gives its arguments."""
    from modelwright.core.train import loop

    arguments = {"base": tiny("llama"), "to": folder / "out", "data": _data(folder), "train": {**TRAIN, **train}}
    real = loop._Loop.on_step_end

    def until(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        real(self, args, state, control, **more)
        if state.global_step == stop:
            raise Fatal

    with monkeypatch.context() as m, pytest.raises(Fatal):
        m.setattr(loop._Loop, "on_step_end", until)
        modelwright.run("tune.full", **arguments)
    return arguments


def test_a_later_step_that_refuses_its_input_keeps_the_finished_ones(tiny, tmp_path: Path) -> None:
    steps: list[Any] = [
        {"reshape.upcycle": {"experts": 2, "top_k": 1}},
        {"tune.full": {"data": str(tmp_path / "bad.jsonl"), "train": TRAIN}},
    ]
    (tmp_path / "bad.jsonl").write_text('{"text": null}\n')
    recipe = parse({"base": str(tiny("llama")), "steps": steps, "save": {"to": str(tmp_path / "out")}})
    with pytest.raises(UserError):
        run_recipe(recipe)
    assert (tmp_path / "out.run" / "0-reshape.upcycle" / "done.json").is_file()
    made = (tmp_path / "out.run" / "0-reshape.upcycle" / "result" / "model.safetensors").stat().st_mtime_ns
    _data(tmp_path)
    (tmp_path / "bad.jsonl").write_text((tmp_path / "ids.jsonl").read_text())
    result = run_recipe(recipe)
    assert result.to.is_dir() and len(result.steps) == 2 and made and not (tmp_path / "out.run").exists()


def test_a_file_that_appears_at_the_target_costs_nothing(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelwright.runner import run as runner

    real = runner.write_lineage

    def appears(*a: Any) -> None:
        real(*a)
        (tmp_path / "out").write_text("mine")

    with monkeypatch.context() as m, pytest.raises(UserError, match="appeared"):
        m.setattr(runner, "write_lineage", appears)
        modelwright.run("reshape.upcycle", base=tiny("llama"), to=tmp_path / "out", experts=2, top_k=1)
    assert (tmp_path / "out").read_text() == "mine" and (tmp_path / "out.run").is_dir()


def test_other_settings_do_not_throw_a_stopped_run_away(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _stopped(tiny, tmp_path, monkeypatch)
    states = [p.name for p in all_states(tmp_path / "out.run" / "0-tune.full")]
    with pytest.raises(UserError, match="train.lr was 0.01 and is 0.02"):
        modelwright.run("tune.full", **{**arguments, "train": {**TRAIN, "lr": 2e-2}})
    assert [p.name for p in all_states(tmp_path / "out.run" / "0-tune.full")] == states != []
    other = modelwright.run("tune.full", **{**arguments, "train": {**TRAIN, "lr": 2e-2}}, save={"discard": True})
    assert other.steps[0]["facts"]["steps"] == 8


def test_a_folder_of_somebody_else_s_is_not_touched(tiny, tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not ours"):
        modelwright.run("reshape.upcycle", base=tiny("llama"), to=tmp_path / "out", experts=2, top_k=1)
    assert (tmp_path / "out.run" / "thesis.txt").read_text() == "mine"


FILES = ("weights-0.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "techniques.pt", "trainer_state.json", "complete.json")


@pytest.mark.parametrize(
    "file", [pytest.param(f, marks=pytest.mark.slow) if f not in ("optimizer.pt", "complete.json") else f for f in FILES]
)
def test_a_state_that_was_cut_gives_way_to_the_one_before(file: str, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _stopped(tiny, tmp_path, monkeypatch)
    folder = tmp_path / "out.run" / "0-tune.full"
    newest = latest_state(folder)
    assert newest is not None and (newest / file).is_file(), sorted(p.name for p in newest.iterdir())
    content = (newest / file).read_bytes()
    (newest / file).write_bytes(content[: len(content) // 2])
    assert facts_of(newest) is None and latest_state(folder) not in (None, newest)
    result = modelwright.run("tune.full", **arguments)
    whole = modelwright.run("tune.full", **{**arguments, "to": tmp_path / "whole"})
    assert any("damaged" in n for n in result.steps[0]["notes"]) or file == "complete.json"
    a, b = (load_file(r.to / "model.safetensors") for r in (result, whole))
    assert all(torch.equal(a[n], b[n]) for n in b), "and ends where an unbroken run ends"


@pytest.mark.slow
@pytest.mark.parametrize("file", ["key", "settings.json", "done.json"])
def test_a_cut_note_of_the_runner_does_not_stop_it(file: str, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _stopped(tiny, tmp_path, monkeypatch)
    (tmp_path / "out.run" / "0-tune.full" / file).write_text("{")
    assert modelwright.run("tune.full", **arguments).to.is_dir()


@pytest.mark.parametrize("file", ["model.safetensors", "report.json", "config.json"])
def test_a_damaged_result_is_said_and_not_taken(file: str, tiny, tmp_path: Path) -> None:
    arguments = {"base": tiny("llama"), "to": tmp_path / "out", "experts": 2, "top_k": 1}
    to = modelwright.run("reshape.upcycle", **arguments).to
    content = (to / file).read_bytes()
    (to / file).write_bytes(content[:-3])
    with pytest.raises(UserError, match=f"damaged.*{file}"):
        modelwright.run("reshape.upcycle", **arguments)
    (to / file).write_bytes(content)
    assert modelwright.run("reshape.upcycle", **arguments).to == to


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", "a\nb", "x" * 200])
def test_a_name_is_no_way_out_of_the_folder(name: str) -> None:
    with pytest.raises(UserError, match="does not fit"):
        parse({"name": name, "base": "seedling", "steps": ["tune.full"]})


def test_only_known_regular_files_travel_with_a_result(tiny, tmp_path: Path) -> None:
    base, secret = tmp_path / "base", tmp_path / "secret.txt"
    shutil.copytree(tiny("llama"), base)
    secret.write_text("secret")
    for name in ("tokenizer.py", "tokenizer_evil.pkl"):
        (base / name).write_text("x")
    (base / "special_tokens_map.json").symlink_to(secret)
    to = modelwright.run("reshape.upcycle", base=base, to=tmp_path / "out", experts=2, top_k=1).to
    assert not {p.name for p in to.iterdir()} & {"tokenizer.py", "tokenizer_evil.pkl", "special_tokens_map.json"}


def test_a_card_shows_a_name_as_it_stands(tiny, tmp_path: Path) -> None:
    recipe = parse(
        {
            "name": "x <script> | y",
            "base": str(tiny("llama")),
            "steps": [{"reshape.upcycle": {"experts": 2, "top_k": 1}}],
            "save": str(tmp_path / "o"),
        }
    )
    card = (run_recipe(recipe).to / "README.md").read_text()
    assert "<script>" not in card.split("```")[0].replace("\\<script\\>", "")


CHECKPOINTS: dict[str, Any] = {
    "an index that swaps two names": lambda f: _index(
        f, lambda m: {**m, **dict(zip(list(m)[:1] + list(m)[-1:], [m[list(m)[-1]], m[list(m)[0]]], strict=True))}
    ),
    "an index that misses a name": lambda f: _index(f, lambda m: dict(list(m.items())[1:])),
    "an index that invents a name": lambda f: _index(f, lambda m: {**m, "model.nothing": next(iter(m.values()))}),
    "an adapter beside the weights": lambda f: (f / "adapter_config.json").write_text("{}"),
    "whole numbers as architectures": lambda f: _config(f, architectures=[3]),
    "another model type": lambda f: _config(f, model_type="mixtral"),
    "a thousand million layers": lambda f: _config(f, num_hidden_layers=10**9),
    "a thousand million labels": lambda f: _config(f, num_labels=10**9),
    "two sets of weights": lambda f: shutil.copy(next(f.glob("model-*.safetensors")), f / "model.safetensors"),
}


def _index(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors.index.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, "weight_map": change(whole["weight_map"])}))


def _config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_a_damaged_checkpoint_is_one_sentence(fault: str, tiny, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny("llama", shard="20KB"), base)
    CHECKPOINTS[fault](base)
    with pytest.raises(UserError):
        modelwright.run("reshape.upcycle", base=base, to=tmp_path / "out", experts=2, top_k=1)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_whole_numbers_are_no_weights(tiny, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = tmp_path / "base"
    shutil.copytree(tiny("llama"), base)
    save_file({n: t.long() for n, t in load_file(base / "model.safetensors").items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="weights are fractions"):
        modelwright.run("reshape.upcycle", base=base, to=tmp_path / "out", experts=2, top_k=1)
