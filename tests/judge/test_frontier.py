"""judge.frontier: gaps are to full tuning's own frontier, seed by seed; a sweep goes on where it was stopped; bad input is one sentence."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import modelwright
from modelwright import registry
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.step import StepContext
from modelwright.judge.frontier import Knobs, Run, below, compared, found, frontier, named, rates, read, sentence
from modelwright.judge.tasks import runs as trained


def run(way: str, lr: float, seed: int, new: float, old: float) -> Run:
    return Run(way, lr, seed, [5.0, new], [1.0, old])


FULL = [run("full", lr, s, new + s * 0.01, old) for s in (0, 1) for lr, new, old in ((1e-4, 4.0, 1.2), (1e-3, 3.0, 2.0), (1e-2, 2.5, 4.0))]


# ---- the picture ---------------------------------------------------------------------------------------------------------
def test_the_frontier_runs_straight_between_the_ends_and_is_no_further_than_they() -> None:
    ends = [(4.0, 1.2), (3.0, 2.0), (2.5, 4.0)]
    assert below(ends, 3.5) == (pytest.approx(1.6), True) and below(ends, 2.75) == (pytest.approx(3.0), True)
    assert below(ends, 3.0) == (2.0, True)
    assert below(ends, 2.0) == (4.0, False) and below(ends, 4.5) == (1.2, False) and below([(3.0, 2.0)], 3.0) == (2.0, True)


def test_gaps_are_taken_seed_by_seed_and_full_tuning_is_on_its_own_frontier() -> None:
    lines = compared([*FULL, run("hft", 1e-3, 0, 3.5, 1.5), run("hft", 1e-3, 1, 3.51, 1.58)])
    assert all(x["gap"] == 0 and x["verdict"] == "the frontier" for x in lines if x["way"] == "full")
    hft = lines[-1]  # seed 1's frontier lies 0.01 further to the right
    assert hft["gap"] == pytest.approx((-0.1 - 0.02) / 2) and hft["spread"] == pytest.approx(0.08 / math.sqrt(2)) and hft["seeds"] == 2
    assert hft["verdict"] == "below"


VERDICTS: list[tuple[tuple[float, ...], float, str]] = [
    ((1.3, 1.3), 3.5, "below"),
    ((2.0, 2.1), 3.5, "above"),
    ((1.5, 1.7), 3.5, "same"),
    ((1.0, 1.0), 2.0, "beyond"),
    ((1.3,), 3.5, "one seed"),
]


@pytest.mark.parametrize(("olds", "new", "verdict"), VERDICTS, ids=[v for _, _, v in VERDICTS])
def test_a_verdict_needs_more_than_the_spread_and_a_frontier_beside_it(olds: tuple[float, ...], new: float, verdict: str) -> None:
    full = FULL if len(olds) > 1 else [r for r in FULL if r.seed == 0]
    assert compared([*full, *(run("hft", 1e-3, s, new, old) for s, old in enumerate(olds))])[-1]["verdict"] == verdict


def test_the_sentence_says_which_ways_are_below() -> None:
    more = [run(way, 1e-3, s, 3.5, old) for way, old in (("hft", 1.2), ("migu", 1.605), ("lora", 3.0)) for s in (0, 1)]
    more += [run("key_value", 1e-3, s, 1.0, 1.0) for s in (0, 1)]
    said = found([*FULL, *more]).text
    assert said.startswith("Below full tuning's frontier, so less is forgotten for what is learnt: hft (1 of 1 rates below, 0 above).")
    assert "The same as full tuning at another rate: migu" in said and "so more is forgotten: lora" in said
    assert "Not to be told from these runs: key_value" in said
    assert sentence(compared(FULL)) == "Full tuning alone: there is nothing to compare."


def test_rates_of_full_tuning_lie_between_the_others_too() -> None:
    knobs = Knobs(lrs=[1e-3, 1e-4])
    assert rates(knobs, "hft") == [1e-4, 1e-3] and rates(knobs, "full") == pytest.approx([1e-4, 10**-3.5, 1e-3])
    assert rates(Knobs(lrs=[1e-3, 1e-4], between=False), "full") == [1e-4, 1e-3]
    assert named(["hft", {"lora": {"r": 4}}]) == {"full": ("full", {}), "hft": ("hft", {}), "lora, r 4": ("lora", {"r": 4})}


# ---- trained -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    file.write_text("".join(json.dumps({"input_ids": [(7 * i + j) % 90 + 3 for j in range(20)]}) + "\n" for i in range(12)))
    return str(file)


def knobs_of(data: str, **more: Any) -> Knobs:
    train = Train(tokens=48, batch=2, context=8, warmup=0.0, save_every=1)
    return Knobs(**{"data": Data(path=data), "ways": ["hft"], "lrs": [1e-2], "seeds": 2, "held": 4, "train": train, **more})


def context(base: Path, folder: Path) -> StepContext:
    folder.mkdir(exist_ok=True)
    return StepContext(folder, 0, source=Checkpoint(base), technique=registry.techniques_named)


@pytest.mark.slow
def test_a_sweep_that_was_stopped_goes_on_and_is_the_unbroken_one(data: str, tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    whole = frontier(knobs_of(data), context(tiny("llama"), tmp_path / "whole"))
    count, once = [], trained.Teacher.run

    def dies(self: Any, *args: Any) -> Any:
        count.append(args[0])
        if len(count) == 3:
            raise KeyboardInterrupt
        return once(self, *args)

    monkeypatch.setattr(trained.Teacher, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        frontier(knobs_of(data), context(tiny("llama"), tmp_path / "broken"))
    again = frontier(knobs_of(data), context(tiny("llama"), tmp_path / "broken"))
    assert count == ["full", "full", "hft", "hft", "hft"] and again.metrics == whole.metrics
    kept = sorted(p.name for p in (tmp_path / "broken" / "dynamics").iterdir())
    assert kept == ["0-full-0.01-0.parquet", "1-full-0.01-1.parquet", "2-hft-0.01-0.parquet", "3-hft-0.01-1.parquet"]
    assert not list((tmp_path / "broken").glob("run-*"))
    monkeypatch.setattr(trained.Teacher, "run", lambda *a: pytest.fail("trained again"))
    recorded = frontier(Knobs(runs=str(tmp_path / "broken" / "runs.json")), StepContext(tmp_path))
    assert recorded.metrics == whole.metrics


def test_every_run_begins_at_the_checkpoint_and_sees_the_same_old_text(data: str, tiny: Any, tmp_path: Path) -> None:
    job = context(tiny("llama"), tmp_path)
    metrics = frontier(knobs_of(data, seeds=1, ways=["hft", {"lora": {"r": 2}}]), job).metrics
    runs = read(tmp_path / "runs.json")
    assert len({(r.new[0], r.old[0]) for r in runs}) == 1 and metrics["before"] == {"new": runs[0].new[0], "old": runs[0].old[0]}
    assert len({r.end for r in runs}) == 3 and set(metrics["ways"]) == {"full", "hft", "lora, r 2"}
    written = trained.written(job.source, knobs_of(data))
    assert written.ids.shape == (4, 8) and bool((written.ids == trained.written(job.source, knobs_of(data)).ids).all())


def test_old_data_of_a_file_is_measured(data: str, tiny: Any, tmp_path: Path) -> None:
    frontier(knobs_of(data, seeds=1, ways=[], old=Data(path=data)), context(tiny("llama"), tmp_path))
    assert read(tmp_path / "runs.json")[0].old[0] > 0


def test_whole_run_from_recorded_runs(tmp_path: Path) -> None:
    (tmp_path / "runs.json").write_text(
        json.dumps({"runs": [r.__dict__ for r in [*FULL, *(run("hft", 1e-3, s, 3.5, 1.3) for s in (0, 1))]]})
    )
    made = modelwright.run("judge.frontier", to=tmp_path / "out", runs=str(tmp_path / "runs.json"))
    assert made.steps[0]["text"].startswith("Below full tuning's frontier")


# ---- bad input -----------------------------------------------------------------------------------------------------------
def test_bad_input_is_one_sentence(data: str, tiny: Any, tmp_path: Path) -> None:
    def refused(words: str, job: StepContext | None = None, **more: Any) -> None:
        with pytest.raises(UserError, match=words):
            frontier(knobs_of(data, **more), job or context(tiny("llama"), tmp_path / "job"))

    refused("nothing to tune", StepContext(tmp_path))
    refused("lrs needs rates above 0", lrs=[])
    refused("the new data has .* rows, because 900 of them are held out", held=900)
    refused("unknown step 'tune.hff'", ways=["hff"])
    refused("ways has 3", ways=[3])
    refused("c_rlft cannot be compared here", ways=["c_rlft"])
    refused("the checkpoint writes no text", context(tiny("t5"), tmp_path / "t5"))
    file = tmp_path / "runs.json"
    for text, words in (
        ("{", "holds no runs"),
        ('{"runs": []}', "its list is empty"),
        ('{"runs": [{"way": "hft", "lr": 1, "seed": 0, "new": [1], "old": [1]}]}', "no run of full tuning"),
        ('{"runs": [{"way": "full", "lr": 1, "seed": 0, "new": [NaN], "old": [1]}]}', "not finite"),
    ):
        file.write_text(text)
        refused(words, runs=str(file))
    with pytest.raises(UserError, match="full tuning has no run of some seed"):
        compared([*FULL, run("hft", 1e-3, 7, 3.0, 1.0)])
