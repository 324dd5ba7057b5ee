"""The training loop: exact normalisation, the contract of a technique, and runs that can be stopped at any moment."""

import gc
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch import Tensor

import small
from modelwright.core.data.rows import IGNORE, Rows, collate
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train import loop as training
from modelwright.core.train.evaluate import evaluate_rows
from modelwright.core.train.loop import Outcome, fit, latest_state, steps_for
from modelwright.core.train.technique import LossTerm, Technique
from modelwright.tune import full, lora

REPEATED = ["step", "kind", "name", "example", "loss", "tokens", "lr"]  # all columns but the energy
STEPS, PASSES = 11, 11 / 6  # of the resumed runs: 4 of 21 rows a step, so the sixth step of a pass has one row


@pytest.fixture(scope="module", autouse=True)
def _cheap_collections() -> Iterator[None]:
    # The trainer collects garbage at each start; what torch and transformers imported need not be walked every time.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def model(**changes: Any) -> Any:
    from families import model_of

    return model_of("llama", **changes)


def rows(n: int = 21, width: int = 16, ragged: bool = False, seed: int = 1) -> Rows:
    """Random token rows; ragged ones differ in length and in how much of them is learnt, from one token to all."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (n, width), generator=g, dtype=torch.int32)
    labels, lengths = ids.clone(), torch.full((n,), width)
    if ragged:
        lengths = torch.randint(3, width + 1, (n,), generator=g)
        for i, length in enumerate(lengths.tolist()):
            learnt = torch.rand(width, generator=g) < (i % 4) / 3
            learnt[1] = True
            labels[i] = torch.where(learnt & (torch.arange(width) < length), ids[i], IGNORE)
            ids[i, length:] = 0
    return Rows(ids, labels, lengths)


class Fatal(Exception):
    """Stands for whatever ends a run from outside."""


def go(
    folder: Path,
    technique: Technique | None = None,
    *,
    data: Rows | None = None,
    of: Any = None,
    stop: int | None = None,
    evals: bool = True,
    tick: Callable[[int, int], None] = lambda step, of: None,
    **train: Any,
) -> Outcome:
    """One training run of a tiny Llama; raises Fatal at step `stop`, before that step is saved."""

    def at(step: int, total: int) -> None:
        tick(step, total)
        if step == stop:
            raise Fatal

    knobs = Train(**{"batch": 4, "lr": 1e-2, "schedule": "constant", "warmup": 0.0, **train})
    return fit(
        model() if of is None else of,
        rows() if data is None else data,
        knobs,
        techniques=[technique or Technique()],
        evals={"new": rows(4, seed=9)} if evals else {},
        folder=folder,
        seed=0,
        tick=at,
    )


def weights(of: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in of.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest relative difference of any tensor."""
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12)) for n in b)


def ordered(file: Path) -> Any:
    """What a resumed run must repeat, in an order that does not depend on where the run was stopped."""
    return parquet.read_table(file).select(REPEATED).sort_by([(n, "ascending") for n in ("step", "kind", "name", "example")])


def table(outcome: Outcome) -> Any:
    assert outcome.dynamics
    return ordered(outcome.dynamics)


class Watch(Technique):
    """Keeps what it is shown: the events, the gradients of the first step, their norms before and after clipping."""

    def __init__(self, terms: list[LossTerm] | None = None, scale: float = 1.0):
        self.events: list[str] = []
        self.first: dict[str, Tensor] = {}
        self.clipped: list[float] = []
        self.extra, self.scale, self.whole_logits = terms or [], scale, bool(terms)

    def terms(self) -> list[LossTerm]:
        return self.extra

    def on_gradients(self, named: Any) -> None:
        self.events.append("gradients")
        for n, p in named:
            if len(self.events) == 1:
                self.first[n] = p.grad.clone()
            p.grad.mul_(self.scale)

    def after_step(self, named: Any) -> None:
        self.events.append("step")
        self.clipped.append(float(torch.stack([p.grad.norm() for _, p in named]).norm()))


