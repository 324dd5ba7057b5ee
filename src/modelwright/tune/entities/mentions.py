"""Rows of sentences with linked entities: `[f(e)] / mention` in the place of each mention, and which tokens are to be found again."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from modelwright.core.data.read import iter_rows
from modelwright.core.data.rows import IGNORE, Rows
from modelwright.core.errors import UserError, shown
from modelwright.core.knobs import Data

MARK = "/"  # stands between a mapped vector and its mention


@dataclass(frozen=True)
class Sentence:
    """A text and its mentions: (first character, one behind the last, entity id), in order."""

    text: str
    mentions: list[tuple[int, int, str]]


@dataclass
class Spliced:
    """Token ids; the mentions' places (first, one behind the last); the places of the mapped vectors."""

    ids: list[int]
    spans: list[tuple[int, int]] = field(default_factory=list)
    vectors: list[int] = field(default_factory=list)


def read_sentences(data: Data) -> list[Sentence]:
    """Rows with `text` and `entities` ({id, start, end} each), or FewRel's `tokens` with h and t (or head and tail)."""
    found = []
    for number, row in enumerate(iter_rows(data), 1):
        try:
            sentence = _spans(row) if "entities" in row else _fewrel(row)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            sentence = None
        if sentence is None or any(not 0 <= a < b <= len(sentence.text) for a, b, _ in sentence.mentions):
            raise UserError(
                f"row {number} of {data.path} has no linked mentions",
                f"it holds {shown(row)}",
                "give text and entities: [{id, start, end}], or FewRel's tokens, h and t",
            )
        found.append(Sentence(sentence.text, sorted(sentence.mentions)))
    if not found:
        raise UserError(f"{data.path} holds no text", "it has no rows", "give data with at least one row")
    return found


def _spans(row: dict[str, Any]) -> Sentence:
    return Sentence(row["text"], [(int(e["start"]), int(e["end"]), str(e["id"])) for e in row["entities"] or []])


def _fewrel(row: dict[str, Any]) -> Sentence:
    tokens = row["tokens"]
    ends = np.cumsum([len(t) + 1 for t in tokens])
    mentions = []
    for name, other in (("h", "head"), ("t", "tail")):
        one = row.get(name) or row[other]
        entity, places = (one["type"], one["indices"]) if isinstance(one, dict) else (one[1], one[2])
        at = places[0]  # the first mention
        mentions.append((int(ends[at[0]]) - len(tokens[at[0]]) - 1, int(ends[at[-1]]) - 1, str(entity)))
    return Sentence(" ".join(tokens), mentions)


# ---- splicing ------------------------------------------------------------------------------------------------------------
def splice(sentence: Sentence, ids: list[int], offsets: list[tuple[int, int]], places: dict[str, int], mark: list[int]) -> Spliced:
    """Ids with a vector's id and the mark before each mention whose entity has one; `places` maps an entity to the id of its vector."""
    out, done, last = Spliced([]), 0, 0
    for begin, end, entity in sentence.mentions:
        inside = [i for i, (a, b) in enumerate(offsets) if b > begin and a < end and b > a]
        if not inside or inside[0] < done or begin < last:
            continue  # it overlaps with the one before
        out.ids += ids[done : inside[0]]
        if entity in places:
            out.vectors.append(len(out.ids))
            out.ids += [places[entity], *mark]
            out.spans.append((len(out.ids), len(out.ids) + len(inside)))
        out.ids += ids[inside[0] : inside[-1] + 1]
        done, last = inside[-1] + 1, end
    out.ids += ids[done:]
    return out


def mention_rows(
    sentences: list[Sentence],
    tokenizer: Any,
    places: dict[str, int],
    context: int,
    *,
    masked: bool,
    learn: str = "mentions",
    plain: bool = False,
) -> Rows:
    """Rows in memory. A masked model gets one for each mention and one with all mentions hidden; a decoder one for each sentence.

    learn: 'mentions' or 'text', whose tokens are the targets. `plain` leaves the vectors and marks out again: the control.
    Sentences without a vector and those longer than the context are left out, and counted.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError("the tokenizer is a slow one or missing", "mentions are found by their place in the text", "give a tokenizer.json")
    counts = dict.fromkeys(
        ("sentences", "mentions", "mentions without a vector", "left out: no entity has a vector", "left out: longer than the context"), 0
    )
    mark = tokenizer(MARK, add_special_tokens=False)["input_ids"]
    around = _around(tokenizer, masked)
    encoded = tokenizer([s.text for s in sentences], add_special_tokens=False, return_offsets_mapping=True)
    made: list[tuple[list[int], list[int]]] = []
    for sentence, ids, offsets in zip(sentences, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        one = splice(sentence, ids, offsets, places, mark)
        counts["sentences"] += 1
        counts["mentions"] += len(sentence.mentions)
        counts["mentions without a vector"] += sum(e not in places for *_, e in sentence.mentions)
        if not one.vectors:
            counts["left out: no entity has a vector"] += 1
        elif len(one.ids) + len(around[0]) + len(around[1]) > context:
            counts["left out: longer than the context"] += 1
        else:
            made += _instances(_without(one, len(mark)) if plain else one, around, tokenizer.mask_token_id if masked else None, learn)
    if not made:
        raise UserError(
            "no sentence has anything to learn", ", ".join(f"{k}: {n}" for k, n in counts.items() if n), "check ids, or raise context"
        )
    width = max(len(ids) for ids, _ in made)
    rows = Rows(torch.zeros(len(made), width, dtype=torch.int32), torch.full((len(made), width), IGNORE), torch.zeros(len(made)).long())
    for i, (ids, labels) in enumerate(made):
        rows.ids[i, : len(ids)], rows.labels[i, : len(ids)] = torch.tensor(ids, dtype=torch.int32), torch.tensor(labels)
        rows.lengths[i] = len(ids)
    rows.facts |= {"rows": len(made), "tokens": rows.tokens, **counts}
    return rows


def _around(tokenizer: Any, masked: bool) -> tuple[list[int], list[int]]:
    if masked:
        return [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    bare, whole = (tokenizer("a", add_special_tokens=s)["input_ids"] for s in (False, True))
    return ([tokenizer.bos_token_id] if whole[:1] == [tokenizer.bos_token_id] and whole != bare else []), []


def _without(one: Spliced, mark: int) -> Spliced:
    """The same mentions with neither vectors nor marks."""
    drop = {at + k for at in one.vectors for k in range(1 + mark)}
    kept = np.cumsum([i not in drop for i in range(len(one.ids))])
    spans = [(int(kept[a]) - 1, int(kept[b - 1])) for a, b in one.spans]
    return Spliced([t for i, t in enumerate(one.ids) if i not in drop], spans)


def _instances(one: Spliced, around: tuple[list[int], list[int]], mask: int | None, learn: str) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, labels) of a sentence."""
    before, after = around
    if learn == "text":
        vectors = set(one.vectors)
        labels = [IGNORE if i in vectors else t for i, t in enumerate(one.ids)]
        yield (one.ids, labels) if mask is not None else ([*before, *one.ids], [*[IGNORE] * len(before), *labels])
        return
    groups = [[s] for s in one.spans] if mask is not None else []
    for spans in [*groups, *([one.spans] if len(one.spans) > 1 or mask is None else [])]:
        hidden = {i for a, b in spans for i in range(a, b)}
        ids = [mask if mask is not None and i in hidden else t for i, t in enumerate(one.ids)]
        labels = [t if i in hidden else IGNORE for i, t in enumerate(one.ids)]
        yield [*before, *ids, *after], [*[IGNORE] * len(before), *labels, *[IGNORE] * len(after)]
