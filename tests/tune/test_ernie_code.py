"""tune.ernie_code: what is hidden and what is translated, in which shares, and what comes out."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import modelwright
from families import model_of
from modelwright.core.data.rows import IGNORE
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train, build
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.testing import made
from modelwright.tune.ernie_code import ErnieCode, Knobs, Mixture
from modelwright.tune.hft import Hft
from modelwright.tune.hft import Knobs as HftKnobs
from modelwright.tune.spans.corpora import read_pairs
from modelwright.tune.spans.corrupt import reconstruct
from modelwright.tune.spans.tasks import score
from small import Fatal, far, go, same, weights

SHORT = {"epochs": 1, "batch": 8, "context": 48, "lr": 1e-2, "warmup": 0.0, "eval_every": 50, "record": False}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return made("translations", tmp_path_factory.mktemp("languages"))


def parts(given: dict[str, Any], what: str = "both") -> dict[str, Any]:
    return {k: v for k, v in given.items() if k in (("mono", "pairs") if what == "both" else (what,))}


def ready(given: dict[str, Any], what: str = "both", context: int = 48, **knobs: Any) -> tuple[ErnieCode, Any, Mixture, Any]:
    """The technique, the model, the objective and the rows."""
    technique = ErnieCode(build(Knobs, parts(given, what) | knobs))
    source, train = Checkpoint(given["base"]), Train(context=context)
    model, tokenizer = source.model(torch.float32), source.tokenizer()
    objective = technique.objective(model, tokenizer, train, 0)
    rows = technique.rows(Data(), tokenizer, int(model.config.vocab_size), train, 0)
    technique.objective = lambda *a: objective  # type: ignore[method-assign]
    return technique, model, objective, rows


# ---- batches -----------------------------------------------------------------------------------------------------------
def test_texts_are_corrupted_anew_in_each_step_and_can_be_put_together(given: dict[str, Any]) -> None:
    technique, _, objective, rows = ready(given, "mono")
    batch = objective.collate([rows[i] for i in range(4)])
    seen = []
    for step in (0, 5, 5):
        objective.prepare(batch, step)
        seen.append(batch["input_ids"].clone())
        for i in range(4):
            ids = batch["input_ids"][i][batch["real"][i]].tolist()
            target = batch["labels"][i][batch["labels"][i] != IGNORE].tolist()
            assert ids[-1] == target[-1] == 1, "each side ends with the end token"
            assert reconstruct(ids[:-1], target[:-1], technique._sentinels) == rows[i]["input_ids"][: int(rows[i]["length"])].tolist()
            assert batch["input_ids"].shape[1] <= 48
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])


def test_corruption_depends_on_neither_batch_nor_place(given: dict[str, Any]) -> None:
    _, _, objective, rows = ready(given)
    whole = objective.collate([rows[i] for i in range(6)])
    alone = objective.collate([rows[5]])
    n, m = int(alone["real"].sum()), int((alone["labels"] != IGNORE).sum())
    assert torch.equal(whole["input_ids"][5, :n], alone["input_ids"][0, :n])
    assert torch.equal(whole["labels"][5, 1 : m + 1], alone["labels"][0, 1 : m + 1])
    text = next(rows[i] for i in range(len(rows)) if bool((rows[i]["labels"] == IGNORE).all()))
    again = objective.collate([text | {"example_id": e} for e in range(8)])
    assert len({tuple(r) for r in again["input_ids"].tolist()}) > 4, "a text that is drawn twice is corrupted in two ways"


def test_pairs_are_translated_in_both_directions(given: dict[str, Any]) -> None:
    technique, _, objective, rows = ready(given, "pairs")
    words, told = technique._words, set()
    batch = objective.collate([rows[i] for i in range(len(rows))])
    for i in range(len(rows)):
        source = words.decode(batch["input_ids"][i][batch["real"][i]], skip_special_tokens=True)
        target = words.decode(batch["labels"][i][batch["labels"][i] != IGNORE], skip_special_tokens=True)
        told.add((source.replace("\n ", "\n"), target))
    table = [json.loads(line) for line in Path(given["pairs"]["en-de"]).read_text().splitlines()]
    squeezed = {(a.replace(" ", ""), b) for a, b in told}
    for r in table:
        for a, b, name in (("en", "de", "translate English to German: \n"), ("de", "en", "translate German to English: \n")):
            assert ((name + r[a]).replace(" ", "").replace(":", ""), r[b]) in squeezed, "the tokenizer has no colon"


def test_concatenated_pairs_are_one_text_with_hidden_spans(given: dict[str, Any]) -> None:
    technique, _, objective, rows = ready(given, "pairs", form="concatenated")
    assert all(bool((rows[i]["labels"] == IGNORE).all()) for i in range(len(rows)))
    ids = rows[0]["input_ids"][: int(rows[0]["length"])].tolist()
    assert ids.count(1) == 1, "an end token stands between source and target"
    batch = objective.collate([rows[0]])
    assert int(torch.isin(batch["input_ids"], torch.tensor(technique._sentinels)).sum()) >= 1


def test_shares_are_those_of_tokens_and_the_pivot_counts_once(given: dict[str, Any]) -> None:
    technique, _, _, rows = ready(given, alpha=1.0, parallel=0.25)
    told = technique.facts()["shares of tokens"]
    assert sum(told.values()) == pytest.approx(1) and told["pairs en-de"] == pytest.approx(0.25)
    lengths = [int(rows[i]["length"]) for i in range(len(rows))]
    learnt = [bool((rows[i]["labels"] != IGNORE).any()) for i in range(len(rows))]
    drawn = sum(n for n, pair in zip(lengths, learnt, strict=True) if pair) / sum(lengths)
    assert drawn == pytest.approx(0.25, abs=0.06)
    assert ready(given, alpha=0.0)[0].facts()["shares of tokens"]["text en"] == pytest.approx(0.25)


# ---- training ----------------------------------------------------------------------------------------------------------
def trained(given: dict[str, Any], folder: Path, stop: int | None = None, *more: Any, **train: Any) -> Any:
    technique, model, _, rows = ready(given)
    for module in model.modules():  # passes are compared
        for name in ("p", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    before = weights(model)
    try:
        go([technique, *more], model, folder, rows, stop, **{"batch": 8, "optimizer": "sgd", "lr": 0.05, "eval_every": 50, **train})
    except Fatal:
        return None
    return weights(model), before


@pytest.mark.slow
def test_accumulated_and_resumed_runs_are_the_whole_one(given: dict[str, Any], tmp_path: Path) -> None:
    whole = trained(given, tmp_path / "a", save_every=2)[0]
    assert far(trained(given, tmp_path / "b", batch=4, accumulate=2)[0], whole) < 1e-5
    assert trained(given, tmp_path / "c", 3, save_every=2) is None
    assert same(trained(given, tmp_path / "c", save_every=2)[0], whole)


def test_goes_with_half_fine_tuning(given: dict[str, Any], tmp_path: Path) -> None:
    after, before = trained(given, tmp_path / "a", None, Hft(HftKnobs()))
    still = sum(torch.equal(after[n], before[n]) for n in after if n in before and before[n].shape == after[n].shape)
    assert 0 < still < len(after)


def test_run_saves_tokens_scores_tasks_and_begins_new_rows_at_the_mean(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_text(json.dumps({"prompt": "translate English to German: \nThe boat", "completion": "Taob"}) + "\n")
    tasks = {"en to de": str(tmp_path / "task.jsonl")}
    done = modelwright.run("tune.ernie_code", base=given["base"], to=tmp_path / "out", train=SHORT, tasks=tasks, beams=2, **parts(given))
    facts = done.steps[0]["facts"]["ernie_code"]
    assert facts["en to de"].keys() == {"bleu", "chrf", "exact", "pairs"}
    saved, old = Checkpoint(done.to), Checkpoint(given["base"])
    assert len(saved.tokenizer()) == len(old.tokenizer()) + 5 == saved.model().get_input_embeddings().weight.shape[0]
    assert saved.tokenizer().decode(saved.tokenizer()("a\n\tb")["input_ids"]).count("\n") == 1


def test_new_rows_begin_at_the_mean(given: dict[str, Any]) -> None:
    technique, model, _, _ = ready(given)
    old = model.get_input_embeddings().weight.detach().clone()
    technique.attach(model, None)
    new = model.get_input_embeddings().weight
    assert torch.equal(new[: len(old)], old) and len(new) == len(old) + 5
    assert torch.allclose(new[len(old) :], old.mean(0).expand(5, -1), atol=1e-6)


def test_scores_are_sacrebleu_s() -> None:
    assert score(["the cat sat on the mat"], ["the cat sat on the mat"])["bleu"] == pytest.approx(100)
    half = score(["a", "b"], ["a", "c"])
    assert half["exact"] == 50 and 0 < half["chrf"] < 100


# ---- reading and refusals ----------------------------------------------------------------------------------------------
def test_parallel_files_are_read_line_by_line_gzipped_too(tmp_path: Path) -> None:
    for lang, lines in (("en", "one\ntwo\n\nfour\n"), ("de", "eins\nzwei\ndrei\nvier\n")):
        (tmp_path / f"x.{lang}.gz").write_bytes(gzip.compress(lines.encode()))
    found = read_pairs(Data(path=str(tmp_path / "x.{lang}.gz")), "en", "de")
    assert found == [("one", "eins"), ("two", "zwei"), ("four", "vier")]
    (tmp_path / "x.de.gz").write_bytes(gzip.compress(b"eins\n"))
    with pytest.raises(UserError, match="4 lines of en and 1 of de"):
        read_pairs(Data(path=str(tmp_path / "x.{lang}.gz")), "en", "de")


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"mono": {}, "pairs": {}}, "nothing to learn from"),
        ({"pairs": {"de-fr": "x.jsonl"}}, "goes through the pivot en"),
        ({"pairs": {"en": "x.jsonl"}}, "names two languages"),
        ({"pairs": {"en-fr": "PAIRS"}}, "no columns en and fr"),
        ({"data": "x.jsonl"}, "data is given"),
        ({"train": {"context": 4}}, "no pair of en-de fits"),
        ({"density": 0.0}, "out of range"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(knobs: dict[str, Any], words: str, given: dict[str, Any], tmp_path: Path) -> None:
    table = given["pairs"]["en-de"]
    knobs = json.loads(json.dumps(knobs).replace("PAIRS", table).replace("x.jsonl", table))
    with pytest.raises(UserError, match=words) as caught:
        modelwright.run("tune.ernie_code", base=given["base"], to=tmp_path / "out", **{**parts(given), **knobs})
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_other_models_and_tokenizers_are_refused(given: dict[str, Any]) -> None:
    technique = ErnieCode(build(Knobs, parts(given)))
    with pytest.raises(UserError, match="does not fit Llama"):
        technique.objective(model_of("llama"), object(), Train(), 0)
    import tiny_t5

    with pytest.raises(UserError, match="no sentinels"):
        technique.objective(model_of("t5"), tiny_t5.tokenizer_of(["a b"] * 3, vocab=40), Train(), 0)