# ---- loss terms ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ragged", [False, True])
def test_accumulation_equals_one_large_batch(ragged: bool, tmp_path: Path) -> None:
    data, seen, steps = rows(20, ragged=ragged), {}, set()
    for batch, accumulate in ((8, 1), (2, 4), (1, 8)):
        watch = Watch()
        out = go(tmp_path / f"{batch}", watch, data=data, batch=batch, accumulate=accumulate, epochs=2, lr=3e-3, evals=False)
        steps.add(out.steps)
        seen[batch] = watch.first, weights(out.model)
    assert len(steps) == 1
    for few in (2, 1):
        assert apart(seen[few][0], seen[8][0]) <= 1e-5
        assert apart(seen[few][1], seen[8][1]) <= 1e-5


def test_first_gradient_is_that_of_the_mean_over_all_learnt_tokens_of_the_window(tmp_path: Path) -> None:
    data, watch, m = rows(8, ragged=True), Watch(), model()
    by_hand = model()
    logits = [by_hand(input_ids=data.ids[i : i + 1, : data.lengths[i]].long()).logits[0, :-1] for i in range(8)]
    labels = torch.cat([data.labels[i, 1 : data.lengths[i]] for i in range(8)]).long()
    torch.nn.functional.cross_entropy(torch.cat(logits), labels, ignore_index=IGNORE).backward()
    go(tmp_path, watch, data=data, of=m, batch=2, accumulate=4, evals=False)
    assert apart(watch.first, {n: p.grad for n, p in by_hand.named_parameters()}) <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "granite", "gemma2", "mixtral"])
def test_loss_of_one_batch_is_transformers_own(kind: str) -> None:
    from families import model_of

    m, data = model_of(kind), rows(6, ragged=True)
    batch = collate([data[i] for i in range(6)])
    with torch.no_grad():
        theirs = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
        outputs = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    term = LossTerm()
    assert float(term.sums(batch, outputs).sum() / term.count(batch)) == pytest.approx(float(theirs), abs=1e-6)
    assert evaluate_rows(m, data, 4)["loss"] == pytest.approx(float(theirs), abs=1e-6)


class Evens(LossTerm):
    """Squared log-partition on examples with an even number only, counted by those examples."""

    name, weight = "evens", 0.3

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["example_id"] % 2 == 0).sum()

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        return outputs.logits[:, 0].logsumexp(-1).square() * (batch["example_id"] % 2 == 0)


