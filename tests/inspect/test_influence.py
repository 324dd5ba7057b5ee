"""Simulators of training: what is known in closed form is recovered, roll-outs are the loop, gradients predict small steps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import modelwright
from families import model_of
from modelwright.core.data.rows import Rows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.train.loop import fit
from modelwright.core.train.recorder import Recorder
from modelwright.core.train.technique import Technique
from modelwright.inspect.simulate import features
from modelwright.inspect.simulate import simulators as s
from modelwright.inspect.simulate.runs import Runs, read_runs, texts_of

WORDS = ["apple", "boat", "cloud", "drum", "egg", "fox", "gate", "hill"]


def made(r: int = 8, t: int = 10, n: int = 8, m: int = 3, seed: int = 0, order: int = 1) -> tuple[Runs, torch.Tensor, torch.Tensor]:
    """Runs that follow tables exactly, with two examples a step."""
    g = np.random.default_rng(seed)
    seen = np.zeros((r, t, n))
    for k in range(r):
        for i in range(t):
            seen[k, i, g.choice(n, 2, replace=False)] = 1
    a = torch.from_numpy(g.normal(size=(order, n, m)) * 0.02)
    b = torch.from_numpy(g.normal(size=(n, m)) * 0.02)
    phi = s.roll_out(torch.from_numpy(g.uniform(1, 2, (r, m))), *s.coefficients(torch.from_numpy(seen), a, b)).numpy()
    return Runs(seen, phi, np.full((r, t), 0.1), list(range(n)), [f"t{i}" for i in range(m)], list(range(t + 1))), a, b


def test_tables_are_recovered_and_agree_with_least_squares() -> None:
    runs, a, b = made(r=20)
    found_a, found_b = s.tables(runs, ridge=1e-10)
    assert np.allclose(found_a, a[0], atol=1e-5) and np.allclose(found_b, b, atol=1e-5)
    seen = torch.from_numpy(runs.seen).flatten(0, 1)
    before, after = (torch.from_numpy(x).flatten() for x in (runs.phi[:, :-1, 1], runs.phi[:, 1:, 1]))
    w = torch.linalg.lstsq(torch.cat([seen * before[:, None], seen], 1), after - before).solution
    assert np.allclose(w[: len(a[0])].numpy(), found_a[:, 1], atol=1e-5)


def test_closed_form_of_gradient_descent_is_recovered() -> None:
    """One weight, losses (w - m)^2 / 2 with one m: each step multiplies the loss by (1 - eta)^2 and adds nothing."""
    eta, g = 0.1, np.random.default_rng(0)
    start = g.uniform(1, 3, (6, 1))
    phi = 0.5 * (start[:, None] * (1 - eta) ** np.arange(8)[None, :, None]) ** 2
    seen = np.zeros((6, 7, 4))
    for k in range(6):
        for t in range(7):
            seen[k, t, g.integers(0, 4)] = 1
    runs = Runs(seen, phi, np.full((6, 7), eta), [0, 1, 2, 3], ["t"], list(range(8)))
    a, b = s.tables(runs, ridge=1e-12)
    assert np.allclose(1 + a, (1 - eta) ** 2, atol=1e-6) and np.allclose(b, 0, atol=1e-6)


@pytest.mark.parametrize("order", [1, 3])
def test_the_batched_roll_out_is_the_loop(order: int) -> None:
    runs, a, b = made(order=order, seed=3)
    for r in range(2):
        for m in range(3):
            past = [runs.phi[r, 0, m]]
            for t in range(runs.seen.shape[1]):
                batch = np.flatnonzero(runs.seen[r, t])
                value = float(sum(b[i, m] for i in batch))
                for j in range(order):
                    alpha = (j == 0) + float(sum(a[j, i, m] for i in batch))
                    value += alpha * (past[t - j] if t >= j else 0.0)
                past.append(value)
            assert np.allclose(past, runs.phi[r, :, m], atol=1e-9)


def test_one_step_with_true_history_is_the_roll_out_of_runs_that_follow_it() -> None:
    runs, a, b = made(order=2, seed=1)
    phi = torch.from_numpy(runs.phi)
    assert torch.allclose(s.one_step(phi, *s.coefficients(torch.from_numpy(runs.seen), a, b)), phi[:, 1:], atol=1e-9)


def test_further_orders_of_zero_change_nothing_and_examples_have_no_order_in_a_batch() -> None:
    runs, a, b = made()
    seen = torch.from_numpy(runs.seen)
    more = torch.cat([a, torch.zeros(2, *a.shape[1:])])
    first = torch.from_numpy(runs.phi[:, 0])
    assert torch.equal(s.roll_out(first, *s.coefficients(seen, a, b)), s.roll_out(first, *s.coefficients(seen, more, b)))


def test_gptfluence_learns_tables_that_its_form_can_hold() -> None:
    torch.manual_seed(0)
    h, to = F.normalize(torch.randn(8, 6), dim=1), F.normalize(torch.randn(3, 6), dim=1)
    runs, _, _ = made(r=12, seed=2)
    b = (h @ to.T * 0.05).double()
    seen = torch.from_numpy(runs.seen)
    runs.phi = s.roll_out(torch.from_numpy(runs.phi[:, 0]), *s.coefficients(seen, torch.zeros(1, 8, 3).double(), b)).numpy()
    for objective in ("one_step", "roll_out"):
        model = s.fit_gptfluence(runs, h, to, order=1, objective=objective, epochs=150, lr=1e-2, seed=0, tick=lambda n: None)
        mean = s.errors(s.mean_curve(runs, runs), runs.phi)["mse"]
        assert s.errors(s.by_gptfluence(model, h, to, runs), runs.phi)["mse"] < 0.3 * mean
    assert s.errors(s.by_tables(*s.tables(runs, 1e-9), runs), runs.phi)["mse"] < 1e-9


def test_controls_know_nothing_of_examples() -> None:
    runs, _, _ = made()
    other = runs.take([3, 1])
    other.seen = other.seen[:, ::-1]
    assert np.array_equal(s.constant(runs, other), np.repeat(runs.phi[[3, 1], :1], 11, 1))
    assert np.allclose(s.mean_curve(runs, other)[:, 0], other.phi[:, 0])
    same = runs.take([0, 0])
    assert np.allclose(s.mean_curve(same, same), same.phi)


def test_the_effect_of_an_example_is_that_of_runs_without_it() -> None:
    runs, a, b = made()
    found = s.left_out_effects(a.numpy(), b.numpy(), runs)
    i = 4
    moved = runs.seen.copy()
    others = [k for k in range(8) if k != i]
    moved[..., others] += moved[..., i : i + 1] / 7
    moved[..., i] = 0
    rolled = s.roll_out(torch.from_numpy(runs.phi[:, 0]), *s.coefficients(torch.from_numpy(moved), a, b)).numpy()
    assert np.allclose(found[i], (rolled[:, -1] - runs.phi[:, -1]).mean(0), atol=1e-9)
    assert np.abs(found.sum()) > 0


def test_lds_and_errors() -> None:
    x = np.arange(12.0).reshape(4, 3)
    assert s.lds(x, x) == pytest.approx(1) and s.lds(-x, x) == pytest.approx(-1)
    phi = np.ones((2, 3, 4)) * np.arange(4)
    assert s.errors(phi + 0.5, phi) == {"mse": 0.25, "mae": 0.5, "final_rho": pytest.approx(1)}


# ---- gradients ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    model = model_of("llama")
    model.set_attn_implementation("eager")
    return model.eval()


def loss(model, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:])


def test_gradients_of_rows_together_are_those_of_each_alone(model) -> None:
    rows = [torch.tensor([3, 4, 5, 6]), torch.tensor([7, 8]), torch.tensor([9, 3, 9, 3, 1])]
    found = features.gradients(model, rows, batch=3)
    for row, g in zip(rows, found, strict=True):
        alone = torch.autograd.grad(loss(model, row), list(model.parameters()))
        assert torch.allclose(g, torch.cat([x.flatten() for x in alone]), atol=1e-6)


def test_tracin_is_the_first_order_change_of_a_step(model) -> None:
    """Halving the rate makes the error of the prediction a quarter."""
    train, test = torch.tensor([3, 4, 5, 6]), torch.tensor([3, 4, 7, 6])
    double = model_of("llama").double().eval()
    params, before = list(double.parameters()), float(loss(double, test).detach())
    grads = torch.autograd.grad(loss(double, train), params)
    a, b = features.gradients(double, [train, test])
    product = float(a @ b)
    errors = []
    for eta in (1e-4, 5e-5):
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p -= eta * g
            errors.append(float(loss(double, test)) - before + eta * product)  # minus what was predicted
            for p, g in zip(params, grads, strict=True):
                p += eta * g
    assert 3.5 < errors[0] / errors[1] < 4.5
    runs = Runs(np.ones((1, 1, 1)), np.zeros((1, 2, 1)), np.full((1, 1), 0.1), [0], ["t"], [0, 1])
    assert s.tracin_terms(runs, np.array([[product]]))[0, 0, 0] == pytest.approx(-0.1 * product)


# ---- recorded runs -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """Five real runs over eight sentences in other orders, three test sentences evaluated at each step."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (8, 6), generator=g, dtype=torch.int32)
    rows = Rows(ids, ids.long(), torch.full((8,), 6))
    evals = {f"t{i}": Rows(ids[i : i + 1].flip(1), ids[i : i + 1].flip(1).long(), torch.full((1,), 6)) for i in range(3)}
    for seed in range(5):
        train = Train(batch=2, lr=1e-2, epochs=2, eval_every=1, warmup=0.0)
        fit(model_of("llama"), rows, train, techniques=[Technique()], evals=evals, folder=folder / f"r{seed}", seed=seed)
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": f"{w} and {w}s {i}"}) + "\n" for i, w in enumerate(WORDS)))
    (folder / "tests.jsonl").write_text("".join(json.dumps({"name": f"t{i}", "text": f"the {WORDS[i]} is here"}) + "\n" for i in range(3)))
    return folder


