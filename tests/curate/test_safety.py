"""Safety: lists match what they mean and nothing else, personal data is masked and lines stay, everything is accounted for."""

import json
import random
from pathlib import Path

import pytest

from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.curate.kernels.lists import Domains, WordList, iban, luhn, mask
from modelwright.curate.safety import Knobs, safety, window

DOMAINS = Domains(
    [
        ("bad.com", "black"),
        ("ok.bad.com", "white"),
        ("co.uk", "black"),
        ("evil.co.uk", "black"),
        ("192.0.2.1", "black"),
        ("bad.com", "gray"),
    ]
)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://bad.com/x", "black"),
        ("https://a.b.BAD.com.", "black"),
        ("http://notbad.com", ""),
        ("http://bad.com.example.org", ""),
        ("http://ok.bad.com/", "white"),
        ("http://deep.ok.bad.com/", "white"),
        ("http://nice.co.uk", ""),
        ("http://a.evil.co.uk:8080/x", "black"),
        ("http://192.0.2.1/a", "black"),
        ("http://192.0.2.10/a", ""),
        ("bad.com/path", "black"),
        ("", ""),
        ("http://[broken", ""),
    ],
)
def test_the_most_specific_entry_decides_and_a_public_suffix_never(url: str, found: str) -> None:
    assert DOMAINS.of(url)[0] == found


def test_words_are_counted_by_level_and_only_whole() -> None:
    words = WordList([("grape", "L1"), ("apple&&&pear", "L2"), ("葡萄", "L3"), ("fig", "L1"), ("red plum", "L4")])
    assert words.ignored == 1, "fig is short"
    assert words.score("Grape, grape; grapes and vineGrape") == (200.0, ["L1"])
    assert words.score("an apple, an apple") == (0.0, [])
    assert words.score("an apple, a pear, an apple") == (15.0, ["L2"])
    assert words.score("x葡萄y RED PLUM fig") == (1.1, ["L3", "L4"])


def test_one_pass_finds_what_a_search_for_each_word_finds() -> None:
    rng = random.Random(0)
    parts = sorted({"".join(rng.choices("ab漢", k=rng.randint(1, 5))) for _ in range(40)} - {""})
    words = WordList([(p + "漢", "L4") for p in parts])
    for _ in range(50):
        text = "".join(rng.choices("ab漢", k=80))
        expected = {e.parts[0]: sum(text.startswith(e.parts[0], i) for i in range(len(text))) for e in words.entries}
        assert words.count(text) == {k: v for k, v in expected.items() if v}


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jo.doe+x@mail.example.org now", "write to <EMAIL> now"),
        ("8.8.8.8 and 192.168.0.1 and 10.0.0.1", "<IP> and 192.168.0.1 and 10.0.0.1"),
        ("version 1.2.3.4.5 or v8.8.8.8", "version 1.2.3.4.5 or v8.8.8.8"),
        ("2001:4860:4860::8888 at 12:30:45", "<IP> at 12:30:45"),
        ("card 4111 1111 1111 1111, order 4111 1111 1111 1112", "card <CARD>, order 4111 1111 1111 1112"),
        ("DE89 3704 0044 0532 0130 00 or DE88 3704 0044 0532 0130 00", "<IBAN> or DE88 3704 0044 0532 0130 00"),
        ("call +49 30 901820 or 2012-01-31", "call <PHONE> or 2012-01-31"),
        ("pi is 3.14159265358979", "pi is 3.14159265358979"),
    ],
)
def test_personal_data_is_masked_and_what_looks_like_it_is_not(text: str, masked: str) -> None:
    assert mask(text)[0] == masked


def test_check_digits() -> None:
    assert (
        luhn("4111111111111111") and not luhn("4111111111111112") and iban("GB82WEST12345698765432") and not iban("GB83WEST12345698765432")
    )