@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (2, 4), (1, 8)])
def test_extra_term_is_divided_by_its_own_count_over_the_window(batch: int, accumulate: int, tmp_path: Path) -> None:
    data, watch, by_hand = rows(8, ragged=True), Watch([Evens()]), model()
    whole = collate([data[i] for i in range(8)])
    out = by_hand(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"])
    lm, evens = LossTerm(), Evens()
    assert lm.count(whole) != evens.count(whole) == 4
    (lm.sums(whole, out).sum() / lm.count(whole) + 0.3 * evens.sums(whole, out).sum() / 4).backward()
    go(tmp_path, watch, data=data, batch=batch, accumulate=accumulate, evals=False)
    assert apart(watch.first, {n: p.grad for n, p in by_hand.named_parameters()}) <= 1e-5


def test_term_without_anything_to_count_adds_nothing(tmp_path: Path) -> None:
    class Nothing(Evens):
        def count(self, batch: dict[str, Tensor]) -> Tensor:
            return torch.tensor(0)

        def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
            return outputs.logits[:, 0, 0] * 0

    plain = Watch()
    plain.whole_logits = True
    a, b = go(tmp_path / "a", Watch([Nothing()]), tokens=64), go(tmp_path / "b", plain, tokens=64)
    assert same(weights(a.model), weights(b.model))


# ---- the contract of a technique -------------------------------------------------------------------------------------
@pytest.mark.parametrize("clip", [0.5, 0.0])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_update_rule_runs_once_per_optimizer_step(accumulate: int, clip: float, tmp_path: Path) -> None:
    watch = Watch()
    out = go(tmp_path, watch, batch=2, accumulate=accumulate, epochs=1, clip=clip, evals=False)
    assert out.steps == math.ceil(21 / (2 * accumulate))
    assert watch.events == ["gradients", "step"] * out.steps


def test_update_rule_edits_gradients_before_clipping(tmp_path: Path) -> None:
    watch = Watch(scale=1000.0)
    go(tmp_path, watch, epochs=1, clip=0.5, evals=False)
    assert watch.clipped == pytest.approx([0.5] * len(watch.clipped), rel=1e-3)


class Alternating(Technique):
    """Moves the weights on every second step only, and steers them by a running mean of its gradients."""

    def __init__(self) -> None:
        self.turn, self.mean = 0, torch.zeros(())

    def on_gradients(self, named: Any) -> None:
        self.turn += 1
        grads = [p.grad for _, p in named]
        self.mean = 0.7 * self.mean + 0.3 * torch.stack([g.abs().mean() for g in grads]).mean()
        for g in grads:
            g.add_(g.sign() * self.mean).mul_(self.turn % 2)

    def state_dict(self) -> dict[str, Any]:
        return {"turn": self.turn, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turn, self.mean = state["turn"], state["mean"]


def test_state_of_a_technique_is_saved_and_restored(tmp_path: Path) -> None:
    unbroken, before, after = Alternating(), Alternating(), Alternating()
    want = go(tmp_path / "a", unbroken, epochs=PASSES, save_every=3, evals=False)
    with pytest.raises(Fatal):
        go(tmp_path / "b", before, epochs=PASSES, save_every=3, stop=5, evals=False)
    got = go(tmp_path / "b", after, epochs=PASSES, save_every=3, evals=False)
    assert after.turn == unbroken.turn == STEPS and torch.equal(after.mean, unbroken.mean)
    assert same(weights(got.model), weights(want.model))
    (tmp_path / "c").mkdir()
    with pytest.raises(Fatal):
        go(tmp_path / "c", Alternating(), epochs=PASSES, save_every=3, stop=5, evals=False)
    amnesic = Alternating()
    amnesic.load_state_dict = lambda state: None  # type: ignore[method-assign]
    assert not same(weights(go(tmp_path / "c", amnesic, epochs=PASSES, save_every=3, evals=False).model), weights(want.model))


class Zeroed(Technique):
    def on_gradients(self, named: Any) -> None:
        for _, p in named:
            p.grad.zero_()


class Undone(Technique):
    def select(self, model: Any, anatomy: Any, seed: int) -> None:
        self.start = weights(model)

    def after_step(self, named: Any) -> None:
        for n, p in named:
            p.data.copy_(self.start[n])


@pytest.mark.parametrize("technique", [Zeroed(), Undone()], ids=["gradients are zeroed", "steps are undone"])
def test_technique_that_moves_nothing_fails(technique: Technique, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weight moved"):
        go(tmp_path, technique, epochs=1)


@pytest.mark.parametrize(
    "train", [{"lr": 0.0}, {"lr": 1e-2, "schedule": "linear", "warmup": 1.0, "epochs": 0.01}], ids=["lr is 0", "one step of warm-up"]
)
def test_run_whose_learning_rate_is_never_above_zero_fails(train: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, UserError)):
        go(tmp_path, **train)


def test_liveness_waits_for_the_end_of_the_first_warm_up_step(tmp_path: Path) -> None:
    out = go(tmp_path, epochs=1, schedule="linear", warmup=0.5)
    lr = (
        parquet.read_table(out.dynamics).filter(parquet.filters_to_expression([("step", "=", 1), ("kind", "=", "train")]))["lr"].to_pylist()
    )
    assert set(lr) == {0.0} and out.liveness == ["full: 21 of 21 tensors moved"]


def test_own_liveness_probe_sees_which_units_moved(tmp_path: Path) -> None:
    class Own(Technique):
        def on_gradients(self, named: Any) -> None:
            for n, p in named:
                p.grad.mul_(0 if "down_proj" not in n else (torch.arange(len(p)) < 3)[:, None])

        def liveness(self, moved: dict[str, Tensor]) -> str:
            assert moved.keys() == weights(model()).keys()
            assert all(m.any() == ("down_proj" in n) for n, m in moved.items())
            assert moved["model.layers.1.mlp.down_proj.weight"].nonzero().flatten().tolist() == [0, 1, 2]
            return "it did"

    assert go(tmp_path, Own(), of=model(), epochs=1).liveness == ["it did"]


def test_attachment_selector_and_data_policy_take_effect(tmp_path: Path) -> None:
    class Three(Technique):
        def attach(self, model: Any, anatomy: Any) -> Any:
            model.extra = torch.nn.Parameter(torch.zeros(2))
            return model

        def select(self, model: Any, anatomy: Any, seed: int) -> None:
            for n, p in model.named_parameters():
                p.requires_grad_("down_proj" in n)

        def prepare(self, rows: Rows) -> Rows:
            return rows.split(8)[0]

    out = go(tmp_path, Three(), epochs=1)
    moved = {n for n, p in weights(out.model).items() if n != "extra" and not torch.equal(p, weights(model())[n])}
    assert out.steps == 2 and moved == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)} and hasattr(out.model, "extra")


