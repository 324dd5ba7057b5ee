"""A fresh model has the asked shape and an unbiased start; its tokenizer loses nothing and splits digits."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import modelwright
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.reshape.fresh import END, Knobs, fresh

SMALL = {"vocab": 600, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48, "context": 64}
HARD = [
    "",
    " ",
    "   ",
    "\n\n\t x",
    "a .b , c ?",
    "don't won 't",
    "\r\n",
    "\x00\x7f",
    "na\u00efve e\u0301",
    "\u65e5\u672c\u8a9e",
    "\u0627\u0644\u0639",
    "\U0001f469\u200d\U0001f467\U0001f3f3\ufe0f\u200d\U0001f308",
    "\u200b\ufeff",
    "\U0001d518\u00b2\u0663",
    END,
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """English and code that every Python carries, with many repeated numbers."""
    file = tmp_path_factory.mktemp("data") / "text.txt"
    text = Path(argparse.__file__).read_text(encoding="utf-8")[:40_000]
    file.write_text(text + " in 2024 and 2025, 1000 of 1000 were 31415;" * 200, encoding="utf-8")
    return str(file)


def make(data: str, seed: int = 0, **knobs: Any) -> Any:
    return fresh(None, Knobs(data=Data(path=data), **{**SMALL, **knobs}), seed)[0]


@pytest.fixture(scope="module")
def tokenizer(data: str) -> Any:
    return make(data).tokenizer


@pytest.fixture(scope="module")
def reloaded(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Model and tokenizer as a stock class loads them from a run's folder."""
    to = modelwright.run("reshape.fresh", data=data, to=tmp_path_factory.mktemp("fresh") / "out", **SMALL).to
    return AutoModelForCausalLM.from_pretrained(to).eval(), AutoTokenizer.from_pretrained(to)


# ---- tokenizer -------------------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(text=st.text())
@example(text=" ".join(HARD))
def test_any_unicode_text_round_trips(text: str, tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_reloaded_tokenizer_round_trips_and_agrees(text: str, tokenizer: Any, reloaded: tuple[Any, Any]) -> None:
    ids = reloaded[1](text)["input_ids"]
    assert reloaded[1].decode(ids) == text
    assert ids == tokenizer(text)["input_ids"]


def test_real_text_is_compressed_and_round_trips(tokenizer: Any, data: str) -> None:
    text = Path(data).read_text(encoding="utf-8")
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < 0.6 * len(text.encode())


@pytest.mark.parametrize("vocab", [257, 258, 300, 600])
def test_vocabulary_has_the_asked_size(vocab: int, data: str) -> None:
    made = make(data, vocab=vocab)
    assert len(made.tokenizer) == made.model.config.vocab_size == made.model.get_input_embeddings().weight.shape[0] == vocab
    assert sorted(made.tokenizer.get_vocab().values()) == list(range(vocab))


def test_too_little_text_gives_a_smaller_vocabulary_and_a_model_that_fits_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab ab")
    made = make(str(tmp_path / "a.txt"))
    assert 257 <= len(made.tokenizer) < 270
    assert made.model.config.vocab_size == len(made.tokenizer)


def test_digits_are_split_one_by_one(tokenizer: Any) -> None:
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert [t for t in tokenizer.tokenize("in 31415 of 1000x7") if any(c in "0123456789" for c in t)] == list("3141510007")
    assert not [t for t in tokenizer.get_vocab() if len(t) > 1 and any(c in "0123456789" for c in t)]


def test_runs_of_spaces_are_kept_whole(tokenizer: Any) -> None:
    assert len(tokenizer.tokenize("        return x")) <= 2 + len(tokenizer.tokenize("return x"))


def test_end_token_ends_and_pads_and_nothing_else_makes_it(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids(END)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == end
    assert tokenizer(f"a{END}b")["input_ids"].count(end) == 1
    assert end not in tokenizer("a plain text, < | endoftext | >")["input_ids"]
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]


# ---- model -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_model_has_the_asked_shape(tied: bool, data: str) -> None:
    made = make(data, hidden=48, layers=3, heads=6, kv_heads=3, ffn=40, context=96, tied=tied)
    c = made.model.config
    assert (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.intermediate_size) == (48, 3, 6, 3, 40)
    assert c.max_position_embeddings == made.tokenizer.model_max_length == 96
    assert (made.model.lm_head.weight is made.model.model.embed_tokens.weight) is tied
    block = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 40 + 2 * 48
    assert sum(p.numel() for p in made.model.parameters()) == (1 if tied else 2) * 600 * 48 + 3 * block + 48


def test_same_seed_gives_the_same_weights_and_another_seed_others(data: str) -> None:
    a, again, b = (make(data, seed=s) for s in (1, 1, 2))
    for (name, p), q, r in zip(a.model.named_parameters(), again.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert "norm" in name or not torch.equal(p, r), name
    assert a.tokenizer.get_vocab() == again.tokenizer.get_vocab() == b.tokenizer.get_vocab()


def test_run_writes_the_same_bytes_twice(data: str, tmp_path: Path) -> None:
    a, b = (modelwright.run("reshape.fresh", data=data, to=tmp_path / n, seed=1, **SMALL).to for n in "ab")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_stock_class_loads_an_untrained_model_that_knows_nothing(reloaded: tuple[Any, Any]) -> None:
    model, tokenizer = reloaded
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = torch.randint(0, 600, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert abs(loss - math.log(600)) < 0.1
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.parametrize(
    ("knobs", "kind", "places"),
    [
        ({}, "LlamaForCausalLM", None),
        ({"norm": "mix", "alpha": 0.0}, "LlamaForCausalLM", None),
        ({"norm": "mix"}, "MixLNForCausalLM", ["post", "pre", "pre", "pre"]),
        ({"norm": "post"}, "MixLNForCausalLM", ["post"] * 4),
        ({"norm": "output"}, "MixLNForCausalLM", ["output"] * 4),
    ],
)
def test_norms_stand_where_they_are_asked_to(knobs: dict, kind: str, places: list[str] | None, data: str) -> None:
    made, plain = make(data, layers=4, **knobs).model, make(data, layers=4).model
    assert type(made).__name__ == kind and getattr(made.config, "norm_placement", None) == places
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), plain.parameters(), strict=True)), "the same draws"


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"heads": 3}, "heads"),
        ({"hidden": 34}, "heads"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"hidden": 12}, "head"),
        ({"vocab": 256}, "vocab=256"),
        ({"layers": 0}, "layers=0"),
        ({"norm": "mix", "alpha": 1.5}, "alpha=1.5"),
        ({"norm": "mix", "alpha": -0.1}, "alpha=-0.1"),
        ({"norm": "sandwich"}, "norm='sandwich'"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_shape_that_no_llama_has_is_refused(knobs: dict, reason: str, data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        modelwright.run("reshape.fresh", data=data, to=tmp_path / "out", **{**SMALL, **knobs})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", [{"messages": [{"role": "user", "content": "hi"}]}, {"input_ids": [5, 6, 7]}], ids=lambda v: next(iter(v)))
def test_data_without_text_is_refused(line: dict, tmp_path: Path) -> None:
    """A tokenizer cannot be learnt from token ids, and one learnt from nothing would know single bytes only."""
    (tmp_path / "rows.jsonl").write_text((json.dumps(line) + "\n") * 5)
    with pytest.raises(UserError, match="text"):
        make(str(tmp_path / "rows.jsonl"))


def test_empty_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        make(str(tmp_path / "a.txt"))
