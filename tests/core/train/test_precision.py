"""Weights of 16 bits train as well as those of 32, are saved as they came, and a run that cannot move or diverges is stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import modelwright
from families import model_of
from modelwright.core.data.rows import Rows
from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import as_stored
from modelwright.core.train.precision import StochasticAdamW
from modelwright.core.train.technique import Technique
from small import Fatal, go, rows, same, weights

BF16 = torch.bfloat16
PLAIN = {"certificate": "structure"}
STORED = {"weights": "stored", "rounding": "stochastic"}


def learnable(n: int = 24, width: int = 16) -> Rows:
    """Rows that count upwards: a model learns them in a few steps."""
    ids = (torch.arange(width) + torch.arange(n)[:, None]).int() % 90 + 3
    return Rows(ids, ids.clone(), torch.full((n,), width))


def llama(dtype: str = "bfloat16") -> Any:
    return model_of("llama", dtype=dtype)


def token_file(folder: Path) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"input_ids": r}) + "\n" for r in learnable().ids.tolist()))
    return file


def tuned(base: Path, folder: Path, save: dict[str, Any] | None = None, **train: Any) -> Any:
    data = {"path": str(token_file(folder))}
    settings = {"batch": 8, "context": 16, "lr": 1e-3, "eval_every": 1000, **train}
    return modelwright.run("tune.full", base=base, to=folder / "made", data=data, train=settings, save=PLAIN | (save or {}))


@pytest.fixture(scope="module")
def seedlings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small model that comes with the package, and the same in bf16."""
    source, folder = Checkpoint("seedling"), tmp_path_factory.mktemp("seedling")
    source.model(BF16).save_pretrained(folder)
    source.tokenizer().save_pretrained(folder)
    return {"fp32": Path(source.folder), "bf16": folder}