@pytest.mark.parametrize("technique", [Technique, lambda: lora.Lora(lora.Knobs())], ids=["full", "lora"])
def test_recomputed_activations_change_nothing(technique: Any, tmp_path: Path) -> None:
    seen: dict[bool, tuple[int, dict[str, Tensor]]] = {}
    for again in (False, True):
        m, calls = model(), []
        m.model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs, calls=calls: calls.append(module.training))
        out = go(tmp_path / str(again), technique(), of=m, epochs=PASSES, gradient_checkpointing=again)
        seen[again] = sum(calls), weights(out.model)
    assert seen[False][0] == STEPS and seen[True][0] == 2 * STEPS
    assert apart(seen[True][1], seen[False][1]) <= 1e-6


# ---- budgets, bounds, evaluation -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"epochs": 1.0}, 6),
        ({"epochs": 0.5}, 3),
        ({"epochs": 0.01}, 1),
        ({"epochs": 1.0, "accumulate": 2}, 3),
        ({"tokens": 3 * 64}, 3),
        ({"tokens": 3 * 64 + 1}, 4),
        ({"tokens": 336}, 6),  # one pass
        ({"tokens": 336 + 64}, 7),
        ({"tokens": 336 + 65}, 8),
        ({"tokens": 336 + 5 * 64}, 11),
        ({"tokens": 1, "epochs": 9.0}, 1),
    ],
)
def test_budget_is_reached_with_no_step_to_spare(train: dict[str, Any], steps: int) -> None:
    assert steps_for(rows(), Train(batch=4, **train)) == steps


def test_token_budget_leaves_padding_out() -> None:
    short = rows()
    short.lengths = torch.full((21,), 8)
    assert steps_for(short, Train(batch=4, tokens=3 * 64)) == 7  # a pass of 168 tokens, and 24 more of 32 a step


@pytest.mark.parametrize("budget", [{"epochs": 2.0}, {"tokens": 336 + 5 * 64}, {"epochs": 1.0, "accumulate": 3}])
def test_tokens_of_the_outcome_are_those_that_were_seen(budget: dict[str, Any], tmp_path: Path) -> None:
    out = go(tmp_path, evals=False, **budget)
    assert out.tokens == 16 * parquet.read_table(out.dynamics)["kind"].to_pylist().count("train")


def test_bits_per_byte_is_the_loss_over_the_bytes_of_the_text() -> None:
    data, m = rows(5), model()
    data.bytes = 123
    found = evaluate_rows(m, data, 2)
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(
            m(input_ids=data.ids.long()).logits[:, :-1].flatten(0, 1), data.ids[:, 1:].flatten().long()
        )
    assert found["loss"] == pytest.approx(float(nats), abs=1e-5) and found["tokens"] == 75
    assert found["bits_per_byte"] == pytest.approx(float(nats) / math.log(2) * 80 / 123, abs=1e-5)


def test_evaluation_leaves_the_training_mode_and_needs_no_dropout() -> None:
    m, data = model(attention_dropout=0.5), rows(5)
    m.train()
    assert evaluate_rows(m, data, 2) == evaluate_rows(m, data, 2) and m.training


def test_evaluations_are_at_the_start_the_end_and_the_asked_steps(tmp_path: Path) -> None:
    out = go(tmp_path, epochs=PASSES, eval_every=4)
    assert [e["step"] for e in out.evals] == [0, 4, 8, STEPS]
    assert out.at("new", last=False)["step"] == 0 and out.at("new")["step"] == STEPS
    assert out.at("new")["loss"] == pytest.approx(evaluate_rows(out.model, rows(4, seed=9), 4)["loss"], abs=1e-6)


