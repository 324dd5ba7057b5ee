"""A judge that is a causal language model in a checkpoint folder: batched, padded on the left, on the GPU where there is one.

With `options`, their probabilities are read off the logits in one forward pass: the prompt and what the options have in
common are given, and the first token in which they differ is weighed. They stand for the options where these differ in that
token alone, as "Output (a)" and "Output (b)" do; options that share it get no probabilities. A prompt that does not fit the
model's context is not cut: it fails with the status "too long".
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from modelwright.core.ask.protocol import Answer, Prompt
from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint


class Local:
    """`batch` prompts per forward pass; `seed` draws where the temperature is not 0."""

    def __init__(self, source: Checkpoint, batch: int = 8, seed: int = 0):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.tokenizer = source.tokenizer()
        if self.tokenizer is None:
            raise UserError("the judge has no tokenizer", f"{source.folder} holds none", "add its tokenizer files")
        self.model = source.model().eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.name = f"{source.folder.name} {source.fingerprint()[:23]}"
        self.batch, self.seed = batch, seed
        config = self.model.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        self.stop_ids = self._stop_ids()
        self.pad = self.tokenizer.pad_token_id
        if self.pad is None:
            self.pad = self.stop_ids[0] if self.stop_ids else 0

    def _stop_ids(self) -> list[int]:
        """The tokens that end an answer."""
        ids = self.model.generation_config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        if ids is None:
            return []
        return ids if isinstance(ids, list) else [ids]

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        ids = [self._ids(p.messages) for p in prompts]
        groups: dict[tuple[int, float, tuple[str, ...], int], list[int]] = defaultdict(list)
        for i, p in enumerate(prompts):
            if len(ids[i]) + p.max_tokens > self.context:
                yield i, Answer(status="too long")
            else:
                groups[p.max_tokens, p.temperature, p.options, p.attempt].append(i)
        for (max_tokens, temperature, options, attempt), members in groups.items():
            torch.manual_seed(self.seed + attempt)
            members.sort(key=lambda i: len(ids[i]))  # little padding
            for start in range(0, len(members), self.batch):
                some = members[start : start + self.batch]
                rows = [ids[i] for i in some]
                chances = self._weigh(rows, options) if options else [None] * len(some)
                texts = self._write(rows, max_tokens, temperature) if max_tokens else [("", "ok", 0)] * len(some)
                for i, (text, status, n), chance in zip(some, texts, chances, strict=True):
                    yield i, Answer(text, status, chance, len(ids[i]), n)

    def _ids(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of the prompt by the chat template, or as plain paragraphs where there is none."""
        if not self.tokenizer.chat_template:
            return self.tokenizer("\n\n".join(text for _, text in messages) + "\n\n")["input_ids"]
        chat = [{"role": role, "content": text} for role, text in messages]
        try:
            return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        except Exception:  # a template that knows no system role: the system's text opens the first message
            if len(chat) < 2 or chat[0]["role"] != "system":
                raise
            chat[1]["content"] = chat[0]["content"] + "\n\n" + chat[1]["content"]
            return self.tokenizer.apply_chat_template(chat[1:], add_generation_prompt=True, return_dict=False)

    def _padded(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (width - len(r)) + r for r in rows])  # (B, T), left-padded
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    @torch.inference_mode()
    def _weigh(self, rows: list[list[int]], options: tuple[str, ...]) -> list[tuple[float, ...] | None]:
        tails = [self.tokenizer(o, add_special_tokens=False)["input_ids"] for o in options]
        common = commonprefix(tails)
        first = [t[len(common)] if len(t) > len(common) else -1 for t in tails]
        if len(set(first)) < len(first) or -1 in first:
            return [None] * len(rows)
        batch = self._padded([r + common for r in rows])
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = self.model(**batch, position_ids=positions, use_cache=False, **self._last()).logits[:, -1, first]  # (B, options)
        return [tuple(p) for p in logits.float().softmax(-1).tolist()]

    def _last(self) -> dict[str, Any]:
        return {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}

    @torch.inference_mode()
    def _write(self, rows: list[list[int]], max_tokens: int, temperature: float) -> list[tuple[str, str, int]]:
        batch = self._padded(rows)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        settings = GenerationConfig(
            max_new_tokens=max_tokens, pad_token_id=self.pad, eos_token_id=self.stop_ids or None, use_cache=True, **sampling
        )
        new = self.model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :].tolist()
        return [self._read(row) for row in new]

    def _read(self, row: list[int]) -> tuple[str, str, int]:
        """Text, status and number of tokens of one answer."""
        ends = [j for j, token in enumerate(row) if token in self.stop_ids]
        if not ends:
            return self.tokenizer.decode(row, skip_special_tokens=True).strip(), "cut", len(row)
        text = self.tokenizer.decode(row[: ends[0]], skip_special_tokens=True).strip()
        return text, "ok" if text else "empty", ends[0] + 1
