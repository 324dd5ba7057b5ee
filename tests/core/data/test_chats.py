"""Chats as ten families of models write them: what is trained is what the template renders, and only the assistant's words are learnt."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chats import CHATML, FAMILIES, KINDS, NEXT, OLMO, ZEPHYR, marked, say, tokenizer_of, unmarked
from modelwright.core.data.chats import Renderer, with_template
from modelwright.core.data.make import render_chat, tokenize
from modelwright.core.data.read import Chat
from modelwright.core.errors import UserError

CHATS = {
    "one turn": say("sum of two and three?", "five"),
    "several words": say("sum of two and three?", "the answer is five, yes."),
    "three turns": say("sum of two?", "no", "please", "yes please", "so?", "five"),
    "with a system": say("*the model says yes", "two?", "yes two", "three?", "yes three"),
    "the same words on both sides": say("yes", "yes", "yes", "yes"),
    "words of the template": say("assistant user", "assistant", "user", "user\nassistant\n"),
    "white space around": say(" sum ", "  five ", "\nthree?\n", " yes\n"),
    "lines": say("one\ntwo", "one\n\ntwo\n  three", "so?", "- one\n- two"),
    "beyond ascii": say("größer?", "größer als 5 😀", "日本?", "😀日本"),
    "ends with the user": say("two?", "yes", "three?"),
}
THOUGHTS = say("two?", "<think>\nso two\n</think>\n\nyes two", "three?", "<think>\nis three\n</think>\n\nno three")


def usable(family: str, chat: list[dict[str, str]]) -> bool:
    return not (family == "gemma" and chat[0]["role"] == "system")


def learnt_text(tokenizer: Any, ids: list[int], mask: list[bool]) -> str:
    """The learnt tokens as text without white space."""
    return bare(tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m], clean_up_tokenization_spaces=False))


def bare(text: str) -> str:
    """Text without white space; decoding makes one of the bar in DeepSeek's names."""
    return "".join(text.replace("▁", " ").split())


def end_of(family: str, at: int, chat: list[dict[str, str]]) -> str:
    """What ends the answer that is message `at`."""
    if family == "glm":
        return "<|user|>" if at + 1 < len(chat) else ""
    return FAMILIES[family][4]


def said(family: str, chat: list[dict[str, str]]) -> str:
    """What the assistant says with the ends of its turns, without white space."""
    found = "".join(m["content"] + end_of(family, i, chat) for i, m in enumerate(chat) if m["role"] == "assistant")
    if family == "qwen 3" and chat[-1]["role"] == "assistant":
        last = chat[-1]["content"]
        found = found.removesuffix(last + end_of(family, 0, chat)) + "<think></think>" + last + end_of(family, 0, chat)
    return bare(found)


CASES = [(k, f) for f in FAMILIES for k in KINDS]


# ---- one rendering -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "family"), CASES)
def test_what_is_trained_is_what_the_template_renders(kind: str, family: str) -> None:
    tokenizer = tokenizer_of(kind, family)
    for name, chat in CHATS.items():
        if usable(family, chat):
            assert render_chat(tokenizer, chat)[0] == tokenizer.apply_chat_template(chat, return_dict=False), name


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_learnt_tokens_are_the_words_of_the_assistant_and_the_end_of_its_turns(kind: str, family: str) -> None:
    tokenizer = tokenizer_of(kind, family)
    for name, chat in CHATS.items():
        if usable(family, chat):
            assert learnt_text(tokenizer, *render_chat(tokenizer, chat)) == said(family, chat), name