# ---- fp32 weights in training, the source's type on disk -----------------------------------------------------------------
def test_a_bf16_copy_ends_where_the_fp32_run_ends_and_is_saved_in_bf16(seedlings: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The ship came home late and nobody on the pier had waited for it. " * 24)
    ends: dict[str, list[float]] = {}
    for name, base in seedlings.items():
        # 2e-5: nearest rounding to bf16 would lose nearly all of such steps
        train = {"batch": 4, "context": 32, "lr": 2e-5, "epochs": 2, "schedule": "constant", "eval_every": 1000}
        data = {"path": str(text)}
        result = modelwright.run("tune.full", base=base, to=tmp_path / name, data=data, evals={"same": data}, train=train, save=PLAIN)
        losses = [e["loss"] for e in result.steps[0]["evals"]]
        ends[name] = [losses[0], losses[-1]]
    assert ends["fp32"][0] - ends["fp32"][1] > 0.05, "the run must move for the comparison to say anything"
    assert abs(ends["bf16"][1] - ends["fp32"][1]) < 0.01
    assert Checkpoint(tmp_path / "bf16").types() == {BF16} and Checkpoint(tmp_path / "fp32").types() == {torch.float32}
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_each_tensor_keeps_its_own_type_on_disk(tmp_path: Path) -> None:
    model = llama()
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data = p.data.float()
    model.save_pretrained(tmp_path / "mixed")
    source = Checkpoint(tmp_path / "mixed")
    assert source.types() == {BF16, torch.float32}
    tuned(tmp_path / "mixed", tmp_path)
    made = Checkpoint(tmp_path / "made")
    assert {n: made.dtype(n) for n in made.table} == {n: source.dtype(n) for n in source.table}
    assert not torch.equal(made.get("model.norm.weight"), source.get("model.norm.weight"))
    with pytest.raises(UserError, match="several types"):
        tuned(tmp_path / "mixed", tmp_path / "made", weights="stored")


def test_save_dtype_is_the_type_on_disk(tiny: Any, tmp_path: Path) -> None:
    tuned(tiny("llama"), tmp_path, save={"dtype": "float16"})
    assert Checkpoint(tmp_path / "made").types() == {torch.float16}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_every_save_dtype_is_the_type_of_each_weight(kind: str, tiny: Any) -> None:
    source = Checkpoint(tiny("llama"))
    model = source.model()
    as_stored(model, source, kind)
    assert {p.dtype for p in model.parameters()} == {model.config.dtype} == {getattr(torch, kind)}


def test_the_share_that_rounding_gave_back_is_counted_right(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    source = Checkpoint(tmp_path / "base")
    model = source.model(torch.float32)
    weight = model.model.layers[0].self_attn.q_proj.weight.data  # 32 x 32, each weight is looked at
    step = 2.0**-8  # half the distance of two bf16 numbers, relative to the next lower power of two
    weight[0] += weight[0] * step / 8  # 32 weights that rounding gives back
    weight[1] += weight[1] * step * 8  # 32 that stay
    weight[2, :16] += weight[2, :16] * step * 8  # 16 more; the others did not move at all and do not count
    assert as_stored(model, source, "source") == pytest.approx(32 / 80)
    assert {p.dtype for p in model.parameters()} == {BF16}
    assert as_stored(source.model(torch.float32), source, "source") is None, "nothing was trained"


def test_the_share_that_rounding_gave_back_stands_in_the_report(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    result = tuned(tmp_path / "base", tmp_path, lr=1e-6)
    assert result.steps[0]["facts"]["weights that rounding gave back to the source"] > 0.9


# ---- weights held in 16 bits ---------------------------------------------------------------------------------------------
def test_nearest_rounding_that_loses_most_steps_is_stopped_with_the_share(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(9\d|100)% of the trained weights had a gradient and did not move") as stopped:
        go(Technique(), llama(), tmp_path, weights="stored", lr=1e-6)
    assert "stochastic" in str(stopped.value)


def test_nearest_rounding_goes_on_where_most_weights_move_and_says_how_many_did_not(tmp_path: Path) -> None:
    outcome = go(Technique(), llama(), tmp_path, weights="stored", lr=3e-2)
    assert any("of the trained weights had a gradient and did not move" in note for note in outcome.notes)


def test_a_stopped_run_leaves_no_result(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="did not move"):
        tuned(tmp_path / "base", tmp_path, lr=1e-6, weights="stored")
    assert not (tmp_path / "made").exists()


def rounded(value: Tensor, step: int = 1, seed: int = 0) -> Tensor:
    optimizer = StochasticAdamW([torch.nn.Parameter(torch.zeros(1))], 1e-3, (0.9, 0.999), 1e-8, 0.0, seed, torch.float32)
    return optimizer._rounded(value, BF16, 1, step)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("base", [1.0, -0.375, 3e-5])
def test_stochastic_rounding_is_unbiased(base: float, share: float) -> None:
    low = torch.tensor(base).to(BF16)
    high = torch.nextafter(low, torch.tensor(torch.inf if base > 0 else -torch.inf, dtype=BF16))
    exact = low.float() + share * (high.float() - low.float())
    n = 40_000
    got = rounded(exact.expand(n).contiguous()).float()
    assert set(got.tolist()) <= {float(low), float(high)}, "only the two neighbours"
    ups = float((got == high.float()).float().mean())
    assert abs(ups - share) <= 5 * (max(share * (1 - share), 0) / n) ** 0.5 + 2**-15


def test_stochastic_rounding_is_drawn_anew_in_each_step_and_by_the_seed() -> None:
    value = torch.full((1000,), 1 + 2.0**-9)
    assert torch.equal(rounded(value), rounded(value))
    assert not torch.equal(rounded(value), rounded(value, step=2)) and not torch.equal(rounded(value), rounded(value, seed=1))


def test_stochastic_rounding_moves_what_nearest_rounding_loses(tmp_path: Path) -> None:
    lr, steps, models = 1e-4, 24, {"fp32": llama().float(), "bf16": llama()}
    before = weights(models["fp32"])
    for name, model in models.items():
        go(Technique(), model, tmp_path / name, data=learnable(), lr=lr, epochs=steps / 6, **(STORED if name == "bf16" else {}))
    ours, want = (
        torch.cat([(p.detach().float() - before[n]).flatten() for n, p in m.named_parameters()]) for m in (models["bf16"], models["fp32"])
    )
    assert {p.dtype for p in models["bf16"].parameters()} == {BF16}
    assert 0.8 < float(ours @ want / (want @ want)) < 1.2, "along the way of the fp32 run it goes as far"


@pytest.mark.parametrize("states", ["fp32", "bf16"])
def test_a_stochastic_run_that_was_resumed_is_bit_equal(states: str, tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"data": rows(24), "epochs": 1, "save_every": 2, "lr": 1e-3, "states": states, **STORED}
    want = weights(go(Technique(), llama(), tmp_path / "a", **knobs).model)
    with pytest.raises(Fatal):
        go(Technique(), llama(), tmp_path / "b", stop=5, **knobs)
    assert same(weights(go(Technique(), llama(), tmp_path / "b", **knobs).model), want)


def test_fp16_weights_as_stored_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp16 weights cannot train as they are stored"):
        go(Technique(), llama("float16"), tmp_path, weights="stored")


def test_stochastic_rounding_of_fp32_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does nothing for fp32 weights"):
        go(Technique(), llama("float32"), tmp_path, **STORED)


def test_fp16_weights_train_in_fp32(tmp_path: Path) -> None:
    outcome = go(Technique(), llama("float16"), tmp_path, data=learnable(), lr=1e-3, epochs=2)
    assert {p.dtype for p in outcome.model.parameters()} == {torch.float32}
    assert outcome.log[-1]["loss"] < outcome.log[0]["loss"]


# ---- optimizers ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 1e-3), ("adafactor", 1e-2), ("sgd", 1e-2)])
def test_every_optimizer_trains(optimizer: str, lr: float, tmp_path: Path) -> None:
    outcome = go(Technique(), llama(), tmp_path, data=learnable(), optimizer=optimizer, lr=lr, epochs=3)
    assert outcome.log[-1]["loss"] < outcome.log[0]["loss"] - 0.1


def test_an_unknown_optimizer_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown optimizer 'adamv'") as error:
        go(Technique(), llama(), tmp_path, optimizer="adamv")
    assert "adamw" in str(error.value)


# ---- sight -----------------------------------------------------------------------------------------------------------------
def test_a_diverging_run_is_stopped_and_its_states_are_kept(tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"data": learnable(), "lr": 3.0, "epochs": 2, "save_every": 1, "divergence": 1.5}
    with pytest.raises(UserError, match=r"training diverges: the smoothed loss rose from [\d.]+ to [\d.]+ by step \d+") as stopped:
        go(Technique(), model_of("llama"), tmp_path, **knobs)
    states = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert states and all(name in str(stopped.value) for name in states)
    assert go(Technique(), model_of("llama"), tmp_path / "on", **{**knobs, "divergence": 0.0}).log[-1]["step"] == 12


def test_the_log_has_loss_rate_norm_and_speed_of_each_step(tmp_path: Path) -> None:
    outcome = go(Technique(), model_of("llama"), tmp_path, data=learnable(), lr=1e-3, schedule="linear", epochs=2)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == outcome.log and [row["step"] for row in lines] == list(range(1, 13))
    for row in lines:
        assert row["loss"] > 0 and row["grad_norm"] > 0 and row["tokens_per_second"] > 0
    assert [row["lr"] for row in lines] == pytest.approx([1e-3 * (1 - k / 12) for k in range(12)])
    assert lines[-1]["tokens"] == 2 * 24 * 16


def test_the_log_is_continued_when_a_run_is_resumed(tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"data": rows(24), "epochs": 1, "save_every": 3, "lr": 1e-3, "schedule": "linear"}
    go(Technique(), model_of("llama"), tmp_path / "a", **knobs)
    with pytest.raises(Fatal):
        go(Technique(), model_of("llama"), tmp_path / "b", stop=5, **knobs)
    go(Technique(), model_of("llama"), tmp_path / "b", **knobs)
    a, b = ([json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in "ab")
    same_in_both = ("step", "loss", "lr", "grad_norm", "tokens")
    assert [[row[k] for k in same_in_both] for row in a] == [[row[k] for k in same_in_both] for row in b]
