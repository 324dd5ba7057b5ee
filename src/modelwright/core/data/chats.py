"""Chats as token ids: one rendering by the tokenizer's template, and which of its characters the assistant says.

What is trained is exactly what `apply_chat_template` gives, tokenised as a whole. The assistant's characters are those that the
template marks with {% generation %}; where it marks none they are found by rendering the chat once more with other words in the
assistant's place: what both renderings share is the template's. A turn is learnt from the end of the generation prompt to the end of
the content, and on to the special token that follows it: a model that never learns this token never stops.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from modelwright.core.data.read import Chat
from modelwright.core.errors import UserError, did_you_mean, short

TEMPLATES = {
    "turns": "{% for m in messages %}{{ m['role'].title() + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
_MARK = "\u2402"  # a character that stands in no chat
_THOUGHT = "</think>"  # ends the thoughts that many templates show or strip


@dataclass(frozen=True)
class Rendered:
    """The rendered chat, and (begin, end) of what the assistant says in it, in characters; the end token is not included."""

    text: str
    spans: list[tuple[int, int]]


class RefusedChat(ValueError):
    """A chat that the template refuses, or in which the assistant's words cannot be told apart."""


class Renderer:
    """Renders chats by one tokenizer's template."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "the tokenizer has no chat template", "the data holds chats", "give data.chat_template (a file, turns or chatml), or texts"
            )

    @cached_property
    def marked(self) -> bool:
        """Whether the template says itself what the assistant generates."""
        template = self.tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template]
        return any(re.search(r"\{%-?\s*generation\s*-?%\}", t) for t in texts)

    @cached_property
    def prompt(self) -> str:
        """What the template puts before an answer of the assistant; empty where it has no such part."""
        one = [{"role": "user", "content": "x"}]
        try:
            asked, plain = self._apply(one, None, add_generation_prompt=True), self._apply(one, None)
        except RefusedChat:
            return ""
        return asked.removeprefix(plain) if asked.startswith(plain) else ""

    @cached_property
    def opening(self) -> str:
        """White space that an answer begins with, where the template puts nothing before it."""
        one = [{"role": "user", "content": "x"}]
        try:
            asked = self._apply(one, None, add_generation_prompt=True)
            shown = self._apply([*one, {"role": "assistant", "content": _MARK}], None).partition(_MARK)[0]
        except RefusedChat:
            return ""
        return shown[len(asked) :] if shown.startswith(asked) and shown[len(asked) :].isspace() else ""

    def render(self, chat: Chat) -> Rendered:
        """The chat as text, and the assistant's spans. Raises RefusedChat."""
        if not chat.messages:
            raise RefusedChat("it has no messages")
        if self.marked:
            return self._by_marks(chat)
        text = self._apply(chat.messages, chat.tools)
        answers = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and i]
        if not answers:
            return Rendered(text, [])
        try:
            return Rendered(text, self._spans(text, chat, answers, [""] * len(answers)))
        except RefusedChat:  # a template may show the thoughts in a way of its own: then they are left in, and are its text
            contents = [chat.messages[i]["content"] for i in answers]
            thoughts = ["".join(c.rpartition(_THOUGHT)[:2]) for c in contents]
            if not any(thoughts):
                raise
            return Rendered(text, self._spans(text, chat, answers, thoughts))

    def _apply(self, messages: list[dict[str, Any]], tools: Any, **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        except UserError:
            raise
        except Exception as error:  # a template is a program: whatever it raises, the chat cannot be rendered
            raise RefusedChat(f"the chat template refuses it: {short(error)}") from None

    def _by_marks(self, chat: Chat) -> Rendered:
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {"tools": chat.tools, "chat_template": self.tokenizer.get_chat_template(None, chat.tools)}
        try:
            rendered: Any = render_jinja_template(  # its annotation says str
                [chat.messages], return_assistant_tokens_mask=True, **options, **self.tokenizer.special_tokens_map
            )
        except Exception as error:
            raise RefusedChat(f"the chat template refuses it: {short(error)}") from None
        texts, spans = rendered
        return Rendered(texts[0], [(begin, end) for begin, end in spans[0]])

    def _parts(self, chat: Chat, answers: list[int], thoughts: list[str]) -> list[str]:
        """The template's own text before, between and after the assistant's contents."""
        names = {i: f"{_MARK}{k}{_MARK}" for k, i in enumerate(answers)}
        kept = dict(zip(answers, thoughts, strict=True))
        other = [m | {"content": kept[i] + names[i]} if i in names else m for i, m in enumerate(chat.messages)]
        text, found = self._apply(other, chat.tools), []
        for i in answers:
            before, mark, text = text.partition(names[i])
            if not mark:
                raise RefusedChat("the template does not show what the assistant says")
            found.append(before)
        return [*found, text]

    def _spans(self, text: str, chat: Chat, answers: list[int], thoughts: list[str]) -> list[tuple[int, int]]:
        parts = self._parts(chat, answers, thoughts)
        if not text.startswith(parts[0]):
            raise RefusedChat("the assistant's words cannot be told apart: the template changes its own text with them")
        at, spans = len(parts[0]), []
        for i, (k, thought) in enumerate(zip(answers, thoughts, strict=True)):
            message = chat.messages[k]
            end = self._end(text, at, message["content"][len(thought) :], parts[i + 1], last=i + 1 == len(answers))
            room = 200 + len(thought) + len(str(message.get("reasoning_content") or ""))
            calls = self._calls(chat, k, parts[i + 1]) if message.get("tool_calls") else 0
            spans.append((at - len(self._tail(parts[i], room)), end + calls))
            at = end + len(parts[i + 1])
        return spans

    def _tail(self, part: str, room: int) -> str:
        """What stands between the prompt of an answer and its content: the model must say it, so it is learnt."""
        if not self.prompt:
            return self.opening if part.endswith(self.opening) else ""
        _, prompt, tail = part.rpartition(self.prompt)
        return tail if prompt and _MARK not in tail and len(tail) <= room else ""

    def _calls(self, chat: Chat, k: int, after: str) -> int:
        """How many characters after the content of message `k` are its tool calls: up to the special token that ends the turn."""
        try:
            turn = self._parts(Chat(chat.messages[: k + 1], chat.tools), [k], [""])[-1].rstrip()
        except RefusedChat:
            return 0
        end = max((t for t in map(str, self.tokenizer.all_special_tokens) if turn.endswith(t)), key=len, default="")
        return len(turn) - len(end) if after.startswith(turn) else 0

    @staticmethod
    def _end(text: str, at: int, content: str, after: str, last: bool) -> int:
        """Where a content that begins at `at` ends: the template's next part must follow it (templates may strip the content)."""
        for shown in dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip())):
            if (
                text.startswith(shown, at)
                and text.startswith(after, at + len(shown))
                and (not last or at + len(shown + after) == len(text))
            ):
                return at + len(shown)
        found = len(text) - len(after) if last else text.find(after, at) if after else -1
        if found < at or not text.startswith(after, found):
            raise RefusedChat("the assistant's words cannot be told apart: the template changes its own text with them")
        return found


def with_template(tokenizer: Any, template: str | None) -> Any:
    """The tokenizer, with the chat template of a file or of a name of ours where one is given."""
    if template is None or tokenizer is None:
        return tokenizer
    path = Path(template).expanduser()
    if path.is_file():
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    elif template in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[template]
    else:
        raise UserError(f"no chat template at {template}", "it is neither a file nor a known name", did_you_mean(template, TEMPLATES))
    return tokenizer


def special_texts(tokenizer: Any) -> re.Pattern[str] | None:
    """What in a message would become a control token."""
    words = sorted({str(t) for t in tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words))) if words else None