def require_all_after_the_prompt(tokenizer: Any, chat: list[dict[str, str]], end: str, one: bool = False) -> bool:
    """Whether the prompt is a prefix of what is trained; then everything from there to the end token is learnt, and nothing after it."""
    ids, mask = render_chat(tokenizer, chat)
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
    n = len(prompt)
    if ids[:n] != prompt:
        return False
    stop = len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids(end)) if end else len(ids)
    if end == tokenizer.eos_token and tokenizer.chat_template.endswith("{{ eos_token }}{% endif %}"):
        stop -= 1  # the end of all texts follows the turn
    assert all(mask[n:stop]) and not any(mask[stop:])
    assert not one or not any(mask[:n])
    return True


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_the_prompt_is_a_prefix_and_all_that_follows_is_learnt(kind: str, family: str) -> None:
    tokenizer, end = tokenizer_of(kind, family), FAMILIES[family][4]
    for name, chat in CHATS.items():
        if usable(family, chat) and chat[-1]["role"] == "assistant":
            for last in [i for i, m in enumerate(chat) if m["role"] == "assistant"]:
                prefix = require_all_after_the_prompt(tokenizer, chat[: last + 1], end, one=last < 3)
                # DeepSeek's prompt opens thoughts that the rendered answer does not have
                assert prefix is (family != "deepseek"), name


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_marks_of_the_template_give_the_same_spans(kind: str, family: str) -> None:
    plain = tokenizer_of(kind, family)
    for name, chat in CHATS.items():
        if usable(family, chat):
            want = render_chat(plain, chat)
            plain.chat_template = marked(FAMILIES[family][0])
            try:
                assert Renderer(plain).marked
                got = render_chat(plain, chat)
            finally:
                plain.chat_template = unmarked(FAMILIES[family][0])
            assert got[0] == want[0], name
            if family == "glm":  # the marks leave out the next role, which ends the turn
                assert learnt_text(plain, *got) == said(family, chat).replace("<|user|>", ""), name
            else:
                assert got[1] == want[1], name


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(KINDS),
    st.lists(st.text("ab \n<|>ö5", min_size=1, max_size=12).filter(lambda t: t.strip()), min_size=2, max_size=5),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_words_are_told_apart(family: str, kind: str, words: list[str]) -> None:
    tokenizer, chat = tokenizer_of(kind, family), say(*words)
    ids, mask = render_chat(tokenizer, chat)
    assert ids == tokenizer.apply_chat_template(chat, return_dict=False)
    assert learnt_text(tokenizer, ids, mask) == said(family, chat)
    if len(words) % 2 == 0:
        require_all_after_the_prompt(tokenizer, chat, FAMILIES[family][4])


# ---- ends ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "family"), CASES)
def test_the_end_of_a_turn_is_where_generation_stops(kind: str, family: str) -> None:
    tokenizer, end = tokenizer_of(kind, family), FAMILIES[family][4]
    chats = [c for c in CHATS.values() if usable(family, c)]
    rows = tokenize(chats, tokenizer, len(tokenizer), 512)
    assert tokenizer.convert_ids_to_tokens(rows.stops) == [end or "<|user|>"]
    without = sum(c[-1]["role"] == "assistant" for c in chats) if family == "glm" else 0
    assert rows.facts.get("answers without an end token", 0) == without


@pytest.mark.parametrize("kind", KINDS)
def test_answers_whose_end_stands_in_the_next_turn_are_counted(kind: str) -> None:
    tokenizer = tokenizer_of(kind, "olmo")
    tokenizer.chat_template = unmarked(NEXT)
    try:
        rows = tokenize([CHATS["one turn"], CHATS["three turns"], CHATS["ends with the user"]], tokenizer, len(tokenizer), 512)
        alone = tokenize([CHATS["one turn"]], tokenizer, len(tokenizer), 512)
    finally:
        tokenizer.chat_template = unmarked(OLMO)
    assert rows.facts["answers without an end token"] == 2 and tokenizer.convert_ids_to_tokens(rows.stops) == ["<|endoftext|>"]
    assert alone.facts["answers without an end token"] == 1 and alone.stops == []


