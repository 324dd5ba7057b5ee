"""Evol-Instruct: a model makes instructions harder or rarer round by round, answers them, and drops what failed.

When to use it: simple instructions, and the wish for harder ones of the same field.

Paper: OpenBezoar (arXiv 2404.12195), second of its schemes, which takes it from WizardLM (2304.12244). OpenBezoar's code is not public:
the steps are a reconstruction from the literature, and all wording is ours.

Each of `rounds` rounds takes every instruction of the pool and one operator, all with the same chance:
- in depth: add a constraint, deepen, make concrete, ask for more steps of reasoning, complicate the input; each may add 10 to 20 words;
- in breadth: a new, rarer instruction of the same field.
The generator answers the new instruction, and says whether it asks for the same as the old one. The new one is dropped where it does (no
gain), where the words of the request leaked into it or it did not change, and where the response says sorry in fewer than 80 words or
has stop words alone. A dropped one leaves the old instruction in the pool; a kept one takes its place, and is a row of the data.
"""

from collections import Counter
from dataclasses import dataclass, replace
from random import Random

from modelwright.core.ask.desk import Desk
from modelwright.core.ask.protocol import Answer, Prompt
from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Data, Generator, knob
from modelwright.core.step import EvalResult, StepContext
from modelwright.curate.generators.eliminate import instruction_fault, response_fault
from modelwright.curate.generators.replies import numbered, one_word
from modelwright.curate.generators.rows import Harvest, Row, read_rows
from modelwright.curate.generators.writers import open_writer

OPERATORS = {
    "constraint": "Add one more constraint or requirement to it.",
    "deepen": "Make it ask for more depth and breadth on its subject.",
    "concrete": "Replace a general notion in it by a more specific one.",
    "reasoning": "Change it so that answering takes several explicit steps of reasoning.",
    "input": "Add an input to it, such as a table, a formula or a piece of code, that the answer must use.",
    "breadth": "",
}
_FORM = "Write the new instruction under the heading ### Instruction, and nothing else."


@dataclass(frozen=True)
class Knobs(Generator):
    data: Data = knob(Data(), "instructions: a table or hub dataset with instruction (and input or context)")
    rounds: int = knob(4, "rounds of evolution", low=1)
    operators: list[str] = knob(["constraint", "deepen", "concrete", "reasoning", "input", "breadth"], "operators to draw from")
    temperature: float = knob(1.0, "of the writer of instructions; responses and verdicts are greedy", low=0)
    max_tokens: int = knob(2048, "tokens of a reply, at most", low=1)


def evol(knobs: Knobs, job: StepContext) -> EvalResult:
    """Write dataset.jsonl and removed.jsonl."""
    for name in knobs.operators:
        if name not in OPERATORS:
            raise UserError(f"there is no operator '{name}'", how=did_you_mean(name, OPERATORS))
    if not knobs.operators:
        raise UserError("operators is empty", "nothing would change", f"name some of {', '.join(OPERATORS)}")
    pool = read_rows(knobs.data)
    desk, rng, harvest = open_writer(knobs, job.folder, job.seed), Random(job.seed), Harvest()  # noqa: S311
    used: Counter[str] = Counter()
    for number in range(1, knobs.rounds + 1):
        with job.progress.task(f"round {number}", 3 * len(pool)) as desk.tick:
            pool = _round(pool, number, knobs, (desk, rng, harvest), used)
    harvest.write(job.folder)
    failed = sum(harvest.reasons.values())
    text = f"{len(harvest.kept):,} instructions from {len(pool):,} in {knobs.rounds} rounds; {failed:,} attempts failed."
    return harvest.finding(text, desk.plain(), {"pool": len(pool), "kept_by_operator": dict(used)})


def rewrite(instruction: str, operator: str) -> str:
    """The request for one evolution."""
    if operator == "breadth":
        wish = "Write one new instruction of the same field that is rarer and about as long and as difficult."
    else:
        wish = f"Rewrite it so that it is a little harder. {OPERATORS[operator]} Add 10 to 20 words and no more."
    return f"Here is an instruction:\n\n{instruction}\n\n{wish} It must be clear and possible to answer. {_FORM}"


def compare(old: str, new: str) -> str:
    """The question whether two instructions ask for the same."""
    asked = "Do they have the same constraints, the same depth and the same breadth of what is asked?"
    return f"First instruction:\n{old}\n\nSecond instruction:\n{new}\n\n{asked} Answer with one word: equal or different."


def _round(pool: list[Row], number: int, knobs: Knobs, tools: tuple[Desk, Random, Harvest], used: Counter[str]) -> list[Row]:
    """One round over the pool; returns the pool after it."""
    desk, rng, harvest = tools
    operators = [rng.choice(knobs.operators) for _ in pool]
    wishes = [rewrite(row.instruction, op) for row, op in zip(pool, operators, strict=True)]
    replies = desk(Prompt((("user", text),), knobs.max_tokens, knobs.temperature, attempt=number - 1) for text in wishes)
    drafts: dict[int, str] = {}
    for i, (row, reply) in enumerate(zip(pool, replies, strict=True)):
        new = (numbered(reply.text, "Instruction") or [""])[0]
        reason = _failed(reply) or ("no instruction in the reply" if not new else instruction_fault(new, row.instruction))
        if reason:
            harvest.drop(reason, row.place, instruction=new)
        else:
            drafts[i] = new
    answers = dict(zip(drafts, desk(Prompt((("user", new),), knobs.max_tokens) for new in drafts.values()), strict=True))
    doubts = [Prompt((("user", compare(pool[i].instruction, new)),), 8) for i, new in drafts.items()]
    verdicts = dict(zip(drafts, desk(doubts), strict=True))
    after = list(pool)
    for i, new in drafts.items():
        said, verdict = answers[i], one_word(verdicts[i].text, ("equal", "different"))
        reason = _failed(said) or response_fault(said.text) or _failed(verdicts[i])
        reason = reason or {"equal": "no gain", "": "gain is not known"}.get(verdict, "")
        if reason:
            harvest.drop(reason, pool[i].place, instruction=new, response=said.text)
            continue
        used[operators[i]] += 1
        after[i] = replace(pool[i], instruction=new, response=said.text)
        harvest.keep(after[i], scheme="evol", operator=operators[i], round=number, generator=desk.judge.name)
    return after


def _failed(answer: Answer) -> str:
    return f"request failed: {answer.status}" if answer.failed else ""


METHOD = evol
