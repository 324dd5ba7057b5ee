"""Rows of questions with a choice of answers, the right one and a rationale, read from a table and tokenised.

The layouts of the usual sets are understood: choices as a list or as {label, text} (CommonsenseQA, OpenBookQA, ARC), the answer as an
index, a label, the text itself or true and false (StrategyQA), the rationale as a text or as a list of sentences.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modelwright.core.data.read import read_table
from modelwright.core.data.rows import TokenRows
from modelwright.core.data.tables import column
from modelwright.core.errors import UserError, shown
from modelwright.core.knobs import Data

CUE = "\nAnswer:"  # what a decoder reads between the question and an answer


@dataclass(frozen=True)
class Columns:
    """Names of the columns; `prompt` is the text of the question with {question} and {choices} filled in."""

    question: str = "question"
    choices: str = "choices"
    answer: str = "answer"
    rationale: str = "rationale"
    prompt: str = "{question}"
    labels: tuple[str, ...] = ()  # the same choices for every question


@dataclass(frozen=True)
class Question:
    """One row as text."""

    prompt: str
    choices: list[str]
    gold: int
    rationale: str


@dataclass(frozen=True)
class Tokens:
    """One row as ids: x (X,) the question, r (R,) the rationale, y the answers, each (L,); `gold` is the right one."""

    x: Tensor
    r: Tensor
    y: list[Tensor]
    gold: int


@dataclass
class ChoiceRows(TokenRows):
    """Rows in memory. `at` numbers the rows of the whole that this part holds."""

    items: list[Tokens]
    at: list[int]
    width: int = 0
    bytes: int = 0
    packed: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    stops: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        t = self.items[self.at[i]]
        return {"input_ids": t.x, "length": torch.tensor(len(t.x)), "example_id": i, "rationale": t.r, "answers": t.y, "gold": t.gold}

    def split(self, at: int) -> tuple["ChoiceRows", "ChoiceRows"]:
        return replace(self, at=self.at[:at]), replace(self, at=self.at[at:])

    @property
    def tokens(self) -> int:
        return sum(len(self.items[i].x) + sum(len(y) for y in self.items[i].y) for i in self.at)


# ---- reading -------------------------------------------------------------------------------------------------------------
def read_questions(data: Data, names: Columns, rationales: bool) -> tuple[list[Question], dict[str, int]]:
    """The rows of a table as text, and what was counted. UserError for a row that cannot be used, by its number."""
    table = read_table(data)
    asked, answers = (column(data.path, table, n) for n in (names.question, names.answer))
    told = column(data.path, table, names.rationale) if rationales else [""] * len(asked)
    fixed = list(names.labels) or (["no", "yes"] if all(isinstance(a, bool) for a in answers) else [])
    given = [fixed] * len(asked) if fixed else column(data.path, table, names.choices)
    found = []
    for i, (q, c, a, r) in enumerate(zip(asked, given, answers, told, strict=True), 1):
        if data.limit and i > data.limit:
            break
        texts, labels = _choices(c, i)
        if not isinstance(q, str) or not q.strip():
            raise UserError(f"row {i} of {data.path} has no question", f"it is {shown(q)}", "repair or remove the row")
        listed = " ".join(f"({chr(97 + k)}) {t}" for k, t in enumerate(texts))
        prompt = names.prompt.replace("{choices}", listed).replace("{question}", q)
        found.append(Question(prompt, texts, _gold(a, texts, labels, i), _joined(r)))
    without = sum(not q.rationale for q in found)
    if rationales and without == len(found):
        raise UserError(
            f"column '{names.rationale}' of {data.path} is empty", "no question has a rationale", "choose another column, or way: i_o"
        )
    return found, {"questions": len(found), **({"without a rationale": without} if rationales else {})}


def _choices(value: Any, row: int) -> tuple[list[str], list[str]]:
    """Texts of the choices and their labels."""
    labels = []
    if isinstance(value, dict) and "text" in value:
        value, labels = list(value["text"]), [str(v) for v in value.get("label", [])]
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise UserError(f"row {row} has no list of choices", f"it holds {shown(value)}", "give a list of texts, or labels for all rows")
    if len(set(value)) != len(value) or len(value) < 2:
        raise UserError(f"row {row} has {len(set(value))} different choices", "there must be two or more, none twice", "repair the row")
    return value, labels


def _gold(value: Any, texts: list[str], labels: list[str], row: int) -> int:
    if isinstance(value, (bool, int)) and 0 <= int(value) < len(texts):
        return int(value)
    for names in (texts, labels):
        if str(value) in names:
            return names.index(str(value))
    raise UserError(f"row {row} has the answer {shown(value)}", f"its choices are {', '.join(texts)}", "give an index, a label or the text")


def _joined(value: Any) -> str:
    return " ".join(str(v).strip() for v in value) if isinstance(value, list) else str(value or "").strip()


# ---- tokens --------------------------------------------------------------------------------------------------------------
def encode(questions: list[Question], tokenizer: Any, context: int, pairs: bool, story: bool = False) -> ChoiceRows:
    """Rows of the questions. The question has the same tokens with a rationale and without one.

    pairs: for an encoder and a decoder. story: one answer a question, the rationale before the right choice (I -> RO).
    A rationale is cut where it does not fit the context with its question; a question that does not fit is left out; both are counted.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    begin = [] if pairs or tokenizer.bos_token_id is None or ids("a") == tokenizer("a")["input_ids"] else [int(tokenizer.bos_token_id)]
    space = "" if pairs else " "
    counts, items = {"left out: longer than the context": 0, "rationales cut": 0}, []
    for q in questions:
        x = [*begin, *ids(q.prompt), *(end if pairs else [])]
        texts = [f"{q.rationale} {q.choices[q.gold]}".strip()] if story else q.choices
        y = [[*ids(space + t), *end] for t in texts]
        room = context - len(x) - (0 if pairs else len(ids(CUE)) + max(map(len, y)))
        if room < 0 or max(map(len, y)) > context:
            counts["left out: longer than the context"] += 1
            continue
        r = [] if story else ids(q.rationale)
        r = [*r, *end] if r and pairs else r
        counts["rationales cut"] += len(r) > room
        items.append(Tokens(_tensor(x), _tensor(r[:room]), [_tensor(v) for v in y], 0 if story else q.gold))
    if not items:
        raise UserError(f"no question fits a context of {context}", "each is left out", "raise train.context")
    width = max(len(t.x) + len(t.r) + (0 if pairs else len(ids(CUE)) + max(map(len, t.y))) for t in items)
    return ChoiceRows(items, list(range(len(items))), width, facts={"rows": len(items), **counts})


def _tensor(ids: list[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.long)
