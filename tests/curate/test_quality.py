"""Quality: features mean what they say, a learner is judged on texts it did not see, thresholds say what they remove."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.curate import quality as module
from modelwright.curate.kernels.features import features
from modelwright.curate.quality import Knobs
from modelwright.curate.web import Knobs as WebKnobs
from modelwright.curate.web import web
from modelwright.testing import made

TEXTS = [
    "",
    "A lamp, a wick and 2 lenses.\nSee https://a.org/x now! &nbsp and nbsp; but &nbsp; is whole",
    "Ünïcode wörds 😀 漢字 ٣ end…\n\n- a point\n- a point",
    "lamp the oil lamp oil lamp of oil",
    "a" * 60 + "     \t b",
]


@pytest.mark.parametrize("i", range(len(TEXTS)))
def test_shares_of_characters_are_those_of_a_count(i: int) -> None:
    text, found = TEXTS[i], {k: float(v[i]) for k, v in features(TEXTS).items()}
    n = max(len(text), 1)
    for name, kind in (("letters", "L"), ("digits", "N"), ("punctuation", "P")):
        assert found[name] == pytest.approx(sum(unicodedata.category(c)[0] == kind for c in text) / n)
    assert found["spaces"] == pytest.approx(sum(c.isspace() for c in text) / n)
    assert found["line_breaks"] == pytest.approx(text.count("\n") / n)
    assert found["code_point_deviation"] == pytest.approx(float(np.std([ord(c) for c in text])) if text else 0.0)
    assert found["characters"] == len(text)


def test_other_features_by_hand() -> None:
    found = features(TEXTS)
    assert found["urls"][1] == pytest.approx(15 / len(TEXTS[1])) and found["entity_residue"].tolist() == [0, 2, 0, 0, 0]
    assert found["emoji"][2] == pytest.approx(1 / len(TEXTS[2])) and found["longest_run_of_spaces"][4] == 5
    assert found["unique_words"][3] == 4 / 8 and found["words_per_line"][3] == 8 and found["bullet_lines"][2] == pytest.approx(2 / 3)
    assert found["stop_word_share"][3] == 2 / 8
    assert found["top_2_gram"][3] == pytest.approx(3 * len("lamp oil") / len(TEXTS[3])), "stop words between lamp and oil are out"


def test_a_document_has_the_same_features_in_every_batch_and_all_are_numbers() -> None:
    whole = features(TEXTS)
    for i, text in enumerate(TEXTS):
        for name, value in features([text]).items():
            assert value[0] == pytest.approx(whole[name][i], rel=1e-12) and np.isfinite(value[0])
    assert all(float(v[0]) == 0 for v in whole.values()), "0 / 0 is 0"
    assert len(whole) >= 30


def quality(knobs: Knobs, folder: Path) -> dict[str, Any]:
    found = module.quality(knobs, folder)
    assert all(len(row) == len(t["columns"]) for t in found.tables for row in t["rows"])
    return found.metrics


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def graded(folder: Path) -> dict[str, Any]:
    return {k: v if k == "labelled" else Data(v) for k, v in made("graded", folder / "data").items()}


def test_a_learner_keeps_the_good_and_the_table_is_true(tmp_path: Path) -> None:
    knobs = graded(tmp_path) | {"learner": "LogisticRegression", "settings": {"max_iter": 2000}}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    facts = quality(Knobs(**knobs), tmp_path / "a")
    kept, removed = rows(tmp_path / "a" / "dataset.jsonl"), rows(tmp_path / "a" / "removed.jsonl")
    assert facts["held-out AUC"] == 1.0 and {r["label"] for r in kept} == {1}
    assert facts["kept"] + facts["removed"] == facts["documents"] == len(kept) + len(removed)
    assert [(r["row"], r["reason"]) for r in removed] == [(i, "quality") for i in range(0, 2 * len(kept), 2)]
    assert min(r["quality_score"] for r in kept) >= 0.59 and "quality_letters" in kept[0]
    table = facts["thresholds"]["quality"]
    share = [r["removed"] for r in table]
    assert share == sorted(share) and {r["threshold"]: r["removed"] for r in table}[0.59] == facts["removed"] / facts["documents"]
    assert all(0 <= r["good kept"] <= 1 for r in table) and table[4]["good kept"] == table[4]["bad removed"] == 1.0
    assert len(facts["examples"]["quality"]["below"]) == 3 and facts["examples"]["quality"]["above"][0][:2] in ("0.", "1.")
    quality(Knobs(**knobs), tmp_path / "b")
    assert (tmp_path / "a" / "dataset.jsonl").read_bytes() == (tmp_path / "b" / "dataset.jsonl").read_bytes()


def test_a_learner_is_judged_on_texts_that_it_did_not_see(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["lamp", "oil", "wick", "keeper", "2"], 20)) for _ in range(80)]
    file = tmp_path / "chance.jsonl"
    file.write_text("".join(json.dumps({"text": t, "label": int(rng.integers(2))}) + "\n" for t in texts))
    facts = quality(Knobs(data=Data(str(file)), labelled=str(file), learner="DecisionTreeClassifier"), tmp_path)
    assert abs(facts["held-out AUC"] - 0.5) < 0.2, "labels by chance cannot be learnt, though the tree knows them by heart"
    assert facts["removed"] == sum(1 - r["label"] for r in rows(file))


def test_without_a_learner_columns_are_written_and_nothing_is_removed(tmp_path: Path) -> None:
    facts = quality(Knobs(data=graded(tmp_path)["data"]), tmp_path)
    assert facts["removed"] == 0 and facts["thresholds"] == {} and "quality_entropy" in rows(tmp_path / "dataset.jsonl")[0]


def test_scores_without_a_cut(tmp_path: Path) -> None:
    facts = quality(Knobs(**graded(tmp_path), learner="GaussianNB", drop=False, columns=False), tmp_path)
    assert facts["removed"] == 0 and facts["first reasons"]["quality"] == len(rows(tmp_path / "removed.jsonl")) > 0
    assert set(rows(tmp_path / "dataset.jsonl")[0]) == {"text", "label", "quality_score"}


def test_a_classifier_of_transformers_is_a_plug_in(tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "the": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(tmp_path / "m")
    config = BertConfig(
        vocab_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16,
        id2label={0: "poor", 1: "fluent"}, label2id={"poor": 0, "fluent": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    torch.nn.init.zeros_(model.classifier.weight)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    model.save_pretrained(tmp_path / "m")
    data = graded(tmp_path)["data"]
    for limit, kept in ((0.7, "all"), (0.8, "none")):
        plug = {"fluent": {"model": str(tmp_path / "m"), "label": "fluent", "limit": limit}}
        facts = quality(Knobs(data=data, classifiers=plug), tmp_path)
        assert facts["kept"] == (facts["documents"] if kept == "all" else 0)
        assert facts["thresholds"]["fluent"][-1] == {"threshold": 0.9, "removed": 1.0}, "all have e / (1 + e) = .731"


def test_it_is_the_last_stage_of_the_funnel(tmp_path: Path) -> None:
    files = graded(tmp_path)
    own = {"labelled": files["labelled"], "learner": "GaussianNB"}
    (out := tmp_path / "out").mkdir()
    facts = web(WebKnobs(data=files["data"], stages=["rules", "quality"], rules={"use": []}, quality=own), out)
    last = facts["funnel"][-1]
    assert (last["stage"], last["before"], last["after"]) == ("quality", facts["rules"]["kept"], len(rows(out / "dataset.jsonl")))
    assert last["before"] - last["after"] == len(rows(out / "removed-quality.jsonl")) > 0


@pytest.mark.parametrize(
    ("change", "say"),
    [
        ({"learner": "Ridge"}, "no classifier with probabilities"),
        ({"learner": "no_module:X"}, "cannot be imported"),
        ({"settings": {"lerning_rate": 1}}, "no setting 'lerning_rate'; did you mean 'learning_rate'"),
        ({"learner": "LogisticRegression", "settings": {"C": -1.0}}, "LogisticRegression cannot be fitted"),
        ({"label": "lable"}, "has no column 'lable'; did you mean 'label'"),
        ({"label": "text"}, "two are needed"),
        ({"classifiers": {"fluent": "x"}}, "names no model"),
    ],
)
def test_what_cannot_work_is_one_sentence(tmp_path: Path, change: dict[str, Any], say: str) -> None:
    with pytest.raises(UserError, match=say):
        quality(Knobs(**graded(tmp_path) | change), tmp_path)
    assert not (tmp_path / "dataset.jsonl").exists()


def test_too_few_labels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text("text,label\n" + "a,good\n" * 9 + "b,bad\n" * 4)
    with pytest.raises(UserError, match="fewer than 5 texts of a label"):
        quality(Knobs(**graded(tmp_path) | {"labelled": str(tmp_path / "few.csv")}), tmp_path)
