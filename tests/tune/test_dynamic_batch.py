"""Dynamic batch loading: the update's closed form, what is drawn, the same bits when resumed, and domains that have what they need."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import modelwright
from families import model_of
from modelwright.core.data.rows import Rows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Source, Train
from modelwright.core.train import dist
from modelwright.core.train.loop import Outcome, fit
from modelwright.tune.dynamic_batch import Domains, DynamicBatch, Knobs, updated
from small import Fatal, rows, same, weights

START = {"a": 0.5, "b": 0.3, "c": 0.2}


# ---- the update ------------------------------------------------------------------------------------------------------
def test_weights_compound() -> None:
    w, sums = dict(START), dict.fromkeys(START, 0.0)
    for losses in ({"a": 2.0, "b": 1.5, "c": 1.0}, {"a": 1.2, "b": 1.4, "c": 0.9}, {"a": 0.8, "b": 1.1, "c": 3.0}):
        w = updated(w, losses, {"a": 1.0, "b": 1.0, "c": 1.0}, clip=True, c=0.0)
        sums = {n: sums[n] + max(losses[n] - 1.0, 0.0) for n in sums}
    raw = {n: START[n] * math.exp(sums[n]) for n in START}
    assert all(w[n] == pytest.approx(raw[n] / sum(raw.values())) for n in w)


def test_the_order_of_domains_does_not_matter_and_without_clip_a_shift_does_not() -> None:
    losses, refs = {"a": 2.0, "b": 1.5, "c": 0.3}, {"a": 1.0, "b": 1.6, "c": 0.4}
    turned = {n: START[n] for n in "cab"}
    assert updated(START, losses, refs, True, 1e-4) == pytest.approx(updated(turned, losses, refs, True, 1e-4))
    shifted = {n: v + 0.7 for n, v in losses.items()}
    assert updated(START, losses, refs, False, 0.0) == pytest.approx(updated(START, shifted, refs, False, 0.0))
    assert updated(START, losses, refs, True, 0.0) != pytest.approx(updated(START, shifted, refs, True, 0.0))


def test_a_domain_below_its_reference_is_pushed_down_by_the_code_s_rule_alone() -> None:
    losses, refs = {"a": 1.0, "b": 1.0, "c": 0.5}, {"a": 1.0, "b": 1.0, "c": 1.0}
    assert updated(START, losses, refs, True, 0.0) == pytest.approx(START)
    assert updated(START, losses, refs, False, 0.0)["c"] < 0.2


def test_smoothing_spreads_a_share_evenly_and_large_gaps_stay_finite() -> None:
    w = updated(START, {"a": 5000.0, "b": 1.0, "c": 1.0}, dict.fromkeys(START, 1.0), True, 0.03)
    assert w == pytest.approx({"a": 0.98, "b": 0.01, "c": 0.01})


# ---- rows ------------------------------------------------------------------------------------------------------------
def domains() -> Domains:
    return Domains({"a": rows(12, seed=1), "b": rows(10, seed=2), "c": rows(20, seed=3)})


def technique(knobs: dict[str, Any], mix: dict[str, float] = START) -> DynamicBatch:
    made = DynamicBatch(Knobs(**{"every": 2} | knobs))
    made.weights, made.first, made.taken = dict(mix), dict(mix), dict.fromkeys(mix, 0)
    return made


def run(folder: Path, stop: int | None = None, knobs: dict[str, Any] | None = None, **train: Any) -> tuple[Any, DynamicBatch, Outcome]:
    def tick(step: int, of: int) -> None:
        if step == stop:
            raise Fatal

    model, made, (data, _) = model_of("llama"), technique(knobs or {}), domains().split(34)
    settings = Train(**{"batch": 4, "lr": 1e-2, "schedule": "constant", "warmup": 0.0, "record": False} | train)
    return model, made, fit(model, data, settings, techniques=[made], evals={}, folder=folder, seed=0, tick=tick)


def test_a_share_of_every_domain_is_held_out() -> None:
    whole = domains()
    kept, held = whole.split(38)
    assert [len(p) for p in kept.parts.values()] == [11, 9, 18] and [len(p) for p in held.parts.values()] == [1, 1, 2]
    assert kept.held is not held and {n: len(p) for n, p in kept.held.items()} == {"a": 1, "b": 1, "c": 2}
    assert torch.equal(kept[11]["input_ids"], whole.parts["b"][0]["input_ids"])
    assert [kept[i]["example_id"] for i in range(len(kept))] == list(range(38))


def test_rows_are_drawn_by_the_mix_and_each_before_any_twice() -> None:
    made = technique({}, {"a": 0.6, "b": 0.4, "c": 0.0})
    made.domains, made.train = domains(), Train(batch=6, accumulate=2)
    found: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for step in range(40):
        for name, i in made._draw(step):
            found[name].append(i)
    assert abs(len(found["a"]) / 480 - 0.6) < 0.06 and not found["c"]
    for name, size in (("a", 12), ("b", 10)):
        passes = [found[name][k : k + size] for k in range(0, len(found[name]) - size, size)]
        assert all(sorted(p) == list(range(size)) for p in passes) and passes[0] != passes[1]


def test_processes_share_what_one_would_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    def hand_out(world: int) -> list[int]:
        found = []
        for rank in range(world):
            made = technique({})
            made.domains, made.train = domains(), Train(batch=4 // world, accumulate=3)
            monkeypatch.setattr(dist, "world", lambda: world)
            monkeypatch.setattr(dist, "rank", lambda r=rank: r)
            found += [int(r["example_id"]) for _ in range(3) for r in made.drawn(4 // world, 5)]
        return sorted(found)

    assert hand_out(1) == hand_out(2)


# ---- runs ------------------------------------------------------------------------------------------------------------
def test_accumulated_passes_are_one(tmp_path: Path) -> None:
    one, _, _ = run(tmp_path / "one", batch=4, lr=1e-4)
    other, _, _ = run(tmp_path / "other", batch=2, accumulate=2, lr=1e-4)
    a, b = weights(one), weights(other)
    assert max(float((a[n] - b[n]).abs().max()) for n in a) <= 2e-6


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 0.8, "save_every": 3, "knobs": {"every": 2}}
    whole, first, one = run(tmp_path / "whole", **settings)
    with pytest.raises(Fatal):
        run(tmp_path / "again", stop=4, **settings)
    again, second, other = run(tmp_path / "again", **settings)
    assert same(weights(whole), weights(again)) and first.state_dict() == second.state_dict() and one.facts == other.facts
    assert first.weights != START and sum(first.taken.values()) == 4 * one.steps


def test_the_domain_that_is_furthest_from_its_reference_gains(tmp_path: Path) -> None:
    _, made, out = run(tmp_path, knobs={"references": {"a": 9.0, "b": 1.0, "c": 9.0}})
    assert made.weights["b"] > START["b"] and made.weights["a"] < START["a"]
    told = out.facts["dynamic_batch"]["domains"]["b"]
    assert told["reference"] == 1.0 and told["weight"] == [0.3, round(made.weights["b"], 4)] and told["rows drawn"] == made.taken["b"]


def test_without_references_the_losses_at_the_start_are_taken(tmp_path: Path) -> None:
    _, made, _ = run(tmp_path, lr=0.0 + 1e-9)
    assert made.references == made.begun and set(made.references) == set(START)
    assert made.weights == pytest.approx(START, abs=1e-4)  # nothing was learnt, so no domain is far


# ---- whole steps -----------------------------------------------------------------------------------------------------
TRAIN = {"tokens": 200, "batch": 2, "context": 16, "lr": 1e-2, "warmup": 0.0}


def write(folder: Path, name: str, n: int = 12, shift: int = 0, **more: Any) -> str:
    lines = [{"input_ids": [(7 * i + j + shift) % 90 + 3 for j in range(20)]} | more for i in range(n)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / f"{name}.jsonl")


def test_sources_are_domains_with_their_weights(tmp_path: Path) -> None:
    data = Data(sources=[Source(write(tmp_path, "first"), weight=3.0), Source(write(tmp_path, "second", shift=40))])
    made, found = _rows({}, data)
    assert made.weights == {"first": 0.75, "second": 0.25} and len(found) == sum(len(p) for p in found.parts.values())
    assert found.parts["second"][0]["input_ids"][0] == 43


def test_shearing_goes_along(tiny, tmp_path: Path) -> None:
    methods = [{"shear": {"ffn": 24}}, {"dynamic_batch": {"domain": "kind", "every": 2, "references": {"x": 4.0, "y": 1.0}}}]
    result = modelwright.run(
        "tune.mix",
        base=tiny("llama"),
        to=tmp_path / "out",
        data={"path": str(Path(__file__).parent / "domains.jsonl"), "column": "input_ids"},
        train=TRAIN,
        methods=methods,
        holdout=0.2,
        save={"certificate": "structure"},
    )
    told = result.steps[0]["facts"]["dynamic_batch"]["domains"]
    assert told["y"]["weight"][1] > told["y"]["weight"][0] and told["y"]["rows drawn"] > 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 24


def test_a_column_names_domains_and_evals_are_taken_by_name(tiny, tmp_path: Path) -> None:
    table = tmp_path / "both.jsonl"
    table.write_text(Path(write(tmp_path, "x", 6, kind="x")).read_text() + Path(write(tmp_path, "y", 12, kind="y")).read_text())
    evals = {"x": write(tmp_path, "for_x", 3), "y": write(tmp_path, "for_y", 3, shift=30)}
    result = modelwright.run(
        "tune.dynamic_batch",
        base=tiny("llama"),
        to=tmp_path / "out",
        data={"path": str(table), "column": "input_ids"},
        evals=evals,
        train=TRAIN,
        domain="kind",
        save={"certificate": "structure"},
    )
    told = result.steps[0]["facts"]["dynamic_batch"]["domains"]
    assert told["x"]["weight"][0] == pytest.approx(1 / 3, abs=0.02) and set(told) == {"x", "y"}
    assert {e["name"] for e in result.steps[0]["evals"]} == {"x", "y"}


def _rows(knobs: dict[str, Any], data: Data) -> Any:
    made = DynamicBatch(Knobs(**knobs))
    return made, made.rows(data, None, 96, Train(context=16), 0)


@pytest.mark.parametrize(
    ("knobs", "sources", "said"),
    [
        ({}, ["a"], "there is one domain"),
        ({"references": {"a": 1.0}}, ["a", "b"], "references and the data disagree about 'b'"),
        ({"references": {"a": 1.0, "b": 1.0, "z": 1.0}}, ["a", "b"], "disagree about 'z'"),
        ({"weights": {"a": 0.0, "b": 0.0}}, ["a", "b"], "the weights are no mix"),
        ({}, ["a", "a"], "two sources are called 'a'"),
        ({}, [], "no domains are named"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(knobs: dict[str, Any], sources: list[str], said: str, tmp_path: Path) -> None:
    data = Data(sources=[Source(write(tmp_path, n)) for n in sources]) if sources else Data(write(tmp_path, "a"))
    with pytest.raises(UserError, match=said):
        _rows(knobs, data)


def test_a_domain_without_a_held_out_row_is_refused(tmp_path: Path) -> None:
    data = Data(sources=[Source(write(tmp_path, "a")), Source(write(tmp_path, "b", 1))])
    made, found = _rows({}, data)
    with pytest.raises(UserError, match="the domain 'a' has no held-out row"):
        made.prepare(found)  # no share was held out, and there are no evals
    made.held = {"a": rows(2), "b": rows(2).split(2)[1]}
    with pytest.raises(UserError, match="the domain 'b' has no held-out row"):
        made.prepare(found)
    one = Domains({"a": rows(4), "b": rows(1)})
    with pytest.raises(UserError, match="the domain 'b' has no held-out row"):
        one.split(4)
    with pytest.raises(UserError, match="the rows have no domains"):
        made.prepare(Rows(torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int32), torch.tensor([4])))


def test_other_objectives_are_refused() -> None:
    with pytest.raises(UserError, match="predicts no next tokens"):
        technique({}).objective(model_of("t5"), None, Train(), 0)
