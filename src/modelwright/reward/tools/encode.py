"""Traces as token ids: which tokens are learnt and how much each counts; rows and batches of traced pairs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modelwright.core.data.rows import IGNORE, TokenRows
from modelwright.core.errors import UserError
from modelwright.reward.tools.traces import OBSERVATION, TOOL, WORK, Judged, Part, TracedPair, prompt_of

SPECIAL = (TOOL, OBSERVATION, WORK)


def with_special(tokenizer: Any) -> int:
    """Add the three tokens where they are missing; returns how many were."""
    if tokenizer is None:
        raise UserError("the checkpoint has no tokenizer", "traces are text", "add tokenizer files")
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no end token", "a trace ends with one", "give a tokenizer with eos_token")
    return int(tokenizer.add_tokens([t for t in SPECIAL if t not in tokenizer.get_vocab()], special_tokens=True))


def bare(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a piece, without what the tokenizer puts around a text."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_prompt(tokenizer: Any, question: str, answer: str, context: str = "") -> list[int]:
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return [*begin, *bare(tokenizer, prompt_of(question, answer, context))]


def encode(
    tokenizer: Any, pair: TracedPair, judged: Judged, weights: dict[Part, float], learn_answer: bool = False
) -> tuple[list[int], list[float]]:
    """Token ids of prompt, trace and end token, and the weight of each as a target.

    Each piece of one kind is tokenised for itself, so that no token belongs to two. The end token is the rationale's.
    """
    if learn_answer:
        whole = prompt_of(pair.question, judged.answer, pair.context)
        at = len(whole) - len(prompt_of("", judged.answer)) + len(prompt_of("", "").partition("Answer")[0])
        begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        masked, learnt = [*begin, *bare(tokenizer, whole[:at])], bare(tokenizer, whole[at:])
        ids, found = [*masked, *learnt], [0.0] * len(masked) + [1.0] * len(learnt)
    else:
        ids = encode_prompt(tokenizer, pair.question, judged.answer, pair.context)
        found = [0.0] * len(ids)
    for kind, text in judged.trace.parts():
        piece = bare(tokenizer, text)
        ids += piece
        found += [weights[kind]] * len(piece)
    return [*ids, tokenizer.eos_token_id], [*found, weights["rationale"]]


@dataclass
class TracedRows(TokenRows):
    """Pairs in memory: chosen and rejected (T,) ids and the weights of their tokens, example_id."""

    made: list[dict[str, Any]]
    width: int
    facts: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0
    stops: list[int] = field(default_factory=list)
    packed: bool = False

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.made[i] | {"example_id": i}

    def split(self, at: int) -> tuple["TracedRows", "TracedRows"]:
        return TracedRows(self.made[:at], self.width, self.facts), TracedRows(self.made[at:], self.width, self.facts)

    @property
    def tokens(self) -> int:
        return sum(len(r["chosen"]) + len(r["rejected"]) for r in self.made)


def traced_rows(pairs: list[TracedPair], tokenizer: Any, context: int, weights: dict[Part, float], learn_answer: bool) -> TracedRows:
    """Rows of pairs; equal pairs and those longer than the context are left out and counted."""
    made, equal, long = [], 0, 0
    for pair in pairs:
        chosen = encode(tokenizer, pair, pair.chosen, weights, learn_answer)
        rejected = encode(tokenizer, pair, pair.rejected, weights)
        equal += chosen[0] == rejected[0]
        long += (size := max(len(chosen[0]), len(rejected[0]))) > context
        if chosen[0] == rejected[0] or size > context:
            continue
        row: dict[str, Any] = {"length": torch.tensor(size)}
        for name, (ids, found) in (("chosen", chosen), ("rejected", rejected)):
            row |= {name: torch.tensor(ids), f"{name}_weights": torch.tensor(found)}
        made.append(row)
    if not made:
        raise UserError("no traced pair can be used", f"{equal} are equal and {long} longer than {context} tokens", "raise train.context")
    facts = {"pairs": len(made), "left out: both answers are equal": equal, "left out: longer than the context": long}
    return TracedRows(made, max(int(r["length"]) for r in made), facts)


def traces_together(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of B pairs as 2B rows, the chosen first: input_ids, attention_mask, labels, weights and real (2B, T), example_id (2B,)."""
    nothing = torch.zeros(0)
    both = [(r.get(k, nothing.long()), r.get(f"{k}_weights", nothing)) for k in ("chosen", "rejected") for r in rows]
    longest = max(2, *(len(ids) for ids, _ in both))
    batch = {
        "input_ids": torch.zeros(len(both), longest, dtype=torch.long),
        "weights": torch.zeros(len(both), longest),
        "real": torch.zeros(len(both), longest, dtype=torch.bool),
    }
    for i, (ids, weights) in enumerate(both):
        batch["input_ids"][i, : len(ids)], batch["weights"][i, : len(ids)], batch["real"][i, : len(ids)] = ids, weights, True
    batch["labels"] = torch.where(batch["weights"] > 0, batch["input_ids"], IGNORE)
    seen = batch["real"] | (~batch["real"].any(1, keepdim=True) & (torch.arange(longest) == 0))  # attention needs a token
    example = torch.tensor([r["example_id"] for r in rows])
    return batch | {"attention_mask": seen.long(), "example_id": torch.cat([example, example])}