# ---- thoughts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_thoughts_that_the_template_strips_are_not_learnt_and_shown_ones_are(kind: str) -> None:
    for family, want in (
        ("qwen 3", "yestwo<|im_end|><think>isthree</think>nothree<|im_end|>"),
        ("deepseek", bare("yestwo<｜end▁of▁sentence｜>nothree<｜end▁of▁sentence｜>")),
        ("chatml", "<think>sotwo</think>yestwo<|im_end|><think>isthree</think>nothree<|im_end|>"),
        ("mistral", "<think>sotwo</think>yestwo</s><think>isthree</think>nothree</s>"),
    ):
        tokenizer = tokenizer_of(kind, family)
        ids, mask = render_chat(tokenizer, THOUGHTS)
        assert ids == tokenizer.apply_chat_template(THOUGHTS, return_dict=False)
        assert learnt_text(tokenizer, ids, mask) == want


@pytest.mark.parametrize("length", [3, 300])
@pytest.mark.parametrize("own", [True, False], ids=["as a field", "in the content"])
def test_long_thoughts_are_learnt_whole(own: bool, length: int) -> None:
    tokenizer, thought = tokenizer_of("byte level", "qwen 3"), " ".join(["two"] * length)
    content = "five" if own else f"<think>\n{thought}\n</think>\n\nfive"
    chat = [
        {"role": "user", "content": "sum?"},
        {"role": "assistant", "content": content} | ({"reasoning_content": thought} if own else {}),
    ]
    ids, mask = render_chat(tokenizer, chat)
    assert ids == tokenizer.apply_chat_template(chat, return_dict=False)
    assert learnt_text(tokenizer, ids, mask) == "<think>" + "two" * length + "</think>five<|im_end|>"


# ---- tool calls ----------------------------------------------------------------------------------------------------------
CALLS = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m['content'] + '</tool_response>' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% for c in m['tool_calls'] or [] %}"
    "{{ '\n<tool_call>' }}{{ c['function'] | tojson }}{{ '</tool_call>' }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("words", ["", "the sum:"])
@pytest.mark.parametrize("kind", KINDS)
def test_tool_calls_are_learnt_and_what_the_tool_says_is_not(kind: str, words: str) -> None:
    tokenizer = copy.deepcopy(tokenizer_of(kind, "chatml"))
    tokenizer.chat_template = CALLS
    call = {"type": "function", "function": {"name": "sum", "arguments": {"a": 2}}}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": words, "tool_calls": [call, call]},
        {"role": "tool", "content": "three"},
        {"role": "assistant", "content": "five"},
    ]
    ids, mask = render_chat(tokenizer, chat)
    shown = '<tool_call>{"name": "sum", "arguments": {"a": 2}}</tool_call>'
    assert ids == tokenizer.apply_chat_template(chat, return_dict=False)
    assert learnt_text(tokenizer, ids, mask) == bare(words + shown + shown + "<|im_end|>five<|im_end|>")
    assert require_all_after_the_prompt(tokenizer, chat[:2], "<|im_end|>", one=True)


# ---- what a template refuses ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "chat", "match"),
    [
        ("gemma", CHATS["with a system"], "System role not supported"),
        ("gemma", [*say("a", "b"), {"role": "assistant", "content": "c"}], "roles must alternate"),
        ("mistral", [{"role": "assistant", "content": "c"}, *say("a", "b")], "roles must alternate"),
    ],
)
def test_a_chat_that_the_template_refuses_is_one_sentence(family: str, chat: list[dict[str, str]], match: str) -> None:
    with pytest.raises(UserError, match=match):
        render_chat(tokenizer_of("byte level", family), chat)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ raise_exception('never') }}", "never"),
        ("{% for m in messages %}{{ m['content'] + m['name'] }}{% endfor %}", "the chat template refuses it"),
        ("{% for m in messages %}{{ m.name.first }}{% endfor %}", "the chat template refuses it"),
        ("{% for m in messages %}{{ m['content'] }", "the chat template refuses it"),
        ("{{ 1 / 0 }}", "the chat template refuses it"),
        ("{{ messages[0]['content'] }}", "does not show what the assistant says"),
        ("{% for m in messages %}{{ m['content'] | upper }} {{ m['content'] | length }};{% endfor %}", "cannot be told apart"),
    ],
)
@pytest.mark.parametrize("write", [unmarked, lambda t: "{% generation %}{% endgeneration %}" + t], ids=["plain", "marked"])
def test_a_template_that_fails_is_one_sentence(template: str, match: str, write: Callable[[str], str]) -> None:
    tokenizer = tokenizer_of("byte level", "chatml")
    tokenizer.chat_template = write(template)
    if Renderer(tokenizer).marked and match in ("does not show what the assistant says", "cannot be told apart"):
        match = "no token of the chat is to be learnt"  # the marks say that the assistant says nothing
    try:
        with pytest.raises(UserError, match=match):
            render_chat(tokenizer, CHATS["one turn"])
    finally:
        tokenizer.chat_template = unmarked(CHATML)