def test_learning_that_diverges_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite"):
        go(tmp_path, epochs=1, lr=1e30, clip=0.0)


def test_rows_longer_than_the_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="context=80"):
        go(tmp_path, data=rows(4, 80))


def test_model_without_a_head_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    headless = BertModel(BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(UserError, match="no head"):
        go(tmp_path, of=headless)


# ---- resuming --------------------------------------------------------------------------------------------------------
CASES = [("full", {}, 1), ("full", {}, 2), ("lora", {"dropout": 0.3}, 1), ("lora", {"r": 4}, 2)]


def resumable(case: tuple[str, dict[str, Any], int], folder: Path, **more: Any) -> Outcome:
    name, knobs, accumulate = case
    technique = full.Full(full.Knobs()) if name == "full" else lora.Lora(lora.Knobs(**knobs))
    return go(
        folder,
        technique,
        of=model(attention_dropout=0.2),
        batch=4 // accumulate,
        accumulate=accumulate,
        epochs=PASSES,
        save_every=2,
        **more,
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, Tensor], Outcome]]:
    made: dict[str, tuple[dict[str, Tensor], Outcome]] = {}

    def make(case: tuple[str, dict[str, Any], int]) -> tuple[dict[str, Tensor], Outcome]:
        if str(case) not in made:
            out = resumable(case, tmp_path_factory.mktemp("unbroken"))
            made[str(case)] = weights(out.model), out
        return made[str(case)]

    return make


@pytest.mark.parametrize("stop", [1, 7, 10])  # before the first state, just after a pass ended, in the middle of one
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}, {c[2]} x {4 // c[2]}")
def test_resumed_run_is_bit_equal_to_the_unbroken_one(
    case: tuple[str, dict[str, Any], int], stop: int, unbroken: Any, tmp_path: Path
) -> None:
    want, outcome = unbroken(case)
    with pytest.raises(Fatal):
        resumable(case, tmp_path, stop=stop)
    state = latest_state(tmp_path)
    assert (int(state.name.split("-")[1]) if state else 0) == (stop - 1) // 2 * 2
    got = resumable(case, tmp_path)
    assert got.steps == outcome.steps == STEPS
    assert same(weights(got.model), want)
    assert got.evals == outcome.evals and got.liveness == outcome.liveness
    assert table(got).equals(table(outcome))


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared"])
def test_resuming_does_not_depend_on_how_a_family_is_saved(kind: str, tmp_path: Path) -> None:
    from families import model_of

    def run(folder: Path, stop: int | None = None) -> dict[str, Tensor]:
        return weights(small.go(Technique(), model_of(kind), folder, small.rows(16), stop, epochs=2.0, save_every=2).model)

    with pytest.raises(small.Fatal):
        run(tmp_path / "stopped", 5)
    assert same(run(tmp_path / "stopped"), run(tmp_path / "whole"))


def test_dropout_changes_the_run(unbroken: Any, tmp_path: Path) -> None:
    want, _ = unbroken(CASES[0])  # else the tests above would not see a generator that is not restored
    assert not same(weights(go(tmp_path, epochs=PASSES, save_every=2).model), want)


def test_finished_run_taken_up_again_trains_no_further(unbroken: Any, tmp_path: Path) -> None:
    want, outcome = unbroken(CASES[0])
    resumable(CASES[0], tmp_path)
    ticks: list[int] = []
    again = resumable(CASES[0], tmp_path, tick=lambda step, of: ticks.append(step))
    assert not ticks and same(weights(again.model), want)


def test_finished_run_taken_up_again_keeps_evals_and_dynamics(unbroken: Any, tmp_path: Path) -> None:
    _, outcome = unbroken(CASES[0])
    resumable(CASES[0], tmp_path)
    again = resumable(CASES[0], tmp_path)
    assert again.evals == outcome.evals and table(again).equals(table(outcome))


def spoil(folder: Path, how: str) -> None:
    (folder / "complete.json").unlink()
    if how == "truncated":
        os.truncate(folder / "weights-0.pt", 1000)
    if how == "empty":
        for p in folder.iterdir():
            p.unlink()


@pytest.mark.parametrize("how", ["unmarked", "truncated", "empty"])
def test_half_saved_state_is_ignored(how: str, unbroken: Any, tmp_path: Path) -> None:
    want, outcome = unbroken(CASES[0])
    with pytest.raises(Fatal):
        resumable(CASES[0], tmp_path, stop=5)
    spoil(tmp_path / "checkpoint-4", how)
    assert latest_state(tmp_path) == tmp_path / "checkpoint-2"
    got = resumable(CASES[0], tmp_path)
    assert same(weights(got.model), want) and table(got).equals(table(outcome)) and got.evals == outcome.evals


def test_whole_state_is_kept_until_the_next_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Fatal):
        resumable(CASES[0], tmp_path, stop=5)
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-5")  # as a kill during a save after Ctrl-C leaves it
    (tmp_path / "checkpoint-5" / "complete.json").unlink()
    shutil.rmtree(tmp_path / "checkpoint-2")
    kept: list[Path | None] = []
    save = torch.save
    monkeypatch.setattr(training.torch, "save", lambda value, file: (kept.append(latest_state(tmp_path)), save(value, file)))
    resumable(CASES[0], tmp_path)
    assert kept and None not in kept


