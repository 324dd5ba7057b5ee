"""C-RLFT: learn from mixed-quality chats by telling the model the source and weighing it (OpenChat, arXiv 2309.11235).

Each chat comes from a source class c, an expert or a sub-optimal one. The class is written into the prompt as a condition,
and the assistant's tokens weigh w_c = exp(r_c / beta), given directly (1 for the expert, 0.1 for the other):
    L = sum_t w_t CE_t / sum_t w_t        over the whole step and all processes.
At inference the expert condition is used; no preference labels, no reference model. w = 1 is plain SFT. Only relative
weights within a step matter: a step that holds sub-optimal chats alone trains at full strength.

    GPT4 User: how are you<|end_of_turn|>GPT4 Assistant: fine<|end_of_turn|>

The released code stores weights in bf16 (0.1 becomes 0.1001) and its denominator in fp32, and drops the tail of each epoch;
ours does neither. Rows are packed without padding by its multipack sampler (core/data/packing.py). Text of a message is never
read as a special token. Ours: the result's chat template has the condition as a variable, the expert's by default.
"""

import json
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from modelwright.core.data.packing import Texts, packed, padded
from modelwright.core.data.read import is_text, read_table
from modelwright.core.data.rows import Rows, TokenRows
from modelwright.core.data.tables import column
from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Data, Train, Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train import dist
from modelwright.core.train.technique import Technique


@dataclass(frozen=True)
class Knobs(Tune):
    source: str = knob("source", "column that names the source class of each chat")
    weights: dict[str, float] = knob({"gpt4": 1.0, "gpt3.5": 0.1}, "weight of each source class; the largest is the expert")
    conditions: dict[str, str] = knob({"gpt4": "GPT4", "gpt3.5": "GPT3"}, "words that stand before each role, by source class")
    end: str = knob("<|end_of_turn|>", "token that ends a turn; added with the mean embedding where the tokenizer lacks it")
    per: Literal["token", "message"] = knob("token", "the weight is each token's, or is shared out over a message")
    long: Literal["cut", "leave out"] = knob("cut", "what becomes of a chat longer than train.context; either is counted")
    packing: bool = knob(True, "several chats in a row, none seeing another")
    lr_rule: bool = knob(False, "learning rate by the paper's rule from the learnt tokens per step, instead of train.lr")


def learning_rate(tokens_per_step: float, base: float = 3e-4, divisor: float = 1.0) -> float:
    """The paper's rule: 3e-4 at 4 M learnt tokens a step, scaled by the root; 6.708e-5 for 200 k."""
    return base * math.sqrt(tokens_per_step / 4e6) / divisor


