"""Chats as token ids: one rendering, and which tokens the assistant says."""

from typing import Any

from modelwright.core.errors import UserError


def render_chat(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Token ids of a chat by the tokenizer's template, and a mask that is true on what the assistant says."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("the tokenizer has no chat template", "the data holds messages", "use a chat model's tokenizer, or a text column")
    for i, message in enumerate(messages):
        if not (isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise UserError(f"message {i} of a chat lacks role or content", f"it has {', '.join(map(str, message))}", "give both as text")
    ids: list[int] = []
    mask: list[bool] = []

    def upto(n: int, prompt: bool, learnt: bool) -> None:
        nonlocal ids, mask
        now = tokenizer.apply_chat_template(messages[:n], add_generation_prompt=prompt, return_dict=False)
        if now[: len(ids)] != ids:
            raise UserError(
                "the chat template rewrites earlier turns", "the assistant's tokens cannot be told apart", "use another template"
            )
        mask += [learnt] * (len(now) - len(ids))
        ids = now

    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i:  # what opens the turn is given, what follows is learnt
            upto(i, True, False)
        upto(i + 1, False, message["role"] == "assistant" and i > 0)
    return ids, mask