def test_recorded_runs_are_read_as_they_were(recorded: Path) -> None:
    runs = read_runs(sorted(recorded.rglob("dynamics.parquet")))
    assert runs.seen.shape == (5, 8, 8) and runs.phi.shape == (5, 9, 3)
    assert (runs.seen.sum(-1) == 2).all() and (runs.seen.sum(1) == 2).all()
    assert (runs.phi[:, 0] == runs.phi[:1, 0]).all() and runs.phi[0, -1].mean() != runs.phi[1, -1].mean()


def test_unlogged_steps_are_joined_and_said(tmp_path: Path) -> None:
    files = []
    for k in range(2):
        rec = Recorder(tmp_path / f"r{k}" / "dynamics.parquet")
        for step in range(9):
            if step % 4 == 0:
                rec.eval(step, "t", 1.0 - step / 20, 3)
            if step:
                rec.train(step, 0.1, torch.tensor([step % 3]), torch.tensor([1.0]), torch.tensor([1]))
        files.append(rec.close(9))
    runs = read_runs(files)
    assert runs.steps == [0, 4, 8] and runs.seen.sum(-1).tolist() == [[4, 4]] * 2
    assert runs.facts["training steps between evaluations"] == 4


def test_a_whole_run_ranks_examples_and_writes_the_kept_rows(recorded: Path, tmp_path: Path) -> None:
    knobs = {"runs": [str(recorded)], "examples": str(recorded / "data.jsonl"), "tests": str(recorded / "tests.jsonl"), "epochs": 20}
    result = modelwright.run("inspect.influence", base="seedling", to=tmp_path / "out", drop=0.25, **knobs)
    metrics = result.plain()["metrics"]
    assert {"constant", "mean curve", "tables", "gptfluence", "tracin", "gradient kernel"} == set(metrics["scores"])
    lines = [json.loads(x) for x in (result.to / "influence.jsonl").read_text().splitlines()]
    assert sorted(x["example"] for x in lines) == list(range(8))
    assert [x["rise_without"] for x in lines] == sorted(x["rise_without"] for x in lines)
    kept = (result.to / "kept.jsonl").read_text().splitlines()
    gone = {x["example"] for x in lines[:2] if x["rise_without"] < 0}
    assert kept == [x for i, x in enumerate((recorded / "data.jsonl").read_text().splitlines()) if i not in gone]


