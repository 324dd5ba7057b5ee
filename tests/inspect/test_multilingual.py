"""The multilingual report: what it measures on real models, and each fault in one sentence."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.inspect.languages import texts
from modelwright.inspect.languages.tokens import premiums, token_costs
from modelwright.inspect.languages.vectors import Reader
from modelwright.runner.run import run
from modelwright.testing import made, write_jsonl


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return made("languages", tmp_path_factory.mktemp("languages"))


@pytest.fixture(scope="module")
def report(given: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result = run("inspect.multilingual", base="seedling", to=tmp_path_factory.mktemp("report") / "out", **given)
    assert len((result.to / "report.html").read_text()) > 10_000
    return result.steps[0]


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(Checkpoint("seedling"))


class _Words:
    """A tokenizer of numbers for models without one."""

    bos_token_id, eos_token_id, mask_token_id, unk_token_id = 1, 2, 90, 3
    all_special_ids = [1, 2, 90]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [5 + sum(map(ord, w)) % 80 for w in text.split()]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def _reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda self: _Words())
    return Reader(Checkpoint(folder))


# ---- the report -----------------------------------------------------------------------------------------------------------
def test_every_layer_has_every_measure(report: dict[str, Any]) -> None:
    metrics = report["metrics"]
    assert len(metrics["layers"]) == 5 and metrics["sentences"] == 24 and metrics["split"] == "test"
    for at in metrics["layers"]:
        assert set(at["cka"]) == {"de", "fr"} and set(at["anisotropy"]) == {"en", "de", "fr"}
        assert 0 <= at["language_probe"] <= 1 and all(0 <= v <= 1 for v in at["precision_at_1"].values())
    assert metrics["tokenizer"]["en"]["premium"] == 1 and metrics["tokenizer"]["fr"]["premium"] > 1


def test_taking_the_language_out_blinds_the_probe_and_costs_loss(report: dict[str, Any]) -> None:
    found = report["metrics"]["without_language"]
    assert found["as it is"]["language_probe"] == 1
    assert all(found[way]["language_probe"] < 0.7 for way in ("INLP", "LEACE", "centred"))
    assert all(found[way]["loss"] > found["as it is"]["loss"] for way in ("INLP", "LEACE")) and found["INLP"]["rounds"] >= 1


def test_bias_is_measured_with_its_uncertainty(report: dict[str, Any]) -> None:
    crows, seat = report["metrics"]["crows_pairs"], report["metrics"]["seat"]["things"]
    assert crows["pairs"] == 11 == crows["by_group"]["thing"]["pairs"] and crows["interval"][0] <= crows["stereotype_preferred"]
    assert seat["exact"] and len(seat["by_layer"]) == 5 and seat["effect"] == seat["by_layer"][2]
    assert abs(seat["after LEACE"]) < max(abs(seat["effect"]), 0.3)


def test_balance_of_a_corpus_needs_no_checkpoint(tmp_path: Path) -> None:
    rows = [{"text": "x" * n, "language": k} for k, n in (("en", 900), ("de", 90), ("yo", 10))]
    result = run("inspect.multilingual", data=write_jsonl(tmp_path / "corpus.jsonl", rows), epochs=2.0)
    found = result.steps[0]["metrics"]["balance"]
    assert found["sizes"] == {"de": 90, "en": 900, "yo": 10} and found["unimax_epochs"]["yo"] == 2
    assert found["sampling"]["0.0"] == pytest.approx(dict.fromkeys(("de", "en", "yo"), 1 / 3))


# ---- what a model is asked -------------------------------------------------------------------------------------------------
def test_pooled_states_do_not_depend_on_the_batch(reader: Reader) -> None:
    sentences = ["One.", "A somewhat longer sentence stands here.", "Two words."]
    together = reader.pooled(sentences)
    alone = np.concatenate([reader.pooled([s]) for s in sentences], 1)
    assert together.shape[:2] == (5, 3) and np.allclose(together, alone, atol=1e-5)


def test_likelihoods_are_sums_over_a_sentences_own_tokens(reader: Reader) -> None:
    sentences = ["One.", "A somewhat longer sentence stands here."]
    for text, found in zip(sentences, reader.likelihoods(sentences), strict=True):
        ids = torch.tensor([reader.ids(text)])
        with torch.no_grad():
            loss = reader.model(input_ids=ids, labels=ids).loss
        assert found == pytest.approx(-float(loss) * (ids.shape[1] - 1), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "bert", "t5", "mixtral"])
def test_models_of_all_kinds_are_read(kind: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = _reader(tiny(kind), monkeypatch)
    assert reader.kind == {"bert": "masked", "t5": "pair"}.get(kind, "causal")
    found = reader.pooled(["one two", "three four five"])
    assert found.shape[:2] == (3, 2) and np.isfinite(found).all()


def test_bf16_weights_are_read_in_fp32(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = _reader(tiny("llama", dtype="bfloat16"), monkeypatch)
    assert reader.model.dtype == torch.float32


def test_masked_models_are_scored_on_what_both_sentences_share(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = _reader(tiny("bert"), monkeypatch)
    more, less = reader.pair_likelihoods("a b c d", "a b x d")
    back = reader.pair_likelihoods("a b x d", "a b c d")
    assert back == (pytest.approx(less), pytest.approx(more)) and more != less
    row, total = reader.ids("a b c d"), 0.0
    for place in (1, 2, 4):  # a, b and d; c is not shared
        masked = [*row[:place], 90, *row[place + 1 :]]
        with torch.no_grad():
            total += float(reader.model(input_ids=torch.tensor([masked])).logits[0, place].log_softmax(-1)[row[place]])
    assert more == pytest.approx(total, rel=1e-4)


def test_token_costs_are_counts(reader: Reader) -> None:
    costs = {"en": token_costs(reader.tokenizer, ["two words"]), "de": token_costs(reader.tokenizer, ["two words two words"])}
    assert costs["en"]["words"] == 2 and costs["en"]["bytes"] == 9 and costs["en"]["not_the_same_when_decoded"] == 0
    assert costs["en"]["fertility"] == costs["en"]["tokens"] / 2
    assert premiums(costs, "en") == {"en": 1.0, "de": costs["de"]["tokens"] / costs["en"]["tokens"]}


# ---- what is read ------------------------------------------------------------------------------------------------------------
def test_parallel_files_plain_or_gz_give_the_smallest_split_with_most_languages(tmp_path: Path) -> None:
    long = "\n".join(f"line {i}" for i in range(40)) + "\n"
    for name in ("train.en", "train.de", "test.en", "small.en", "small.fr"):
        (tmp_path / name).write_text(long[:200] + long if name.startswith("train") else long)
    for name in ("test.de.gz", "test.fr.gz"):
        with gzip.open(tmp_path / name, "wt") as file:
            file.write(long)
    split, of = texts.parallel(tmp_path, "", "en", 30)
    assert split == "test" and set(of) == {"en", "de", "fr"} and len(of["fr"]) == 30
    assert texts.parallel(tmp_path, "small", "fr", 25)[0] == "small"


def _fault(tmp_path: Path, files: dict[str, str], sentence: str, **knobs: Any) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=sentence):
        run("inspect.multilingual", base="seedling", parallel=str(tmp_path), **knobs)


LINES = "".join(f"a line {i}\n" for i in range(25))


@pytest.mark.parametrize(
    ("files", "knobs", "sentence"),
    [
        ({"t.en": LINES, "t.de": LINES + "more\n"}, {}, "t.de has 26 lines and .*t.en 25"),
        ({"t.en": LINES, "t.de": "...\n" * 25}, {}, "t.de has no words"),
        ({"t.en": LINES, "t.de": "\n" * 25}, {}, "t.de has no words|de has no text"),
        ({"t.en": "few\n", "t.de": "few\n"}, {}, "has 1 sentences in all languages"),
        ({"t.fr": LINES, "t.de": LINES}, {}, "no parallel text with en"),
        ({"t.en": LINES, "t.de": LINES}, {"split": "u"}, "no split 'u' with en, because it has t"),
        ({"t.en": LINES, "t.de": LINES}, {"layer": 9}, "layer=9 but the model has 4 blocks"),
    ],
    ids=lambda v: str(v)[-30:],
)
def test_bad_parallel_text_is_one_sentence(tmp_path: Path, files: dict[str, str], knobs: dict[str, Any], sentence: str) -> None:
    _fault(tmp_path, files, sentence, **knobs)


def test_other_bad_input_is_one_sentence(tmp_path: Path, given: dict[str, str]) -> None:
    broken = tmp_path / "x.json"
    broken.write_text(json.dumps({"targ1": {}}))
    for knobs, sentence in (
        ({}, "nothing to look at"),
        ({"crows": given["crows"]}, "no checkpoint was given"),
        ({"data": write_jsonl(tmp_path / "d.jsonl", [{"text": "x"}])}, "row 1 of .* has no text in 'language'"),
        ({"base": "seedling", "seat": str(broken)}, "x.json is no WEAT set"),
        ({"base": "seedling", "stereoset": str(broken)}, "is no StereoSet"),
        ({"base": "seedling", "crows": write_jsonl(tmp_path / "c.jsonl", [{"sent_more": "x"}])}, "row 1 of .* has no 'sent_less'"),
        ({"base": "seedling", "parallel": str(tmp_path / "none")}, "no folder at"),
    ):
        with pytest.raises(UserError, match=sentence):
            run("inspect.multilingual", **knobs)


def test_stereoset_is_read_and_scored(tmp_path: Path) -> None:
    labels = ("stereotype", "anti-stereotype", "unrelated")
    sentences = [{"sentence": f"It is {w}.", "gold_label": k} for k, w in zip(labels, ("here", "there", "xqzt"), strict=True)]
    file = tmp_path / "dev.json"
    file.write_text(json.dumps({"data": {"intrasentence": [{"sentences": sentences}]}}))
    found = run("inspect.multilingual", base="seedling", stereoset=str(file)).steps[0]["metrics"]["stereoset"]
    assert found["triples"] == 1 and found["icat"] == found["lms"] * min(found["ss"], 100 - found["ss"]) / 50


# ---- real data --------------------------------------------------------------------------------------------------------------
def test_the_real_sets_are_read_whole(shared: Path) -> None:
    with open(shared / "crows_pairs" / "crows_pairs_anonymized.csv", newline="") as file:
        want = len(list(csv.DictReader(file)))
    assert len(texts.crows_pairs(shared / "crows_pairs")) == want == 1508
    assert len(texts.word_sets(shared / "seat")) == 46
    assert {k: len(v) for k, v in texts.stems(shared / "multi30k").items()}["train"] == 4