class CRlft(Technique):
    """A data policy: conditions, weights and packing; the loss is the ordinary one with weights."""

    name = "c_rlft"
    supports = Technique.supports | {"4bit"}

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        for name, w in knobs.weights.items():
            if not (math.isfinite(w) and w >= 0):
                raise UserError(f"weights has {name}: {w}", "a weight must be a number from 0 up", "drop the class, or weigh it 0")
        if not knobs.weights or max(knobs.weights.values()) == 0:
            raise UserError("weights has no class that is learnt", "every weight is 0", "give the expert class weight 1")
        if missing := knobs.weights.keys() - knobs.conditions.keys():
            raise UserError(f"conditions has no {sorted(missing)[0]}", "weights names that class", "give each class its words, or ''")
        if not knobs.end.strip():
            raise UserError("end is empty", "a turn would have no end", "give a token such as <|end_of_turn|>")
        self.expert = max(knobs.weights, key=lambda c: knobs.weights[c])
        self.words = {c: words.strip() for c, words in knobs.conditions.items()}
        self._new = False  # the end token is new to the tokenizer

    # ---- data policy -------------------------------------------------------------------------------------------------
    def rows(self, data: Data, tokenizer: Any, vocab: int, train: Train, seed: int) -> Rows | None:
        if is_text(data):
            return None
        if tokenizer is None:
            raise UserError("the checkpoint has no tokenizer", "chats are text", "add tokenizer files")
        self._teach(tokenizer)
        table = read_table(data)
        if self.knobs.source not in table[0]:
            how = did_you_mean(self.knobs.source, table[0])
            raise UserError(f"{data.path} has no column '{self.knobs.source}'", "it must name the source class of each chat", how)
        chats, classes = column(data.path, table, data.column or "messages"), column(data.path, table, self.knobs.source)
        texts, facts = self._render(chats[: data.limit], classes[: data.limit], tokenizer, train.context)
        bins = train.batch * train.accumulate * dist.world()
        made = packed(texts, train.context, bins, seed) if self.knobs.packing else padded(texts, train.context)
        return replace(made, facts=made.facts | facts)

    def _teach(self, tokenizer: Any) -> None:
        self._new |= tokenizer.convert_tokens_to_ids(self.knobs.end) in (None, tokenizer.unk_token_id)
        if self.knobs.end not in tokenizer.all_special_tokens:  # only a special token is safe from the text of messages
            tokenizer.add_special_tokens({"additional_special_tokens": [self.knobs.end]}, replace_extra_special_tokens=False)
        self._end = tokenizer.convert_tokens_to_ids(self.knobs.end)
        self.stops = (self._end,)
        first = tokenizer("", add_special_tokens=True)["input_ids"][:1]
        self._start = first if first == [tokenizer.bos_token_id] else []
        tokenizer.chat_template = _TEMPLATE % (
            "{{ bos_token }}" if self._start else "",
            *(json.dumps(words, ensure_ascii=False) for words in (self.words[self.expert], self.knobs.end, self.knobs.end)),
        )
        self.tokenizer = tokenizer

    def _render(self, chats: list, classes: list, tokenizer: Any, context: int) -> tuple[Texts, dict[str, Any]]:
        turns: list[tuple[int, str, int, float]] = []  # chat, text, where what is learnt begins, weight
        for i, (chat, name) in enumerate(zip(chats, map(str, classes), strict=True)):
            if name not in self.knobs.weights:
                raise UserError(f"row {i + 1} has source '{name}'", "weights has no such class", did_you_mean(name, self.knobs.weights))
            turns += [(i, *turn) for turn in self._turns(chat, name, i)]
        if not turns:
            raise UserError("the data holds no message", "every chat is empty", "check the column")
        found = tokenizer([t[1] for t in turns], add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        texts = Texts([list(self._start) for _ in chats], [[0.0] * len(self._start) for _ in chats])
        for (i, _, begins, weight), ids, spans in zip(turns, found["input_ids"], found["offset_mapping"], strict=True):
            learnt = [s >= begins and weight > 0 for s, _ in spans] + [weight > 0]
            each = weight / max(sum(learnt), 1) if self.knobs.per == "message" else weight
            texts.ids[i] += [*ids, self._end]
            texts.weights[i] += [each * on for on in learnt]
        return self._trim(texts, context)

    def _turns(self, chat: Any, name: str, i: int) -> list[tuple[str, int, float]]:
        if not isinstance(chat, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in chat
        ):
            raise UserError(f"row {i + 1} holds no chat", "a list of messages with role and content as text is needed", "check data.column")
        condition, found = self.words[name], []
        for m in chat:
            prefix = "" if m["role"] == "system" else f"{condition} {m['role'].title()}:".lstrip()
            weight = self.knobs.weights[name] if m["role"] == "assistant" else 0.0
            found.append((f"{prefix} {m['content']}" if prefix else m["content"], len(prefix), weight))
        return found

    def _trim(self, texts: Texts, context: int) -> tuple[Texts, dict[str, Any]]:
        """Drop what follows the last learnt token; deal with chats that are too long; count."""
        facts = {"chats": len(texts), "cut at the context": 0, "left out: too long": 0, "left out: nothing learnt": 0}
        kept = Texts()
        for ids, weights in zip(texts.ids, texts.weights, strict=True):
            n = max((k + 1 for k, w in enumerate(weights) if w > 0), default=0)
            if n > context and self.knobs.long == "leave out":
                facts["left out: too long"] += 1
                continue
            facts["cut at the context"] += n > context
            n = min(n, context)
            if not any(weights[1:n]):
                facts["left out: nothing learnt"] += 1
                continue
            kept.ids.append(ids[:n])
            kept.weights.append(weights[:n])
        if not len(kept):
            why = ", ".join(f"{n} {what}" for what, n in facts.items() if n)
            raise UserError("no chat has anything to learn", why, "check roles and weights, or raise train.context")
        return kept, facts

    def settings(self, rows: TokenRows, train: Train) -> Train:
        count = int((rows.labels[:, 1:] >= 0).sum()) if isinstance(rows, Rows) else rows.tokens - len(rows)  # of plain text all is learnt
        learnt = count / len(rows) * train.batch * train.accumulate * dist.world()
        self._rule = learning_rate(learnt)
        return replace(train, lr=self._rule) if self.knobs.lr_rule else train

    # ---- attachment: the new token ------------------------------------------------------------------------------------
    def attach(self, model: Any, anatomy: Anatomy) -> Any:
        if not self._new:
            return model
        if self._end >= model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(self._end + 1, mean_resizing=False)
        with torch.no_grad():  # a table may have spare rows: the mean is that of the tokens before the new one
            for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
                layer.weight[self._end] = layer.weight[: self._end].mean(0)
                if getattr(layer, "bias", None) is not None:
                    layer.bias[self._end] = layer.bias[: self._end].mean()
        return model

    def facts(self) -> dict[str, Any]:
        return {"learning rate by the paper's rule": getattr(self, "_rule", None)}


_TEMPLATE = (
    "%s{%% set c = condition if condition is defined else %s %%}{%% for m in messages %%}"
    "{%% if m['role'] == 'system' %%}{{ m['content'] + %s }}"
    "{%% else %%}{{ (c + ' ' if c else '') + m['role'].title() + ': ' + m['content'] + %s }}{%% endif %%}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ (c + ' ' if c else '') + 'Assistant:' }}{%% endif %%}"
)


METHOD = CRlft
