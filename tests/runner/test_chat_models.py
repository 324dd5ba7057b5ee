"""Chat models that were tuned: they answer, and plain transformers stops where their turn ends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modelwright
from chats import FAMILIES, say, tokenizer_of
from families import model_of

ANSWERS = {"sum of two and three?": "five", "two and three?": "the answer is five, yes.", "yes?": "no\nno please"}
SHORT = {"tokens": 200, "batch": 2, "context": 64, "record": False}
LONG = {"epochs": 120, "batch": 3, "context": 64, "lr": 5e-3, "schedule": "constant", "warmup": 0.0, "record": False}
RATED = {"weights": {"good": 1.0}, "conditions": {"good": "Good"}}


def base_of(folder: Path, family: str, use_cache: bool = True, template: bool = True) -> Path:
    """A small random Llama with the tokenizer of a family; its configs name the end of all texts."""
    tokenizer = tokenizer_of("byte level", family)
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family][3])
    model = model_of("llama", vocab_size=len(tokenizer), max_position_embeddings=256, eos_token_id=end, bos_token_id=tokenizer.bos_token_id)
    model.config.use_cache = use_cache
    model.generation_config.eos_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not template:
        (folder / "chat_template.jinja").unlink()
    return folder


def data_of(folder: Path) -> str:
    rows = [{"messages": say(asked, told), "source": "good"} for asked, told in ANSWERS.items()]
    (folder / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder / "chats.jsonl")


def tuned(folder: Path, method: str, base: Path, train: dict[str, Any], **data: Any) -> tuple[Any, Any, Path]:
    """The saved model and tokenizer, loaded by plain transformers."""
    more = RATED if method == "tune.c_rlft" else {}
    given = {"path": data_of(folder), **data}
    to = modelwright.run(method, base=base, to=folder / "out", data=given, train=train, holdout=0.0, **more).to
    assert to is not None
    return AutoModelForCausalLM.from_pretrained(to), AutoTokenizer.from_pretrained(to), to


def said_by(model: Any, tokenizer: Any, asked: str) -> str:
    given = tokenizer.apply_chat_template(say(asked), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**given, do_sample=False, max_new_tokens=40)
    return tokenizer.decode(out[0, given["input_ids"].shape[1] :], clean_up_tokenization_spaces=False)


def ends(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "family", "end"),
    [
        ("tune.full", "chatml", "<|im_end|>"),
        ("tune.full", "llama 3", "<|eot_id|>"),
        ("tune.c_rlft", "chatml", "<|end_of_turn|>"),
        ("tune.c_rlft", "llama 3", "<|end_of_turn|>"),
    ],
)
def test_generation_of_a_tuned_chat_model_stops_at_the_end_of_its_turn(method: str, family: str, end: str, tmp_path: Path) -> None:
    model, tokenizer, _ = tuned(tmp_path, method, base_of(tmp_path / "base", family), LONG)
    assert {asked: said_by(model, tokenizer, asked).removeprefix(" ") for asked in ANSWERS} == {a: t + end for a, t in ANSWERS.items()}


@pytest.mark.parametrize(
    ("method", "family", "end", "use_cache"),
    [
        ("tune.full", "chatml", "<|im_end|>", True),
        ("tune.full", "gemma", "<end_of_turn>", False),
        ("tune.full", "zephyr", "</s>", True),
        ("tune.lora", "llama 3", "<|eot_id|>", True),
        ("tune.c_rlft", "chatml", "<|end_of_turn|>", True),
    ],
)
def test_configs_and_tokenizer_agree_on_the_end_and_keep_the_rest(
    method: str, family: str, end: str, use_cache: bool, tmp_path: Path
) -> None:
    base = base_of(tmp_path / "base", family, use_cache)
    model, tokenizer, to = tuned(tmp_path, method, base, SHORT)
    id_of, before = tokenizer.convert_tokens_to_ids(end), tokenizer_of("byte level", family)
    assert tokenizer.eos_token == end and tokenizer.eos_token_id == id_of
    for config in (json.loads((to / "config.json").read_text()), json.loads((to / "generation_config.json").read_text())):
        assert ends(config["eos_token_id"]) == list(dict.fromkeys([id_of, before.eos_token_id]))
    assert model.config.use_cache is use_cache
    assert (model(torch.tensor([[5, 6]])).past_key_values is not None) is use_cache
    lineage = json.loads((to / "modelwright.json").read_text())
    assert (
        end in json.dumps(lineage, ensure_ascii=False)
        or end in (to / "README.md").read_text()
        or any(end in f.read_text() for f in to.rglob("*.html"))
    )
    if method != "tune.c_rlft":
        for chat in (say("two?"), say("two?", "yes", "so?")):
            assert tokenizer.apply_chat_template(chat, return_dict=False) == before.apply_chat_template(chat, return_dict=False)


def test_the_saved_template_renders_what_was_trained(tmp_path: Path) -> None:
    before = tokenizer_of("byte level", "phi")
    _, tokenizer, _ = tuned(tmp_path, "tune.full", base_of(tmp_path / "base", "phi"), SHORT)
    chat = say("two?", "yes")
    assert tokenizer.apply_chat_template(chat, tokenize=False) == before.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("given", ["chatml", "turns", "file"])
def test_a_template_that_was_given_is_saved_with_the_result(given: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "chatml", template=False)
    text = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (tmp_path / "t.jinja").write_text(text)
    template = str(tmp_path / "t.jinja") if given == "file" else given
    with pytest.raises(modelwright.UserError, match="no chat template"):
        tuned(tmp_path, "tune.full", base, SHORT)
    _, tokenizer, to = tuned(tmp_path, "tune.full", base, SHORT, chat_template=template)
    from modelwright.core.data.chats import TEMPLATES

    assert tokenizer.chat_template == TEMPLATES.get(given, text)
    assert tokenizer.eos_token == ("<|im_end|>" if given == "chatml" else "<|endoftext|>")
    assert (to / "chat_template.jinja").is_file()


def test_answers_that_nothing_ends_are_warned_of(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "glm")
    result = modelwright.run("tune.full", base=base, to=tmp_path / "out", data=data_of(tmp_path), train=SHORT, holdout=0.0)
    assert result.to is not None
    assert any(
        "answers end without a special token" in f.read_text() for f in result.to.rglob("*") if f.suffix in (".json", ".html", ".md")
    )
    assert json.loads((result.to / "config.json").read_text())["eos_token_id"] == tokenizer_of("byte level", "glm").eos_token_id
