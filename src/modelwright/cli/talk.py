"""`modelwright generate`: a checkpoint writes. Prompts are read whole, one after the other, with the same seed."""

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

import modelwright.models  # noqa: F401 - our classes become known to the Auto classes
from modelwright.cache.engine.evict import evict as evict_block
from modelwright.cache.engine.measure import fits_context
from modelwright.cache.evictors.names import named
from modelwright.cli.output import print_json, resumable, say
from modelwright.core.data.read import read, read_table
from modelwright.core.errors import UserError, short
from modelwright.core.knobs import Data
from modelwright.core.model.checkpoint import Checkpoint, check_vocabulary, silence_transformers

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and math.isfinite(self.top_p)):
            raise UserError("temperature and top-p must be finite numbers", how="give --temperature 0.8 --top-p 0.95")
        if self.temperature and not self.top_p:
            raise UserError("--top-p 0 leaves no token to sample", how="give a share above 0, or --temperature 0 for greedy")


class Speaker:
    """A model and its tokenizer, ready to write. Raises UserError for a checkpoint that cannot."""

    def __init__(self, base: str, sampling: Sampling):
        silence_transformers()
        if not 0 <= sampling.seed < 2**32:
            raise UserError(f"--seed {sampling.seed} does not fit", "it must be a whole number from 0 to 4294967295")
        source = Checkpoint(base)
        self.name, self.sampling = str(base), sampling
        self.tokenizer = source.tokenizer()
        if self.tokenizer is None:
            raise UserError(f"{source.folder} has no tokenizer", "prompts are text", "add its tokenizer files")
        check_vocabulary(self.tokenizer, int(source.hf_config.get_text_config().vocab_size), source.folder)
        self.model = source.model().eval().to("cuda" if torch.cuda.is_available() else "cpu")
        if not self.model.can_generate() or self.model.config.is_encoder_decoder:
            raise UserError(
                f"{source.folder} does not continue text", f"it is a {type(self.model).__name__}", "give a causal language model"
            )

    @property
    def has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def ids(self, prompt: str | Messages) -> torch.Tensor:
        """Token ids (1, T) of a text, or of a chat by the tokenizer's template."""
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
            if not ids:
                raise UserError("the prompt is empty", how="give some text")
            return torch.tensor([ids])
        if not self.has_template:
            raise UserError(f"the tokenizer of {self.name} has no chat template", "a chat was given", "give a plain prompt")
        try:
            return torch.tensor([self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)])
        except Exception as error:  # a template may refuse a role or an order
            raise UserError("the chat template refuses this chat", short(error), "see the tokenizer's chat_template") from None

    def write(self, ids: torch.Tensor, samples: int = 1, streamer: Any = None) -> list[list[int]]:
        """New token ids of each sample; the same for a prompt wherever it stands among others."""
        s = self.sampling
        fits_context(self.model, ids.shape[1] + s.max_new_tokens, "prompt and answer", "shorten the prompt or lower --max-new-tokens")
        ends = self.model.generation_config.eos_token_id
        pad = self.tokenizer.pad_token_id
        how: dict[str, Any] = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k} if s.temperature else {}
        settings = GenerationConfig(
            max_new_tokens=s.max_new_tokens,
            do_sample=bool(s.temperature),
            eos_token_id=self.tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=0 if pad is None else pad,
            num_return_sequences=samples,
            **how,
        )
        torch.manual_seed(s.seed)
        ids = ids.to(self.model.device)
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer)
        return [_until_end(row.tolist(), settings.eos_token_id) for row in out[:, ids.shape[1] :]]

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _until_end(ids: list[int], ends: Any) -> list[int]:
    """The ids up to the first end token, without the padding behind it."""
    stops = set(ends if isinstance(ends, list) else [ends])
    at = [i for i, token in enumerate(ids) if token in stops]
    return ids[: at[0] + 1] if at else ids


def generate(
    base: str,
    prompts: list[str],
    file: str | None,
    column: str | None,
    chat: str | None,
    template: bool,
    system: str | None,
    sampling: Sampling,
    samples: int,
    evict: str | None,
    keep: float,
    as_json: bool,
) -> None:
    """Write after each prompt and print it: prompt by prompt as text, or all together as json."""
    if samples > 1 and not sampling.temperature:
        raise UserError(f"--samples {samples} needs sampling", "greedy answers are all the same", "give --temperature 0.8")
    method = named(evict, keep, None, {}, sampling.seed) if evict else None
    wanted: list[str | Messages] = [*map(_given, prompts), *_from_file(file, column), *_chats(chat)]
    if not wanted:
        raise UserError("there is nothing to continue", how="give a prompt, --file FILE, --chat FILE, or - for standard input")
    if template or system:
        wanted = [_as_chat(w, system) for w in wanted]
    with resumable(False):
        speaker, rows = Speaker(base, sampling), []
        for prompt in wanted:
            ids = speaker.ids(prompt)
            with evict_block(speaker.model, method) if method else nullcontext():
                written = speaker.write(ids, samples)
            answers = [speaker.text(w) for w in written]
            rows.append({"prompt": prompt, "answers": answers, "prompt_tokens": ids.shape[1], "new_tokens": [len(w) for w in written]})
            if not as_json:
                _print(prompt, answers, len(wanted) > 1 or samples > 1)
    if as_json:
        print_json({"base": base, **({"evict": evict, "keep": keep} if evict else {}), "results": rows})


def _print(prompt: str | Messages, answers: list[str], several: bool) -> None:
    if not several:
        say(answers[0])
        return
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    say(f"--- {' '.join(asked.split())[:100]}")
    for answer in answers:
        say(answer + "\n")


def _given(prompt: str) -> str:
    return sys.stdin.read() if prompt == "-" else prompt


def _from_file(file: str | None, column: str | None) -> list[str]:
    """Prompts of a file: a text file is one, a table one per row."""
    if file is None:
        if column:
            raise UserError(f"--column {column} names a column of no file", how="give --file FILE")
        return []
    documents = read(Data(path=file, column=column))
    if not all(isinstance(d, str) for d in documents):
        raise UserError(f"{file} holds no texts", "a prompt is text", "give chats with --chat, or name a column of text with --column")
    return documents


def _chats(file: str | None) -> list[Messages]:
    """Chats of a file: jsonl with a column `messages`, one json list of messages, or one object that holds them."""
    if file is None:
        return []
    path = Path(file).expanduser()
    whole: Any = None
    if path.suffix == ".json" and path.is_file():
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"{file} is not valid JSON", short(error)) from None
        whole = whole.get("messages") if isinstance(whole, dict) else whole
    if isinstance(whole, list) and whole and isinstance(whole[0], dict) and "role" in whole[0]:
        chats: list[Any] = [whole]
    else:
        names, values_of = read_table(Data(path=file))
        if "messages" not in names:
            raise UserError(f"{file} has no column 'messages'", f"it has {', '.join(map(str, names))}", "give a list of role and content")
        chats = values_of("messages")
    for i, messages in enumerate(chats):
        fine = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
        if not fine or not all(isinstance(m.get(k), str) for m in messages for k in ("role", "content")):
            raise UserError(f"chat {i} of {file} is no list of messages", "each needs a role and a content, both text", "mend that row")
    return chats


def _as_chat(prompt: str | Messages, system: str | None) -> Messages:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    opened = messages[0]["role"] == "system"
    return messages if not system or opened else [{"role": "system", "content": system}, *messages]
