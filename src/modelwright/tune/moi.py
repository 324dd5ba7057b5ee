"""Mixture-of-Instructions: several skills in one model by system prompts, balanced chunks and a mask between chunks (arXiv 2404.18410).

For supervised tuning on domains of unequal size (chat, code, mathematics, tools) that get into each other's way. Each domain has its own
system prompt. A chunk holds one example of each of the D domains; small domains are repeated until the largest is used up. Several chunks
share a row. A token sees what stands before it in its chunk, other domains too, and nothing of another chunk:
    token i attends to j   iff   chunk(i) = chunk(j) and j <= i;       positions begin anew in each chunk.
Loss over the K chunks, with R_k the learnt tokens of chunk k (loss: chunk; the others are token and instruction means):
    L = (1/K) sum_k (1/|R_k|) sum_{t in R_k} -log p(y_t | tokens of chunk k before t).
At the end every domain is asked with the default prompt alone.

No official code was found, and the equations of the paper do not agree with each other: the loss above is our reading of them. Controls:
sampling random (all examples once, packed at random) or sequence (one example a row); attention pack (everything seen) or example
(isolated). Ours: an example is never cut, one longer than train.context is left out; a chunk that is longer is parted between two
examples; both are counted. A chat that has a system prompt keeps it. Evaluation data gets the default prompt. What is held out of
balanced data is put aside before examples are repeated. The prompts for mathematics and tools are ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from modelwright.core.data.chats import RefusedChat, Renderer, with_template
from modelwright.core.data.encode import Encoder
from modelwright.core.data.make import in_vocabulary
from modelwright.core.data.packing import Texts, multipack, packed, padded
from modelwright.core.data.read import Chat, Document, Ids, Pair, Source, Text, is_text, iter_rows
from modelwright.core.data.rows import IGNORE, Rows
from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Data, Train, Tune, knob
from modelwright.core.train import dist
from modelwright.core.train.technique import Technique


@dataclass(frozen=True)
class Knobs(Tune):
    domain: str = knob("domain", "column that names the domain of each chat; with data.sources the name of the file does")
    systems: dict[str, str] = knob(
        {
            "dialogue": "You are a helpful assistant.",
            "code": "You are a programmer.",
            "math": "You are a mathematician.",
            "tools": "You are an assistant who calls tools.",
        },
        "system prompt of each domain; their order is that in a chunk",
    )
    default: str = knob("You are a helpful assistant.", "system prompt of the evaluation data")
    sampling: Literal["balanced", "random", "sequence"] = knob("balanced", "chunks of one example a domain, of random ones, or no packing")
    attention: Literal["chunk", "pack", "example"] = knob("chunk", "what a token sees: its chunk, all of its row, or its example")
    order: Literal["fixed", "random"] = knob("fixed", "order of the domains in a chunk")
    loss: Literal["chunk", "instruction", "token"] = knob("chunk", "what weighs the same: chunks, examples, or tokens")


Member = tuple[np.ndarray, np.ndarray]  # ids (n,), which are learnt (n,) bool
Chunk = list[Member]


def balanced(pools: list[list[Member]], order: str, rng: np.random.Generator) -> list[Chunk]:
    """One member of each pool a chunk; every member of the largest pool once, those of the others again and again in new orders."""
    size = max(map(len, pools))
    queues = [np.concatenate([rng.permutation(len(p)) for _ in range(-(-size // len(p)))])[:size] for p in pools if p]
    filled = [p for p in pools if p]
    found = []
    for k in range(size):
        turn = rng.permutation(len(filled)) if order == "random" else range(len(filled))
        found.append([filled[d][queues[d][k]] for d in turn])
    return found


def shuffled(pools: list[list[Member]], size: int, rng: np.random.Generator) -> list[Chunk]:
    """Every member once, `size` of them a chunk."""
    every = [m for p in pools for m in p]
    order = rng.permutation(len(every)).tolist()
    return [[every[i] for i in order[at : at + size]] for at in range(0, len(order), size)]


def parted(chunk: Chunk, context: int) -> list[Chunk]:
    """The chunk, or where it is too long its parts, cut between two members."""
    parts: list[Chunk] = [[]]
    for member in chunk:
        if parts[-1] and sum(len(ids) for ids, _ in parts[-1]) + len(member[0]) > context:
            parts.append([])
        parts[-1].append(member)
    return parts


class Moi(Technique):
    """A data policy; the loss is the ordinary one with weights."""

    name = "moi"
    supports = Technique.supports | {"4bit"}

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        self._facts: dict[str, Any] = {}
        if len(knobs.systems) < 2:
            raise UserError(f"systems has {len(knobs.systems)} domain", "a chunk mixes several", "name at least two")

    def facts(self) -> dict[str, Any]:
        return self._facts

    def rows(self, data: Data, tokenizer: Any, vocab: int, train: Train, seed: int) -> Rows | None:
        training = data is self.knobs.data
        if not data.path and not data.sources:
            return None
        if tokenizer is None:
            raise UserError("the checkpoint has no tokenizer", "chats are text", "add tokenizer files")
        tokenizer = with_template(tokenizer, data.chat_template)
        if not training:
            return self._evaluation(data, tokenizer, vocab, train.context)
        pools = self._pools(data, tokenizer, train.context)
        for pool in pools:
            in_vocabulary(min(int(i.min()) for i, _ in pool), max(int(i.max()) for i, _ in pool), vocab)
        return self._made(pools, train, seed)

    # ---- reading ---------------------------------------------------------------------------------------------------
    def _documents(self, data: Data) -> Iterator[tuple[str, Source, int, Document]]:
        """(domain, source, row number, document) of every row; of evaluation data the domain is empty."""
        for one in [replace(data, sources=[], path=s.path, column=s.column, split=s.split, limit=s.limit) for s in data.sources] or [data]:
            source, training = Source(one), data is self.knobs.data
            names: list[Any] = []
            if training and not data.sources:
                names = [r.get(self.knobs.domain) for r in iter_rows(one)] if not is_text(one) else []
                if names and all(n is None for n in names):
                    how = did_you_mean(self.knobs.domain, next(iter(iter_rows(one))))
                    raise UserError(f"{one.path} has no column '{self.knobs.domain}'", "it must name the domain of each chat", how)
            for number, document in source:
                name = str(names[number - 1]) if names else Path(str(one.path)).stem if training else ""
                yield name, source, number, document

    def _pools(self, data: Data, tokenizer: Any, context: int) -> list[list[Member]]:
        """The members of each domain, in the order of `systems`."""
        found: dict[str, list[tuple[Source, int, Document]]] = {name: [] for name in self.knobs.systems}
        for name, source, number, document in self._documents(data):
            if name not in found:
                raise UserError(f"row {number} is of the domain '{name}'", "systems has no prompt for it", did_you_mean(name, found))
            if isinstance(document, (Text, Ids)):
                raise UserError(f"{source.data.path} holds no chats", "a system prompt stands in a chat", "give messages or pairs")
            found[name].append((source, number, document))
        pools, facts = [], {}
        for name, documents in found.items():
            if not documents:
                raise UserError(
                    f"the domain '{name}' has no example", "a chunk holds one of each domain", "give rows of it, or leave it out"
                )
            members, counts = self._encoded(documents, self.knobs.systems[name], tokenizer)
            short = [m for m in members if len(m[0]) <= context]
            if not short:
                why = f"none of its {len(documents)} has anything to learn and is at most {context} tokens long"
                raise UserError(f"the domain '{name}' has no example that can be used", why, "raise train.context, or check the roles")
            pools.append(short)
            facts[name] = {"examples": len(short), "left out: longer than the context": len(members) - len(short), **counts}
        self._facts = {"domains": facts}
        return pools

    def _encoded(self, documents: list[tuple[Source, int, Document]], prompt: str, tokenizer: Any) -> tuple[list[Member], dict[str, int]]:
        """Chats behind a system prompt as token ids with a mask of what is learnt."""
        renderer, encoder, chats, own = Renderer(tokenizer), Encoder(tokenizer), [], 0
        for source, number, d in documents:
            if isinstance(d, Pair):
                d = Chat([{"role": "user", "content": d.prompt}, {"role": "assistant", "content": d.completion}])
            if not isinstance(d, Chat):
                source.refuse(number, "it holds no chat")
                continue
            if d.messages and d.messages[0]["role"] == "system":
                own += 1
            elif prompt:
                d = replace(d, messages=[{"role": "system", "content": prompt}, *d.messages])
            chats.append((number, d))
        _require_place(renderer, chats, prompt if len(chats) > own else "")
        found = [(e.ids, e.learnt) for e in encoder.documents(chats, documents[0][0].refuse) if e.learnt is not None]
        if encoder.stops:
            self.stops = tuple(dict.fromkeys([*self.stops, *encoder.stops]))
        counts = {k: n for k, n in encoder.counts.items() if k != "documents"}
        return found, counts | ({"with a system prompt of its own": own} if own else {})

    def _evaluation(self, data: Data, tokenizer: Any, vocab: int, context: int) -> Rows | None:
        """One example a row behind the default prompt; None for what holds no chats."""
        documents = [(source, number, d) for _, source, number, d in self._documents(data)]
        if not documents or isinstance(documents[0][2], (Text, Ids)):
            return None
        members, counts = self._encoded(documents, self.knobs.default, tokenizer)
        rows = padded(Texts([i.tolist() for i, _ in members], [m.astype(float).tolist() for _, m in members]), context)
        in_vocabulary(int(rows.ids.min()), int(rows.ids.max()), vocab)
        return replace(rows, facts=rows.facts | counts)

    # ---- packing ---------------------------------------------------------------------------------------------------
    def _made(self, pools: list[list[Member]], train: Train, seed: int) -> Rows:
        rng, k = np.random.default_rng(seed), self.knobs
        if k.sampling != "balanced" or k.evals or not k.holdout:
            return self._rows(self._chunks(pools, rng), train, seed)
        aside = [max(1, round(len(p) * k.holdout)) if len(p) > 1 else 0 for p in pools]
        orders = [rng.permutation(len(p)).tolist() for p in pools]
        parts = [[[p[i] for i in o[s]] for p, o, s in zip(pools, orders, cut, strict=True)] for cut in _cuts(aside)]
        if not any(parts[1]):
            return self._rows(self._chunks(parts[0], rng), train, seed)
        learnt, held = (self._rows(self._chunks(part, rng), train, seed) for part in parts)
        self._facts["held out examples"] = sum(aside)
        return _behind(learnt, held, k.holdout)

    def _chunks(self, pools: list[list[Member]], rng: np.random.Generator) -> list[Chunk]:
        k = self.knobs
        if k.sampling == "balanced":
            return balanced(pools, k.order, rng)
        return shuffled(pools, 1 if k.sampling == "sequence" else len(k.systems), rng)

    def _rows(self, chunks: list[Chunk], train: Train, seed: int) -> Rows:
        """Chunks as rows: what sees each other is one text, with weights by the kind of mean."""
        context, bins = train.context, train.batch * train.accumulate * dist.world()
        parts = [part for chunk in chunks for part in parted(chunk, context)]
        self._facts = {**self._facts, "chunks": len(chunks), "chunks parted at the context": len(parts) - len(chunks)}
        weighed = [(part, _weights(part, self.knobs.loss)) for part in parts]
        if self.knobs.attention == "example" or self.knobs.sampling == "sequence":
            texts = [([ids], [w]) for part, ws in weighed for (ids, _), w in zip(part, ws, strict=True)]
        else:
            texts = [([ids for ids, _ in part], ws) for part, ws in weighed]
        if self.knobs.attention == "pack" and self.knobs.sampling != "sequence":
            together = bins * -(-32 // bins)
            plan = multipack([sum(map(len, ids)) for ids, _ in texts], context, together, seed)
            texts = [([i for t in b for i in texts[t][0]], [w for t in b for w in texts[t][1]]) for b in plan]
        made = Texts([np.concatenate(i).tolist() for i, _ in texts], [np.concatenate(w).tolist() for _, w in texts])
        alone = self.knobs.attention == "pack" or self.knobs.sampling == "sequence"
        rows = padded(made, context) if alone else packed(made, context, bins, seed)
        return replace(rows, facts=rows.facts | self._facts)


def _weights(chunk: Chunk, loss: str) -> list[np.ndarray]:
    """Weights of the tokens of each member: each learnt token 1, or what sums to 1 over a member or over the chunk."""
    counts = [int(learnt.sum()) for _, learnt in chunk]
    whole = sum(counts)
    over = {"token": [1] * len(chunk), "instruction": counts, "chunk": [whole] * len(chunk)}[loss]
    return [learnt / n for (_, learnt), n in zip(chunk, over, strict=True)]


def _require_place(renderer: Renderer, chats: list[tuple[int, Chat]], prompt: str) -> None:
    """UserError where the template shows no system prompt."""
    shown = next((c for _, c in chats if c.messages and c.messages[0]["content"] == prompt), None) if prompt else None
    if shown is None:
        return
    try:
        seen = prompt in renderer.render(shown).text
    except RefusedChat:
        return  # the row is refused, with its number, when it is encoded
    if not seen:
        raise UserError("the chat template has no place for a system prompt", "domains differ by it", "give data.chat_template")


def _cuts(aside: list[int]) -> list[list[slice]]:
    return [[slice(n, None) for n in aside], [slice(None, n) for n in aside]]


def _behind(learnt: Rows, held: Rows, holdout: float) -> Rows:
    """Rows whose last ones, as many as the runner holds out, come from `held` alone; they are repeated or left out as it needs."""
    n = len(learnt)
    h = next(h for h in range(1, 2 * n + 2) if max(1, round((n + h) * holdout)) == h)
    pick = torch.arange(h) % len(held)
    width = max(learnt.width, held.width)

    def both(name: str, fill: float) -> Any:
        a, b = getattr(learnt, name), getattr(held, name)
        return torch.cat([F.pad(a, (0, width - a.shape[1]), value=fill), F.pad(b[pick], (0, width - b.shape[1]), value=fill)])

    segments = None if learnt.segments is None else both("segments", -1)
    if segments is not None:  # texts are numbered on
        segments[n:][segments[n:] >= 0] += int(segments[:n].max()) + 1
    lengths = torch.cat([learnt.lengths, held.lengths[pick]])
    return Rows(both("ids", 0), both("labels", IGNORE), lengths, 0, learnt.facts | {"rows": n + h}, both("weights", 0), segments)


METHOD = Moi