def test_death_while_old_states_are_removed_costs_nothing(unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want, outcome = unbroken(CASES[0])
    real, died = shutil.rmtree, []

    def half(path: Any, *a: Any, **k: Any) -> None:
        if str(path) in died or not (Path(path) / "complete.json").exists() or not Path(path).name.startswith("checkpoint-"):
            return real(path, *a, **k)
        died.append(str(path))
        for p in Path(path).iterdir():
            if p.name != "complete.json":
                p.unlink()
        for state in tmp_path.glob("checkpoint-*"):  # saved minutes apart, as in a real run; the half-removed one was just touched
            at = time.time() if state == Path(path) else time.time() - 10_000 + 100 * int(state.name.split("-")[1])
            os.utime(state, (at, at))
        raise Fatal

    monkeypatch.setattr(shutil, "rmtree", half)
    reached = [0]
    for _ in range(30):
        try:
            got = resumable(CASES[0], tmp_path)
            break
        except Fatal:
            reached.append(done_steps(tmp_path))
    assert reached == sorted(reached)
    assert same(weights(got.model), want) and table(got).equals(table(outcome))


def test_states_of_long_runs_do_not_pile_up(unbroken: Any) -> None:
    folder = unbroken(CASES[0])[1].dynamics.parent
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-11"]


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------
def test_ctrl_c_saves_the_step_and_stops(unbroken: Any, tmp_path: Path) -> None:
    want, outcome = unbroken(CASES[0])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        resumable(CASES[0], tmp_path, tick=lambda step, of: os.kill(os.getpid(), signal.SIGINT) if step == 5 else None)
    assert signal.getsignal(signal.SIGINT) is before
    assert latest_state(tmp_path) == tmp_path / "checkpoint-5"
    got = resumable(CASES[0], tmp_path)
    assert same(weights(got.model), want) and table(got).equals(table(outcome)) and got.evals == outcome.evals


def test_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def twice(step: int, of: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)
            pytest.fail("the run went on")

    with pytest.raises(KeyboardInterrupt):
        resumable(CASES[0], tmp_path, tick=twice)
    assert latest_state(tmp_path) == tmp_path / "checkpoint-4"


def test_ctrl_c_in_the_last_step_gives_the_finished_run(unbroken: Any, tmp_path: Path) -> None:
    want, _ = unbroken(CASES[0])
    got = resumable(CASES[0], tmp_path, tick=lambda step, of: os.kill(os.getpid(), signal.SIGINT) if step == of else None)
    assert same(weights(got.model), want)


# ---- kill -9, in children of a process that has everything imported but never ran a thread --------------------------
PRELOAD = [
    "pytest",
    "torch",
    "peft",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "modelwright.cli.app",
    "modelwright.runner.run",
    "modelwright.core.train.loop",
    "modelwright.tune.full",
    "modelwright.tune.lora",
]
KILLED_STEPS = 20


@pytest.fixture(scope="module")
def children() -> Iterator[Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    yield context


@pytest.fixture(scope="module")
def base(tiny: Any) -> Path:
    return tiny("llama", attention_dropout=0.1)


def _calm() -> None:
    import transformers

    torch.set_num_threads(1)
    gc.freeze()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _child_fit(base: str, folder: str, told: Any) -> None:
    _calm()
    start = Checkpoint(base).model()
    told.send(0)
    passes = KILLED_STEPS / 10
    out = go(Path(folder), of=start, data=rows(20, 8), batch=2, epochs=passes, save_every=2, tick=lambda step, of: told.send(step))
    save_file({n: p for n, p in weights(out.model).items() if n != "lm_head.weight"}, Path(folder) / "final.tmp")
    os.rename(Path(folder) / "final.tmp", Path(folder) / "final")


def _child_run(base: str, to: str, data: str, told: Any) -> None:
    import modelwright
    from modelwright.core.report.progress import Silent, Tick

    class Told(Silent, Tick):
        count = 0

        @contextmanager
        def task(self, name: str, total: float | None = None) -> Iterator[Tick]:
            self.to(0, 0)
            yield self
            self.to(0, 0)

        def to(self, done: int, total: int) -> None:
            told.send(self.count)
            self.count += 1

    _calm()
    knobs: dict[str, Any] = {"data": {"path": data}, "train": {"batch": 2, "context": 8, "save_every": 2, "lr": 1e-2}}
    modelwright.run("tune.full", base=base, to=to, progress=Told(), **knobs)


class Killer:
    """Starts children that tell how far they are, and kills each at a seeded moment: a step, and a time after it."""

    def __init__(self, context: Any, seed: int):
        self.context, self.random, self.step = context, random.Random(seed), 0.0

    def _start(self, target: Callable[..., None], *arguments: str) -> tuple[Any, Any]:
        ours, theirs = self.context.Pipe(duplex=False)
        child = self.context.Process(target=target, args=(*arguments, theirs))
        child.start()
        theirs.close()
        return child, ours

    def finish(self, target: Callable[..., None], *arguments: str) -> int:
        """Let one run to its end; returns how much it told."""
        child, said = self._start(target, *arguments)
        times = []
        with suppress(EOFError):
            while said.poll(120):
                said.recv()
                times.append(time.perf_counter())
        child.join()
        assert child.exitcode == 0
        if len(times) > 1:
            self.step = (times[-1] - times[0]) / (len(times) - 1)
        return len(times)

    def kill(self, first: int, last: int, target: Callable[..., None], *arguments: str) -> bool:
        """Kill one after it told of a moment from first to last. False when it was done before."""
        child, said = self._start(target, *arguments)
        moment, delay, told = self.random.randint(first, last), self.random.random(), -1
        with suppress(EOFError):
            while told < moment and said.poll(120):
                told = said.recv()
        child.join(3 * delay * self.step)
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        return child.exitcode != 0


def done_steps(folder: Path) -> int:
    state = latest_state(folder)
    return int(state.name.split("-")[1]) if state else 0


def test_twenty_kills_change_nothing(children: Any, base: Path, tmp_path: Path) -> None:
    killer, kills = Killer(children, seed=20), 0
    killer.finish(_child_fit, str(base), str(tmp_path / "whole"))
    want, dynamics = load_file(tmp_path / "whole" / "final"), ordered(tmp_path / "whole" / "dynamics.parquet")
    reached: list[int] = []
    for chain in range(20):
        folder = tmp_path / str(chain)
        while kills < 20 and killer.kill(before := done_steps(folder), KILLED_STEPS, _child_fit, str(base), str(folder)):
            kills += 1
            reached.append(done_steps(folder))
            assert reached[-1] >= before, "a kill cost a state that was whole"
        if not (folder / "final").exists():
            killer.finish(_child_fit, str(base), str(folder))
        assert same(load_file(folder / "final"), want), f"after kills at {reached}"
        assert ordered(folder / "dynamics.parquet").equals(dynamics)
        if kills == 20:
            break
    assert kills == 20 and len(set(reached)) > 3


def test_killed_runs_publish_a_whole_result_or_none(children: Any, base: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"input_ids": r}) + "\n" for r in rows(20, 8).ids.tolist()))
    killer, to, kills = Killer(children, seed=3), tmp_path / "made", 0
    moments = killer.finish(_child_run, str(base), str(tmp_path / "whole"), str(data))
    want = load_file(tmp_path / "whole" / "model.safetensors")
    for first in range(0, moments, 3):  # from reading the data to publishing the result
        if not killer.kill(
            max(0, first - done_steps(tmp_path / "made.run" / "0-tune.full")), first, _child_run, str(base), str(to), str(data)
        ):
            break
        kills += 1
        assert not to.exists() or whole(to, want)
    killer.finish(_child_run, str(base), str(to), str(data))
    assert kills > 1 and whole(to, want) and not list(tmp_path.glob("*.incomplete")) and not list(to.rglob("checkpoint-*"))


