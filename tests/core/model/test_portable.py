"""A saved config says the same in the old spelling, and transformers reads back exactly what it wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from families import FAMILIES
from modelwright.core.model.checkpoint import SEEDLING
from modelwright.core.model.classes import config_of
from modelwright.core.model.portable import chat_ends, make_portable, portable_config, portable_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}


def plain(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


# family, changes, what the old spelling must say
OLD: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {"rope_theta": 1e4, "rope_scaling": None}),
    ("llama", plain(5e5), {"rope_theta": 5e5, "rope_scaling": None}),
    ("llama", {"rope_parameters": LLAMA3}, {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}),
    ("qwen2", {"rope_parameters": YARN}, {"rope_theta": 1e4, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}}),
    ("mixtral", plain(1e4), {"rope_theta": 1e4, "rope_scaling": None}),
    ("qwen3_moe", {}, {"num_experts": 4, "num_local_experts": 4, "rope_theta": 1e4}),
    ("gpt_neox", plain(1e5, partial_rotary_factor=0.5), {"rotary_emb_base": 1e5, "rotary_pct": 0.5}),
    ("phi3", plain(1e4, partial_rotary_factor=0.5), {"partial_rotary_factor": 0.5, "rope_scaling": None}),
    (
        "mixtral",
        {"head_dim": 8, "rope_parameters": LONG | {"original_max_position_embeddings": 32}},
        {"original_max_position_embeddings": 32},
    ),
    (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 32},
        {
            "original_max_position_embeddings": 32,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        },
    ),
    (
        "gemma3",
        {"rope_parameters": GEMMA3},
        {"rope_theta": 1e6, "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    ("gpt2", {}, {}),
]


def saved(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    config_class, _, values = FAMILIES[family]
    return json.loads(config_class(**{**values, **changes}).to_json_string())


@pytest.mark.parametrize(("family", "changes", "old"), OLD)
def test_the_old_spelling_says_the_same(family: str, changes: dict[str, Any], old: dict[str, Any]) -> None:
    written = portable_config(saved(family, changes))
    assert {k: written[k] for k in old} == old


@pytest.mark.parametrize(
    ("family", "changes"), [(f, c) for f, c, _ in OLD] + [(f, {}) for f in FAMILIES], ids=lambda x: x if isinstance(x, str) else ""
)
def test_transformers_reads_back_what_it_wrote(family: str, changes: dict[str, Any]) -> None:
    before = saved(family, changes)
    was, now = (config_of(c).to_dict() for c in (before, portable_config(before)))
    rope = (now.get("rope_parameters") or {}) if family == "phi3" else {}
    rope.pop("type", None)  # Phi-3's old spelling of rope_type stays beside the new one
    assert {k: now[k] for k in was} == was
    assert portable_config(portable_config(before)) == portable_config(before)


def test_a_stale_old_spelling_is_set_anew() -> None:
    stale = saved("llama", plain(5e5)) | {"rope_theta": 1.0, "rope_scaling": {"rope_type": "linear", "factor": 9.0}}
    assert (new := portable_config(stale))["rope_theta"] == 5e5 and new["rope_scaling"] is None
    assert config_of(new).rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


def test_an_old_config_that_was_never_read_is_left_as_it_is() -> None:
    old = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert portable_config(old) == old


def test_a_tokenizer_keeps_its_tokens_under_names_that_both_read(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SEEDLING)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end_of_turn|>"]})
    tokenizer.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend" and before["extra_special_tokens"] == ["<|end_of_turn|>"]
    make_portable(tmp_path)
    after = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert after["tokenizer_class"] == "PreTrainedTokenizerFast" and after["additional_special_tokens"] == ["<|end_of_turn|>"]
    assert not {"extra_special_tokens", "is_local", "local_files_only"} & after.keys()
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.all_special_tokens == tokenizer.all_special_tokens and again.get_vocab() == tokenizer.get_vocab()
    text = "import os<|end_of_turn|> 12"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] and again.eos_token_id == tokenizer.eos_token_id


def test_a_slow_or_named_tokenizer_class_is_left_alone() -> None:
    assert portable_tokenizer({"tokenizer_class": "GPT2Tokenizer", "pad_token": "x"}) == {
        "tokenizer_class": "GPT2Tokenizer",
        "pad_token": "x",
    }


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("generation", [None, {"eos_token_id": 0, "top_p": 0.9}, {"eos_token_id": [0, 7]}])
def test_a_chat_ends_where_its_template_ends_a_turn(generation: dict[str, Any] | None, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SEEDLING)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 0}))
    if generation:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat_ends(tokenizer) == [end]
    make_portable(tmp_path)
    make_portable(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == (generation or {}) | {"eos_token_id": [*([0, 7] if generation and "top_p" not in generation else [0]), end]}


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}",  # it ends with the eos
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",  # no turn has an end
        "{{ raise_exception('only one turn') if messages|length > 1 }}{{ messages[0]['content'] }}",
    ],
)
def test_without_an_end_of_its_own_nothing_is_added(template: str | None, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SEEDLING)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 0}))
    make_portable(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