def test_masking_keeps_the_lines_and_twice_is_once() -> None:
    rng = random.Random(0)
    parts = [
        "a@b.org",
        "8.8.8.8",
        "+49 30 901820",
        "4111 1111 1111 1111",
        "\n",
        " ",
        "text",
        "-",
        "1",
        ".",
        "DE89 3704 0044 0532 0130 00",
        "\n\n",
        "<IP>",
    ]
    for _ in range(500):
        text = "".join(rng.choices(parts, k=12))
        once = mask(text)[0]
        assert once.count("\n") == text.count("\n") and mask(once)[0] == once


def test_a_long_document_is_seen_by_its_head_and_its_tail() -> None:
    assert window(list(range(10)), 10, 3) == list(range(10)) and window(list(range(20)), 10, 3) == [0, 1, 2, 3, 4, 5, 6, 17, 18, 19]
    assert window(list(range(20)), 10, 0) == list(range(10)) and window(list(range(20)), 4, 9) == [16, 17, 18, 19]


def test_each_removal_has_a_reason_and_trust_softens_the_words(tmp_path: Path) -> None:
    (tmp_path / "domains.csv").write_text("host,class\nbad.com,black\ngood.org,white\nwell.net,silver\n")
    (tmp_path / "words.csv").write_text("word,level\ngrape,L1\nmelon,L2\nlemon,L3\n")
    rows = [("bad.com", "a grape"), ("x.org", "a grape"), ("x.org", "a melon"), ("x.org", "a lemon, a@b.org"), ("good.org", "a grape")]
    rows += [("well.net", "a melon"), ("well.net", "a grape and a melon"), (None, "nothing")]
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"id": i, "url": u and f"http://{u}/", "text": t}) + "\n" for i, (u, t) in enumerate(rows))
    )
    knobs = Knobs(data=Data(str(tmp_path / "d.jsonl")), domains=str(tmp_path / "domains.csv"), words=str(tmp_path / "words.csv"))
    facts = safety(knobs, tmp_path)
    kept = [json.loads(x) for x in (tmp_path / "dataset.jsonl").read_text().splitlines()]
    removed = {r["row"]: r for r in map(json.loads, (tmp_path / "removed.jsonl").read_text().splitlines())}
    assert [r["id"] for r in kept] == [3, 4, 5, 7] and sorted(removed) == [0, 1, 2, 6]
    assert removed[0]["flags"] == ["domain bad.com", "words L1"] and removed[6]["flags"] == ["words L1"]
    assert facts["kept"] + facts["removed"] == facts["documents"] == 8 and facts["masked"] == {"EMAIL": 1}
    assert kept[0]["text"] == "a lemon, <EMAIL>" and kept[0]["word_score"] == 1.0 and kept[1]["domain_class"] == "white"


def test_a_classifier_is_a_plug_in(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "[PAD]": 1, "good": 2, "bad": 3}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(tmp_path / "m")
    config = BertConfig(
        vocab_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16,
        id2label={0: "clean", 1: "toxic"}, label2id={"clean": 0, "toxic": 1},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "m")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("good " * 40, "bad")))
    data = Data(str(tmp_path / "d.jsonl"))
    for limit, kept in ((1.0, 2), (0.0, 0)):
        tox = {"tox": {"model": str(tmp_path / "m"), "label": "toxic", "limit": limit}}
        assert safety(Knobs(data=data, classifiers=tox, tail=4), tmp_path)["kept"] == kept
    with pytest.raises(UserError, match="no label 'x'"):
        safety(Knobs(data=data, classifiers={"tox": {"model": str(tmp_path / "m"), "label": "x"}}), tmp_path)


def test_what_cannot_work_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "w.csv").write_text("word,level\na,L9\n")
    (tmp_path / "h.csv").write_text("name\na\n")
    data = Data(str(tmp_path / "d.jsonl"))
    for knobs, say in (
        ({"words": str(tmp_path / "w.csv")}, "level 'L9'"),
        ({"domains": str(tmp_path / "h.csv")}, "host,class are needed"),
        ({"domains": str(tmp_path / "none.csv")}, "cannot be read"),
        ({"classifiers": {"tox": {}}}, "names no model"),
    ):
        with pytest.raises(UserError, match=say):
            safety(Knobs(data=data, **knobs), tmp_path)