def whole(to: Path, want: dict[str, Tensor]) -> bool:
    step = to / "steps" / "0-tune.full"
    report = json.loads((to / "report.json").read_text())
    return (
        same(load_file(to / "model.safetensors"), want)
        and Checkpoint(to).lineage is not None
        and report["to"] == str(to)
        and parquet.read_table(step / "dynamics.parquet").num_rows
        == parquet.read_table(to.parent / "whole" / "steps" / "0-tune.full" / "dynamics.parquet").num_rows
        > 0
    )


def _child_cli(interrupt: bool, base: str, to: str, data: str, told: Any) -> None:
    import contextlib
    import io

    from modelwright.cli import app as cli
    from modelwright.core.report.progress import Tick

    def at(self: Tick, done: int, of: int) -> None:
        if interrupt and done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    _calm()
    Tick.to = at  # type: ignore[method-assign]
    told.send("cli")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            cli.main(
                [
                    "tune",
                    "full",
                    "--base",
                    base,
                    "--to",
                    to,
                    "--data",
                    data,
                    "--train.batch",
                    "2",
                    "--train.context",
                    "8",
                    "--train.save-every",
                    "4",
                    "--train.lr",
                    "1e-2",
                    "--json",
                ]
            )
    finally:
        told.send(said.getvalue())