def test_an_empty_answer_is_counted_and_the_others_are_learnt() -> None:
    for family in FAMILIES:
        tokenizer = tokenizer_of("byte level", family)
        chat = say("two?", "yes", "three?", "", "five?", "no")
        ids, mask = render_chat(tokenizer, chat)
        text = learnt_text(tokenizer, ids, mask)
        assert ids == tokenizer.apply_chat_template(chat, return_dict=False)
        assert text.startswith("yes") and "no" in text and "three" not in text and "five" not in text, family
        rows = tokenize([chat], tokenizer, len(tokenizer), 512)
        end = bare(FAMILIES[family][4]) or "<|user|>"
        learns_to_say_nothing = text.count(end) >= (2 if family == "glm" else 3)
        assert learns_to_say_nothing != bool(rows.facts.get("empty answers, not learnt")), family


def test_chats_in_which_the_assistant_says_nothing_are_refused_with_the_reason() -> None:
    for family in FAMILIES:
        tokenizer = tokenizer_of("byte level", family)
        for chat in (say("two?"), *([say("*yes", "two?"), [{"role": "system", "content": "yes"}]] if family != "gemma" else [])):
            with pytest.raises(UserError, match="no token of the data is to be learnt, because .*nothing to learn: 1|refuses it"):
                tokenize([chat], tokenizer, len(tokenizer), 512)


def test_words_that_look_like_control_tokens_are_counted() -> None:
    tokenizer = tokenizer_of("byte level", "chatml")
    rows = tokenize([say("two <|im_end|>?", "yes"), say("two?", "yes")], tokenizer, len(tokenizer), 512)
    assert rows.facts["messages with control tokens in their text"] == 1


# ---- where a template comes from -----------------------------------------------------------------------------------------
def test_a_template_is_given_by_name_or_by_file(tmp_path: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer_of("byte level", "chatml"))
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        render_chat(tokenizer, CHATS["one turn"])
    (tmp_path / "t.jinja").write_text(unmarked(ZEPHYR), encoding="utf-8")
    assert with_template(tokenizer, str(tmp_path / "t.jinja")).chat_template == unmarked(ZEPHYR)
    assert render_chat(tokenizer, CHATS["one turn"])[0]
    for name in ("turns", "chatml"):
        ids, mask = render_chat(with_template(tokenizer, name), CHATS["three turns"])
        end = "<|im_end|>" if name == "chatml" else "<|endoftext|>"
        assert learnt_text(tokenizer, ids, mask) == f"no{end}yesplease{end}five{end}"
    with pytest.raises(UserError, match="did you mean 'chatml'"):
        with_template(tokenizer, "chatlm")


def test_renderings_are_not_mixed_up_by_tools() -> None:
    tokenizer = tokenizer_of("byte level", "chatml")
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t['name'] }};{% endfor %}" + unmarked(CHATML)
    try:
        chat = Chat(CHATS["one turn"], [{"name": "sum"}])  # type: ignore[arg-type]
        rendered = Renderer(tokenizer).render(chat)
    finally:
        tokenizer.chat_template = unmarked(CHATML)
    assert rendered.text.startswith("sum;") and [rendered.text[b:e] for b, e in rendered.spans] == ["five"]
