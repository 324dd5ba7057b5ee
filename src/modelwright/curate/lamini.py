"""LaMini's way to make instructions: from a few examples, or from examples and topics, and then a response to each.

When to use it: a seed set of instructions, a model to write, and the wish for many more of the kind.

Paper: OpenBezoar (arXiv 2404.12195), first of its three schemes, which takes it from LaMini-LM (2304.14402). OpenBezoar's code is not
public; what the steps are is a reconstruction, and all wording is ours.

1. Example-guided: each request shows `examples` random seeds and asks for `ask` more of the kind.
2. Topic-guided: a share of the requests (`topic_share`) also shows `topics_shown` random topics. Of a table of topics with a column
   `subcategories`, those with more than 10 of them and fewer than 3 words are used; of a plain list all of them.
3. New instructions are compared with the seeds and with each other; each then gets a response in a request of its own.

Rows say their scheme (lamini examples, lamini topics), their generator and the seeds they were made from.
"""

from dataclasses import dataclass
from pathlib import Path
from random import Random

from modelwright.core.ask.desk import Desk
from modelwright.core.ask.protocol import Prompt
from modelwright.core.data.tables import records
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Generator, knob
from modelwright.core.step import EvalResult, StepContext
from modelwright.curate.generators.eliminate import instruction_fault, response_fault
from modelwright.curate.generators.overlap import Seen
from modelwright.curate.generators.replies import numbered
from modelwright.curate.generators.rows import Harvest, Row, read_rows
from modelwright.curate.generators.writers import open_writer


@dataclass(frozen=True)
class Knobs(Generator):
    data: Data = knob(Data(), "seed instructions: a table or hub dataset with instruction (and input or context)")
    topics: str | None = knob(None, "topics: a text file, one a line, or a table with topic and perhaps subcategories", path=True)
    size: int = knob(1000, "instructions to make", low=1)
    examples: int = knob(3, "seeds in a request", low=1)
    ask: int = knob(20, "new instructions in a request", low=1)
    topics_shown: int = knob(3, "topics in a topic-guided request", low=1)
    topic_share: float = knob(0.5, "share of the requests that are topic-guided, where topics are given", low=0, high=1)
    rounds: int = knob(3, "times that the missing instructions are asked for, at most", low=1)
    temperature: float = knob(1.0, "of the writer of instructions; responses are greedy", low=0)
    max_tokens: int = knob(2048, "tokens of a reply, at most", low=1)


@dataclass(frozen=True)
class Draft:
    """A new instruction, the seeds that were shown for it, and its scheme."""

    text: str
    seeds: tuple[int, ...]
    scheme: str


def lamini(knobs: Knobs, job: StepContext) -> EvalResult:
    """Write dataset.jsonl and removed.jsonl."""
    seeds = read_rows(knobs.data)
    topics = read_topics(Path(knobs.topics)) if knobs.topics else []
    desk, rng, harvest = open_writer(knobs, job.folder, job.seed), Random(job.seed), Harvest()  # noqa: S311
    with job.progress.task("instructions") as desk.tick:
        drafts = _drafts(knobs, seeds, topics, (desk, rng, harvest))
    prompts = [Prompt((("user", d.text),), knobs.max_tokens) for d in drafts]
    with job.progress.task("responses", len(prompts)) as desk.tick:
        answers = desk(prompts)
    for draft, answer in zip(drafts, answers, strict=True):
        place = draft.seeds[0]
        if answer.failed:
            harvest.drop(f"request failed: {answer.status}", place, instruction=draft.text)
        elif reason := response_fault(answer.text):
            harvest.drop(reason, place, instruction=draft.text, response=answer.text)
        else:
            row = Row(draft.text, answer.text, "", place)
            harvest.keep(row, scheme=draft.scheme, generator=desk.judge.name, seeds=list(draft.seeds))
    harvest.write(job.folder)
    text = f"{len(harvest.kept):,} instructions with responses, from {len(seeds):,} seeds and {len(topics):,} topics."
    return harvest.finding(text, desk.plain(), {"seeds": len(seeds), "topics": len(topics), "wanted": knobs.size})


def read_topics(file: Path) -> list[str]:
    """The topics of a list, or those of a table that are broad and short. Raises UserError where none is left."""
    if file.suffix == ".txt":
        if not file.is_file():
            raise UserError(f"no file at {file}", how="check the path")
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        rows = [r for r in records(file) if isinstance(r.get("topic"), str)]
        found = [r["topic"] for r in rows if "subcategories" not in r or (int(r["subcategories"]) > 10 and len(r["topic"].split()) < 3)]
    if not found:
        raise UserError(f"{file} holds no topic", "of a table, broad topics of one or two words are used", "give a list, one a line")
    return found


def request(examples: list[str], topics: list[str], ask: int) -> str:
    """The text of one request for instructions."""
    shown = "\n\n".join(f"### Example {i}\n{text}" for i, text in enumerate(examples, 1))
    about = f" Each is about one of these topics: {'; '.join(topics)}." if topics else ""
    form = "Write each under a heading of its own, ### Instruction 1 and so on, and nothing else."
    return f"{shown}\n\nWrite {ask} new instructions of the same kind, each different and complete in itself.{about} {form}"


def _drafts(knobs: Knobs, seeds: list[Row], topics: list[str], tools: tuple[Desk, Random, Harvest]) -> list[Draft]:
    """New instructions, until there are enough, the rounds are used up, or a round gives none."""
    desk, rng, harvest = tools
    seen, drafts = Seen(s.instruction for s in seeds), list[Draft]()
    for round_number in range(knobs.rounds):
        missing, before = knobs.size - len(drafts), len(drafts)
        if missing <= 0:
            break
        asked = []
        for _ in range(-(-missing // knobs.ask)):
            shown = rng.sample(seeds, min(knobs.examples, len(seeds)))
            about = rng.sample(topics, min(knobs.topics_shown, len(topics))) if topics and rng.random() < knobs.topic_share else []
            asked.append((shown, about, request([s.instruction for s in shown], about, knobs.ask)))
        prompts = [Prompt((("user", text),), knobs.max_tokens, knobs.temperature, attempt=round_number) for _, _, text in asked]
        for (shown, about, _), answer in zip(asked, desk(prompts), strict=True):
            if answer.failed:
                harvest.drop(f"request failed: {answer.status}", shown[0].place)
            for text in numbered(answer.text, "Instruction"):
                if reason := instruction_fault(text) or ("repeats an instruction" if text in seen else ""):
                    harvest.drop(reason, shown[0].place, instruction=text)
                elif len(drafts) < knobs.size:
                    seen.add(text)
                    drafts.append(Draft(text, tuple(s.place for s in shown), "lamini topics" if about else "lamini examples"))
        if len(drafts) == before:
            break
    return drafts


METHOD = lamini
