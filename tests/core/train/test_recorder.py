"""The dynamics table: every example of every step with its own loss, and parts that no kill can lose."""

import glob
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch import Tensor

from modelwright.core.data.rows import IGNORE, Rows
from modelwright.core.knobs import Train
from modelwright.core.train import recorder as module
from modelwright.core.train.evaluate import evaluate_rows
from modelwright.core.train.loop import Outcome, fit
from modelwright.core.train.recorder import SCHEMA, Meter, Recorder, read_dynamics
from modelwright.core.train.technique import Technique

GLOB = glob.glob


def counted(monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
    """Make these the counters that the meter finds."""
    monkeypatch.setattr(module.glob, "glob", lambda pattern, *a, **k: files if "powercap" in str(pattern) else GLOB(pattern, *a, **k))


@pytest.fixture(autouse=True)
def _no_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine lets itself be asked must not decide a test."""
    counted(monkeypatch, [])
    monkeypatch.setattr(Meter, "_nvidia", staticmethod(list))


def rows() -> Rows:
    """Ten rows of different lengths, each with a different share of masked labels; one has nothing to learn."""
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 96, (10, 12), generator=g, dtype=torch.int32)
    lengths = torch.randint(4, 13, (10,), generator=g)
    inside = torch.arange(12) < lengths[:, None]
    labels = torch.where(inside & (torch.rand(10, 12, generator=g) < 0.6), ids, IGNORE)
    labels[3] = IGNORE
    return Rows(torch.where(inside, ids, 0), labels, lengths)


def trained(folder: Path, **train: Any) -> tuple[Outcome, list[dict[str, Any]]]:
    from families import model_of

    knobs = Train(**{"batch": 2, "accumulate": 2, "epochs": 2.0, "lr": 1e-2, "warmup": 0.4, "save_every": 2, **train})
    out = fit(
        model_of("llama"), rows(), knobs, techniques=[Technique()], evals={"new": rows(), "part": rows().split(3)[0]}, folder=folder, seed=0
    )
    assert out.dynamics
    return out, parquet.read_table(out.dynamics).to_pylist()


@torch.no_grad()
def direct(model: Any, i: int) -> tuple[float, int]:
    """Mean loss and learnt tokens of one row, computed alone and unpadded."""
    data = rows()
    n = int(data.lengths[i])
    labels = data.labels[i, 1:n].long()
    learnt = int((labels != IGNORE).sum())
    logits = model(input_ids=data.ids[i : i + 1, :n].long()).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE)) if learnt else 0.0, learnt


def test_two_passes_show_every_example_twice(tmp_path: Path) -> None:
    seen = [r["example"] for r in trained(tmp_path)[1] if r["kind"] == "train"]
    assert sorted(seen) == sorted([*range(10), *range(10)])


def test_first_step_has_the_losses_of_the_untrained_model(tmp_path: Path) -> None:
    from families import model_of

    model = model_of("llama")
    first = [r for r in trained(tmp_path, batch=5, warmup=0.0)[1] if r["kind"] == "train" and r["step"] == 1]
    assert sorted(r["example"] for r in first) == list(range(10))
    for r in first:
        loss, learnt = direct(model, r["example"])
        assert r["loss"] == pytest.approx(loss, abs=1e-5) and r["tokens"] == learnt
    assert {r["tokens"] for r in first} > {0}


def test_learning_rate_is_the_one_that_the_step_used(tmp_path: Path) -> None:
    out, table = trained(tmp_path, epochs=2.0)  # 6 steps, the first 2 of them rising
    assert out.steps == 6
    want = [0.0, 0.5e-2, 1e-2, 0.75e-2, 0.5e-2, 0.25e-2]
    for step in range(1, 7):
        assert {round(r["lr"], 7) for r in table if r["kind"] == "train" and r["step"] == step} == {round(want[step - 1], 7)}
    assert all(r["lr"] is None for r in table if r["kind"] == "eval")


def test_evaluations_are_rows_under_their_name(tmp_path: Path) -> None:
    out, table = trained(tmp_path, eval_every=2)
    found = {(r["step"], r["name"]): (r["loss"], r["tokens"]) for r in table if r["kind"] == "eval"}
    assert found == {(e["step"], e["name"]): (pytest.approx(e["loss"], rel=1e-6), e["tokens"]) for e in out.evals}
    assert {n for _, n in found} == {"new", "part"} and {s for s, _ in found} == {0, 2, 4, out.steps}
    assert found[out.steps, "part"][0] == pytest.approx(evaluate_rows(out.model, rows().split(3)[0], 2)["loss"], rel=1e-6)


def test_table_has_the_documented_columns_and_types(tmp_path: Path) -> None:
    out, table = trained(tmp_path)
    assert parquet.read_schema(out.dynamics).equals(SCHEMA)
    assert read_dynamics(out.dynamics, ["step", "loss"]).column_names == ["step", "loss"]
    assert all(r["name"] is None for r in table if r["kind"] == "train") and all(r["example"] is None for r in table if r["kind"] == "eval")


def test_nothing_is_written_when_not_asked(tmp_path: Path) -> None:
    from families import model_of

    out = fit(model_of("llama"), rows(), Train(batch=2, record=False), techniques=[Technique()], evals={}, folder=tmp_path, seed=0)
    assert out.dynamics is None and not list(tmp_path.glob("dynamics*"))


# ---- energy ----------------------------------------------------------------------------------------------------------
def test_energy_is_unknown_where_the_machine_does_not_let_itself_be_read(tmp_path: Path) -> None:
    out, table = trained(tmp_path)
    assert (out.energy_j, out.energy_source) == (None, "unknown")
    assert {r["energy_j"] for r in table} == {None}


@pytest.fixture
def counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two packages with RAPL counters (microjoules), one more that may not be read."""
    files = []
    for i, text in enumerate(("1000000\n", "5000000\n", "secret")):
        file = tmp_path / "sys" / f"intel-rapl:{i}" / "energy_uj"
        file.parent.mkdir(parents=True)
        file.write_text(text)
        files.append(file)
    found = [str(f) for f in files] + [str(tmp_path / "sys" / "gone" / "energy_uj")]
    counted(monkeypatch, found)
    return files


def test_readable_counters_are_summed_in_joules(counters: list[Path]) -> None:
    meter = Meter()
    assert meter.source == "CPU package counters" and meter.joules() == 0.0
    counters[0].write_text("3500000")
    assert meter.joules() == pytest.approx(2.5)
    counters[1].write_text("6000000")
    assert meter.joules() == pytest.approx(3.5)
    assert meter.joules() == pytest.approx(3.5)


def test_counter_that_wraps_never_takes_energy_back(counters: list[Path]) -> None:
    meter = Meter()
    counters[0].write_text("3000000")
    assert meter.joules() == pytest.approx(2.0)
    counters[0].write_text("17")
    assert meter.joules() == pytest.approx(2.0)
    counters[0].write_text("1000017")
    assert meter.joules() == pytest.approx(3.0)


def test_graphics_cards_are_added(counters: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        used = 2000  # millijoules

        def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
            return self.used * handle

    card = Card()
    monkeypatch.setattr(Meter, "_nvidia", staticmethod(lambda: [(card, 1), (card, 2)]))
    meter = Meter()
    card.used = 3000
    assert meter.source == "CPU package counters + GPU counters" and meter.joules() == pytest.approx(3.0)


def test_energy_is_recorded_and_grows(counters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter(range(10, 10_000))
    monkeypatch.setattr(Meter, "_read", lambda self: [float(next(reads))])
    out, table = trained(tmp_path / "run")
    read = [r["energy_j"] for r in sorted(table, key=lambda r: (r["step"], r["kind"] == "train")) if r["kind"] == "eval"]
    assert out.energy_source == "CPU package counters" and out.energy_j is not None and out.energy_j > max(read)
    assert read == sorted(read) and len(set(read)) == len(read)
    assert any(r["energy_j"] is not None for r in table if r["kind"] == "train")


# ---- parts -----------------------------------------------------------------------------------------------------------
def feed(recorder: Recorder, step: int) -> None:
    recorder.train(step, 0.1 * step, Tensor([step, step + 100]).long(), Tensor([2.0 * step, 6.0]), Tensor([2, 0]).long())


def steps_of(file: Path) -> list[int]:
    return parquet.read_table(file)["step"].to_pylist()


def test_sums_become_means_and_nothing_learnt_is_no_division_by_zero(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "d.parquet")
    recorder.train(7, 0.5, torch.tensor([3, 4]), torch.tensor([6.0, 0.0]), torch.tensor([4, 0]))
    recorder.eval(7, "new", 1.25, 99)
    table = parquet.read_table(recorder.close(7)).to_pylist()
    key = {(r["kind"], r["example"]): r for r in table}
    assert key["train", 3] == {
        "step": 7,
        "kind": "train",
        "name": None,
        "example": 3,
        "loss": 1.5,
        "tokens": 4,
        "lr": 0.5,
        "energy_j": None,
        "grad_norm": None,
    }
    assert (key["train", 4]["loss"], key["train", 4]["tokens"]) == (0.0, 0)
    assert key["eval", None] == {
        "step": 7,
        "kind": "eval",
        "name": "new",
        "example": None,
        "loss": 1.25,
        "tokens": 99,
        "lr": None,
        "energy_j": None,
        "grad_norm": None,
    }


def test_a_step_without_examples_is_written_as_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "d.parquet")
    none = torch.zeros(0, dtype=torch.long)  # what a process has whose share of a batch only fills it up
    recorder.train(1, 0.5, none, none.float(), none)
    recorder.flush(1)
    recorder.train(2, 0.5, torch.tensor([3]), torch.tensor([6.0]), torch.tensor([4]))
    assert steps_of(recorder.close(2)) == [2]


def test_recording_holds_no_graph() -> None:
    recorder = Recorder.__new__(Recorder)
    recorder._steps = []
    recorder.train(1, 0.1, torch.tensor([0]), torch.ones(1, requires_grad=True) * 2, torch.tensor([1]))
    assert recorder._steps == [(1, 0.1, [0], [2.0], [1])]


def test_parts_are_joined_in_order(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "d.parquet")
    for step in range(1, 12):
        feed(recorder, step)
        if step % 3 == 0:
            recorder.flush(step)
    assert len(list((tmp_path / "d.parts").glob("*.parquet"))) == 3 and not (tmp_path / "d.parquet").exists()
    file = recorder.close(11)
    assert file == tmp_path / "d.parquet" and steps_of(file) == [s for s in range(1, 12) for _ in (0, 1)]
    assert [p.name for p in tmp_path.iterdir()] == ["d.parquet"]


def test_resuming_drops_what_lies_after_the_state_and_keeps_the_rest(tmp_path: Path) -> None:
    broken = Recorder(tmp_path / "d.parquet")
    for step in (1, 2, 3, 4, 5, 6):
        feed(broken, step)
        if step in (2, 4, 6):
            broken.flush(step)
    resumed = Recorder(tmp_path / "d.parquet", 4)  # the part of step 6 was written, its state was not
    feed(resumed, 5)
    assert steps_of(resumed.close(5)) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_rows_that_came_after_the_last_flush_die_with_the_process_only(tmp_path: Path) -> None:
    broken = Recorder(tmp_path / "d.parquet")
    feed(broken, 1)
    broken.flush(1)
    feed(broken, 2)
    assert steps_of(Recorder(tmp_path / "d.parquet", 1).close(1)) == [1, 1]


def test_second_flush_of_a_step_adds_to_its_part(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "d.parquet")
    feed(recorder, 1)
    recorder.flush(1)
    recorder.eval(1, "late", 0.5, 10)
    assert parquet.read_table(recorder.close(1))["kind"].to_pylist() == ["train", "train", "eval"]


def test_closing_an_empty_recorder_gives_an_empty_table(tmp_path: Path) -> None:
    table = parquet.read_table(Recorder(tmp_path / "d.parquet").close(0))
    assert table.num_rows == 0 and table.schema.equals(SCHEMA)


def test_closing_twice_keeps_the_table(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "d.parquet")
    feed(recorder, 1)
    recorder.close(1)
    assert steps_of(recorder.close(1)) == [1, 1]


def test_closing_again_after_a_restart_keeps_the_table(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "d.parquet")
    feed(recorder, 1)
    recorder.close(1)
    assert steps_of(Recorder(tmp_path / "d.parquet", 1).close(1)) == [1, 1]


def test_table_of_another_attempt_is_not_mixed_in(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "d.parquet")
    recorder.eval(0, "new", 1.0, 1)
    feed(recorder, 1)
    recorder.close(1)
    fresh = Recorder(tmp_path / "d.parquet")  # no state was found: training starts from step 0
    fresh.eval(0, "new", 1.0, 1)
    assert steps_of(fresh.close(0)) == [0]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_death_while_closing_loses_no_row(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path / "d.parquet")
    for step in (1, 2, 3):
        feed(recorder, step)
        recorder.flush(step)
    real, gone = Path.unlink, []

    def unlink(self: Path, *a: Any, **k: Any) -> None:
        if len(gone) == after:
            raise InterruptedError
        gone.append(self)
        real(self, *a, **k)

    with monkeypatch.context() as m, pytest.raises(InterruptedError):
        m.setattr(Path, "unlink", unlink)
        m.setattr("shutil.rmtree", lambda folder, **k: [unlink(p) for p in sorted(Path(folder).iterdir())])
        recorder.close(3)
    assert steps_of(Recorder(tmp_path / "d.parquet", 3).close(3)) == [1, 1, 2, 2, 3, 3]


def test_torn_part_of_a_killed_write_does_no_harm(tmp_path: Path) -> None:
    broken = Recorder(tmp_path / "d.parquet")
    feed(broken, 1)
    broken.flush(1)
    (tmp_path / "d.parts" / "000000002.parquet.tmp").write_bytes(b"PAR1 and no more")
    (tmp_path / "d.parquet.tmp").write_bytes(b"PAR1 and no more")
    resumed = Recorder(tmp_path / "d.parquet", 1)
    feed(resumed, 3)
    assert steps_of(resumed.close(3)) == [1, 1, 3, 3]


def test_write_that_fails_leaves_the_part_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path / "d.parquet")
    feed(recorder, 1)
    recorder.flush(1)

    def full(table: pa.Table, file: Path, **k: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    feed(recorder, 1)
    with monkeypatch.context() as m, pytest.raises(OSError, match="no space"):
        m.setattr(module.parquet, "write_table", full)
        recorder.flush(1)
    assert steps_of(tmp_path / "d.parts" / "000000001.parquet") == [1, 1]