@pytest.mark.slow
def test_vectors_of_another_encoder_are_taken_from_a_file(recorded: Path, tmp_path: Path) -> None:
    knobs = {"runs": [str(recorded)], "examples": str(recorded / "data.jsonl"), "tests": str(recorded / "tests.jsonl"), "epochs": 5}
    g = np.random.default_rng(0)
    for name, tests in (("good", 3), ("bad", 2)):
        np.savez(tmp_path / f"{name}.npz", examples=g.normal(size=(8, 5)), tests=g.normal(size=(tests, 5)))
    result = modelwright.run("inspect.influence", to=tmp_path / "out", features="file", vectors=str(tmp_path / "good.npz"), **knobs)
    assert "gptfluence" in result.plain()["metrics"]["scores"]
    for path, what in ((str(tmp_path / "bad.npz"), "rows of one width"), ("", "cannot be read")):
        with pytest.raises(UserError, match=what):
            modelwright.run("inspect.influence", to=tmp_path / "no", features="file", vectors=path, **knobs)


@pytest.mark.slow
def test_without_texts_or_base_what_can_be_simulated_is(recorded: Path, tmp_path: Path) -> None:
    result = modelwright.run("inspect.influence", to=tmp_path / "out", runs=[str(recorded)])
    assert set(result.plain()["metrics"]["scores"]) == {"constant", "mean curve", "tables"}


@pytest.mark.slow
def test_bad_input_is_one_sentence(recorded: Path, tmp_path: Path) -> None:
    files = sorted(recorded.rglob("dynamics.parquet"))
    with pytest.raises(UserError, match="3 runs are too few"):
        modelwright.run("inspect.influence", to=tmp_path / "a", runs=[str(f) for f in files[:3]])
    with pytest.raises(UserError, match="no recorded run at"):
        modelwright.run("inspect.influence", to=tmp_path / "b", runs=[str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="needs a base"):
        knobs = {"examples": str(recorded / "data.jsonl"), "tests": str(recorded / "tests.jsonl"), "features": "states"}
        modelwright.run("inspect.influence", to=tmp_path / "c", runs=[str(recorded)], **knobs)
    (tmp_path / "few.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="has 1 rows"):
        texts_of(str(tmp_path / "few.jsonl"), [0, 5])
    (tmp_path / "junk.parquet").write_text("x")
    with pytest.raises(UserError, match="cannot be read"):
        read_runs([tmp_path / "junk.parquet"])
    rec = Recorder(tmp_path / "z" / "dynamics.parquet")
    for step in range(4):
        rec.eval(step, "another", 1.0, 1)
        rec.train(step + 1, 0.1, torch.tensor([0]), torch.tensor([1.0]), torch.tensor([1]))
    with pytest.raises(UserError, match="other tests"):
        read_runs([files[0], rec.close(4)])
