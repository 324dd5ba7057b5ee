"""tune.dpo: TRL's losses on real pairs, ln 2 at the start, a reference computed once, the same step however it is cut up."""

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import modelwright
from families import model_of
from modelwright.core.data.make import make_rows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train.loop import fit
from modelwright.tune.dpo import Dpo, Knobs, Preferences, ReferencedRows, preference_loss, reference_of
from modelwright.tune.hft import Hft
from modelwright.tune.hft import Knobs as HftKnobs
from modelwright.tune.lora import Knobs as LoraKnobs
from modelwright.tune.lora import Lora
from modelwright.tune.migu import Knobs as MiguKnobs
from modelwright.tune.migu import Migu

PAIRS = [{"prompt": f"Say {w}.\nAnswer:", "chosen": f" {w}", "rejected": " I would rather not"} for w in ("apple", "boat", "cloud", "drum")]
PAIRS += [{"prompt": f"Count {i}:", "chosen": f" {i} {i + 1}", "rejected": " no"} for i in range(3)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MODELWRIGHT_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "rows"


def write(folder: Path, pairs: list[dict[str, Any]]) -> str:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    return str(folder / "pairs.jsonl")


def ready(base: Any, data: str, context: int = 64, model: Any = None, **knobs: Any) -> tuple[Any, Dpo, Preferences, Any]:
    """Model, technique, objective and rows, as a step makes them."""
    technique = Dpo(Knobs(**knobs))
    technique.source = Checkpoint(base)
    model, tokenizer = model or technique.source.model(torch.float32), technique.source.tokenizer()
    train = Train(context=context, batch=2)
    objective = technique.objective(model, tokenizer, train, 0)
    return model, technique, objective, technique.rows(Data(path=data), tokenizer, len(tokenizer), train, 0)


def moved(model: Any) -> Any:
    """The model with its weights a little off."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.02 * p.std())
    return model


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight real pairs that fit the context of the small checkpoint."""
    found = []
    with gzip.open(shared / "hh_rlhf" / "harmless-base-test.jsonl.gz", "rt") as f:
        for line in f:
            pair = json.loads(line)
            if max(len(pair["chosen"]), len(pair["rejected"])) < 400:
                found.append(pair)
            if len(found) == 8:
                break
    return write(tmp_path_factory.mktemp("hh"), found)


FORMS = [
    ({}, "sigmoid"),
    ({"beta": 0.5}, "sigmoid"),
    ({"loss": "ipo"}, "ipo"),
    ({"loss": "hinge"}, "hinge"),
    ({"per_token": True, "beta": 2.0}, "sigmoid_norm"),
]


def test_the_losses_of_real_pairs_are_trl_s(real: str, stories: Path, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, _, objective, rows = ready(stories, real, 512)
    moved(model).eval()
    tokenizer = Checkpoint(stories).tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=Checkpoint(stories).model(torch.float32),
        args=trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        processing_class=tokenizer,
    )
    trainer.model.eval()
    batch = objective.collate([rows[i] for i in range(len(rows))])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")} | {"completion_mask": batch["answer"].long()}
    for knobs, name in FORMS:
        objective.knobs = Knobs(**knobs)
        found = float(objective.forward(model, batch, torch.ones(len(rows), 1)).total.detach()) / len(rows)
        trainer.loss_types, trainer.beta = [name], objective.knobs.beta
        expected = float(trainer.compute_loss(trainer.model, dict(inputs)).detach())
        rounding = 1e-6 * max(1.0, expected, objective.knobs.beta / 0.1)  # sums of log-probabilities near 1,000 have steps of 6e-5
        assert found == pytest.approx(expected, abs=rounding), name


def test_label_smoothing_and_lengths_are_as_written() -> None:
    ratios, lengths = torch.randn(6), torch.tensor([3, 4, 5, 6, 7, 8])
    h = ratios[:3] - ratios[3:]
    loss, _ = preference_loss(ratios, lengths, Knobs(beta=0.2, label_smoothing=0.1))
    assert torch.allclose(loss, -0.9 * torch.log(torch.sigmoid(0.2 * h)) - 0.1 * torch.log(torch.sigmoid(-0.2 * h)), atol=1e-6)
    per_token = ratios[:3] / lengths[:3] - ratios[3:] / lengths[3:]
    assert torch.allclose(preference_loss(ratios, lengths, Knobs(per_token=True))[1], per_token)
    assert torch.allclose(preference_loss(ratios, lengths, Knobs(loss="ipo"))[0], (per_token - 5) ** 2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
def test_chunks_of_the_head_give_the_gradient_of_whole_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelwright.tune.dpo._CHUNK", 96 * 5)  # five tokens at a time
    row = lambda n, k: {  # noqa: E731
        "chosen": torch.randint(3, 90, (n,)), "rejected": torch.randint(3, 90, (n + 2,)), "chosen_from": k, "rejected_from": k,
        "length": torch.tensor(n + 2), "example_id": n, "reference": torch.tensor([-9.0, -8.0]),
    }  # fmt: skip
    rows, grads, totals = [row(7, 3), row(9, 4), row(5, 2)], [], []
    for whole in (False, True):
        model = model_of(family)
        objective = Preferences(model, None, 0, Knobs(beta=0.5))
        objective.whole_logits = whole
        objective.install(model)
        assert (objective.head is None) == whole
        total = objective.forward(model, objective.collate(rows), torch.ones(3, 1)).total
        total.backward()
        objective.remove()
        totals.append(float(total.detach()))
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    assert all(torch.allclose(g, grads[1][n], atol=1e-4, rtol=1e-3) for n, g in grads[0].items())


def test_the_loss_starts_at_ln_2_and_falls_and_the_reference_is_computed_once(tmp_path: Path, cache: Path) -> None:
    data = write(tmp_path, [*PAIRS, PAIRS[0] | {"rejected": PAIRS[0]["chosen"]}])
    settings: dict[str, Any] = {
        "base": "seedling", "data": data, "train": {"epochs": 6, "batch": 4, "context": 64, "lr": 1e-3, "warmup": 0.0, "record": False},
        "save": {"certificate": "structure"}, "holdout": 0.3,
    }  # fmt: skip
    first = modelwright.run("tune.dpo", to=tmp_path / "a", **settings)
    evals = first.plain()["steps"][-1]["evals"]
    assert evals[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert evals[-1]["loss"] < 0.6 and evals[-1]["accuracy"] == 1.0 and evals[-1]["margin"] > 0.1
    facts = first.plain()["steps"][-1]["facts"]
    assert facts["data"]["left out: chosen and rejected are equal"] == 1
    assert facts["dpo"] == {"reference log-probabilities computed": 14, "found on disk": 0}
    assert [f.suffix for f in cache.glob("reference-*")] == [".npy"], "nothing half-written is left"
    again = modelwright.run("tune.dpo", to=tmp_path / "b", **settings, beta=0.2)
    assert again.plain()["steps"][-1]["facts"]["dpo"] == {"reference log-probabilities computed": 0, "found on disk": 14}


def test_the_kept_reference_belongs_to_model_and_pairs(tmp_path: Path, cache: Path, stories: Path) -> None:
    data = write(tmp_path, PAIRS)
    first = ready("seedling", data)[3].reference
    assert torch.equal(ready("seedling", data)[3].reference, first) and len(list(cache.glob("reference-*"))) == 1
    ready("seedling", write(tmp_path, [*PAIRS[:-1], PAIRS[0] | {"chosen": " pear"}]))
    ready(stories, write(tmp_path, PAIRS))
    assert len(list(cache.glob("reference-*"))) == 3
    other = ready("seedling", data, reference=str(Checkpoint("seedling").folder))[3].reference
    assert torch.allclose(other, first, atol=1e-4)
    with pytest.raises(UserError, match="has another vocabulary"):
        ready("seedling", data, reference=str(stories))


def test_dropout_is_off_so_that_the_reference_is_the_model_itself(tmp_path: Path) -> None:
    model = model_of("gpt2", resid_pdrop=0.5, attn_pdrop=0.5)
    Dpo(Knobs()).objective(model, None, Train(), 0)
    ids = torch.arange(3, 9)[None]
    assert torch.equal(model.train()(ids).logits, model(ids).logits)


def rows_for(model: Any, tmp_path: Path, n: int = 6) -> ReferencedRows:
    """Pairs of token ids of a tiny model behind its own log-probabilities."""
    tokenizer = Checkpoint("seedling").tokenizer()
    made = make_rows(Data(path=write(tmp_path, PAIRS[:n])), tokenizer, len(tokenizer), 64, kind="ranked")
    for i in range(n):  # as ids of a vocabulary of 96
        row = made[i]
        row |= {k: row[k] % 90 + 3 for k in ("chosen", "rejected")}
        made.__dict__.setdefault("small", []).append(row)

    class Small(type(made)):  # type: ignore[misc]
        def __getitem__(self, i: int) -> dict[str, Any]:
            return self.small[i]

    made.__class__ = Small
    return ReferencedRows(made, reference_of(model, Preferences(model, None, 0, Knobs()), made, 4))


def run(tmp_path: Path, others: tuple[Any, ...] = (), family: str = "llama", **train: Any) -> tuple[Any, dict[str, Tensor]]:
    model = model_of(family)
    rows = rows_for(model, tmp_path)
    settings = Train(**{"batch": 4, "lr": 1e-3, "warmup": 0.0, "schedule": "constant", "record": False, "optimizer": "sgd"} | train)
    done = fit(model, rows, settings, techniques=[Dpo(Knobs()), *others], evals={}, folder=tmp_path / "run", seed=0,
               objective=Preferences(model, None, 0, Knobs()))  # fmt: skip
    return done, {n: p.detach().clone() for n, p in done.model.named_parameters()}


def test_a_step_is_the_same_accumulated_recomputed_and_filled_up(tmp_path: Path) -> None:
    found = []
    for k, train in enumerate(({"batch": 8}, {"batch": 2, "accumulate": 4}, {"batch": 8, "gradient_checkpointing": True})):
        (tmp_path / str(k)).mkdir()
        found.append(run(tmp_path / str(k), **train)[1])
    for other in found[1:]:
        assert all(torch.allclose(found[0][n], p, atol=1e-6) for n, p in other.items())
    assert any(not torch.equal(p, q) for p, q in zip(found[0].values(), model_of("llama").parameters(), strict=True))


@pytest.mark.parametrize("other", [Lora(LoraKnobs(r=2)), Hft(HftKnobs()), Migu(MiguKnobs())], ids=lambda t: t.name)
def test_ways_to_tune_compose_with_it(other: Any, tmp_path: Path) -> None:
    done, _ = run(tmp_path, (other,), optimizer="adamw", epochs=2)
    assert len(done.liveness) == 2
    model = other.export(done.model, tmp_path)
    before, after = model_of("llama").state_dict(), model.state_dict()
    kept = [n for n in before if torch.equal(before[n], after[n])]
    assert 0 < len(kept) < len(before) or other.name == "migu"


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    for family in ("bert", "t5"):
        with pytest.raises(UserError, match="does not go on with a text"):
            Dpo(Knobs()).objective(model_of(family), None, Train(), 0)
    with pytest.raises(UserError, match="no pairs of answers"):
        ready("seedling", write(tmp_path, [{"text": "once"}]))
    bad = Checkpoint("seedling").model(torch.float32)
    bad.lm_head.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        ready("seedling", write(tmp_path, PAIRS), model=bad)
