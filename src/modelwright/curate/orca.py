"""Orca's explanation traces: questions with system messages that ask for an explained answer, answered by a stronger model.

When to use it: tasks whose gold answers are short, and a student that shall learn how an answer is reached.

Paper: OpenBezoar (arXiv 2404.12195), third of its schemes, which takes it from Orca (2306.02707) over the FLAN collection. OpenBezoar's
code is not public. Which of the sixteen system messages goes with which part of FLAN is a reconstruction, and their wording is ours.

Each question is asked `messages` times, each time under another system message. A column `collection` (cot, niv2, t0, flan2021) limits the
choice to the messages of that part; without it all sixteen are drawn from. The gold answer, where the data has one, stays in the row as
`gold`: curate.judge_filter rejects a trace that contradicts it. A response that says sorry or nothing is dropped.
"""

from dataclasses import dataclass, replace
from random import Random

from modelwright.core.ask.protocol import Prompt
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Generator, knob
from modelwright.core.step import EvalResult, StepContext
from modelwright.curate.generators.eliminate import response_fault
from modelwright.curate.generators.rows import Harvest, Row, read_rows
from modelwright.curate.generators.writers import open_writer

SYSTEM = (
    "",
    "You are an assistant. Answer in detail, so that the person needs to look nothing up.",
    "You are an assistant. You are given a task; write a long and detailed answer.",
    "You are a helpful assistant who always explains. Think of answering a child of five years.",
    "You are an assistant who follows instructions very well. Help as much as you can.",
    "You are an assistant who helps people to find information. Answer in detail, so that they need not search further.",
    "You are an assistant. Do the task as faithfully as you can. Think step by step and justify each step.",
    "Explain how you used the definition to arrive at the answer.",
    "Describe the task in your own words before you do it, and then do it step by step.",
    "You know many languages and translate well. Explain what you do while you do the task.",
    "Given a definition of a task and an input, break the definition into small parts. Follow each part on the input and explain it.",
    "Think as if you answered a child of five years, and say how you got there.",
    "Say first which rule or definition applies. Then apply it to the input, step by step.",
    "You are a teacher. Explain in simple steps what is asked, and answer with an example where it helps.",
    "You are given a task and an input. Find the parts of the input that matter, say why, and then answer.",
    "You help people to find information. Think step by step like somebody who wants to be sure, and justify the answer.",
)
PARTS = {  # which messages go with which part of FLAN: a reconstruction
    "cot": (5, 10, 15),
    "niv2": (0, 1, 4, 6, 8, 11, 12, 13, 14),
    "t0": (0, 1, 2, 4, 6),
    "flan2021": (2, 3, 6, 7, 9),
}


@dataclass(frozen=True)
class Knobs(Generator):
    data: Data = knob(Data(), "questions: a table or hub dataset with instruction, question or inputs; and gold answers, collections")
    messages: int = knob(1, "system messages per question", low=1, high=16)
    gold: str = knob("", "column of the gold answer; empty: target, targets, gold, answer or response, whichever is there")
    collection: str = knob("collection", "column that says cot, niv2, t0 or flan2021")
    temperature: float = knob(0.0, "of the generator", low=0)
    max_tokens: int = knob(1024, "tokens of a response, at most", low=1)


_GOLD = ("target", "targets", "gold", "answer", "response", "output")


def orca(knobs: Knobs, job: StepContext) -> EvalResult:
    """Write dataset.jsonl and removed.jsonl."""
    rows = read_rows(knobs.data)
    gold = [gold_of(row, knobs.gold) for row in rows]
    desk, rng, harvest = open_writer(knobs, job.folder, job.seed), Random(job.seed), Harvest()  # noqa: S311
    asked = [(row, i, system) for i, row in enumerate(rows) for system in systems(row, knobs.collection, knobs.messages, rng)]
    prompts = [
        Prompt(
            ((("system", SYSTEM[system]),) if SYSTEM[system] else ()) + (("user", row.instruction),), knobs.max_tokens, knobs.temperature
        )
        for row, _, system in asked
    ]
    with job.progress.task("traces", len(prompts)) as desk.tick:
        answers = desk(prompts)
    for (row, i, system), answer in zip(asked, answers, strict=True):
        reason = f"request failed: {answer.status}" if answer.failed else response_fault(answer.text)
        if reason:
            harvest.drop(reason, row.place, instruction=row.instruction, response=answer.text)
            continue
        made = replace(row, response=answer.text, system=SYSTEM[system])
        origin = {"gold": gold[i]} if gold[i] else {}
        harvest.keep(made, scheme="orca", message=system + 1, generator=desk.judge.name, **origin)
    harvest.write(job.folder)
    with_gold = sum(map(bool, gold))
    text = f"{len(harvest.kept):,} traces of {len(rows):,} questions, {with_gold:,} of which have a gold answer."
    return harvest.finding(text, desk.plain(), {"questions": len(rows), "with_gold": with_gold})


def _prompt(row: Row, system: str, knobs: Knobs) -> Prompt:
    before = (("system", system),) if system else ()
    return Prompt((*before, ("user", row.instruction)), knobs.max_tokens, knobs.temperature)


def systems(row: Row, column: str, n: int, rng: Random) -> list[int]:
    """Numbers of the system messages under which a question is asked. Raises UserError for an unknown part of FLAN."""
    part = row.columns.get(column)
    if part is not None and str(part).lower() not in PARTS:
        why = f"row {row.place + 1} has {str(part)[:40]!r} in '{column}'"
        raise UserError("a part of FLAN is not known", why, f"write one of {', '.join(PARTS)}, or name another column")
    among = PARTS[str(part).lower()] if part is not None else range(len(SYSTEM))
    return sorted(rng.sample(list(among), min(n, len(among))))


def gold_of(row: Row, column: str) -> str:
    """The gold answer of a row; empty where it has none. Raises UserError for a named column that is not there."""
    if column and row.columns.get(column) is None:
        raise UserError(f"row {row.place + 1} has no '{column}'", "gold answers are read there", "check --gold")
    value = row.columns.get(column) if column else next((row.columns[n] for n in _GOLD if row.columns.get(n) is not None), None)
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value).strip()


METHOD = orca