def test_ctrl_c_at_the_command_line_exits_130_and_the_same_command_continues(children: Any, base: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"input_ids": r}) + "\n" for r in rows(20, 8).ids.tolist()))

    def command(interrupt: bool, to: Path) -> tuple[int | None, str]:
        ours, theirs = children.Pipe(duplex=False)
        child = children.Process(target=_child_cli, args=(interrupt, str(base), str(to), str(data), theirs))
        child.start()
        theirs.close()
        assert ours.poll(120) and ours.recv() == "cli"
        child.join()
        return child.exitcode, ours.recv()

    code, said = command(True, tmp_path / "a")
    assert code == 130 and not (tmp_path / "a").exists()
    assert latest_state(tmp_path / "a.run" / "0-tune.full") == tmp_path / "a.run" / "0-tune.full" / "checkpoint-5"
    assert "the same command continues" in said
    assert command(False, tmp_path / "a")[0] == command(False, tmp_path / "b")[0] == 0
    assert same(load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors"))
    assert not (tmp_path / "a.run").exists()


@pytest.mark.parametrize("place", ["certify", "write_json", "write_lineage"])  # in the order of the run
def test_stop_after_training_does_not_train_again(place: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import modelwright
    from modelwright.runner import run as runner
    from modelwright.runner import tune as drivers

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"input_ids": r}) + "\n" for r in rows(20, 8).ids.tolist()))
    arguments: dict[str, Any] = {"base": base, "to": tmp_path / "made", "data": Data(str(data)), "train": {"context": 8, "lr": 1e-2}}
    trained: list[int] = []
    real = training.Trainer.training_step

    def counted(self: Any, *a: Any, **k: Any) -> Tensor:
        trained.append(self.state.global_step)
        return real(self, *a, **k)

    def stop(*a: Any, **k: Any) -> None:
        raise Fatal

    monkeypatch.setattr(training.Trainer, "training_step", counted)
    with monkeypatch.context() as m, pytest.raises(Fatal):
        m.setattr(drivers if place == "certify" else runner, place, stop)
        modelwright.run("tune.full", **arguments)
    result = modelwright.run("tune.full", **arguments)
    assert trained == list(range(result.steps[0]["facts"]["steps"]))
    assert (result.to / "steps" / "0-tune.full" / "dynamics.parquet").is_file()
