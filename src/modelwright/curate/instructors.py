"""LLMs-as-Instructors: a stronger model writes new tasks about what the checkpoint gets wrong, and each is checked before it is kept.

When to use it: a small model, graded tasks, and access to a stronger model at an endpoint or as a checkpoint.

Paper: LLMs-as-Instructors (arXiv 2407.00497). One call of this step is one cycle; the recipe `instructors` has three, each followed by
training, and each grades the model of the one before.

1. The student answers every task greedily, and is graded. `response` names a column of recorded answers instead.
2. LE (Learning from Error): one call for each wrong answer. The instructor sees the question and the wrong answer, not the right one, and
   writes m = ceil(sample_size / wrong) + 1 new tasks with worked answers.
   LEC (by Contrast): the call also shows the `k` nearest questions that the student can do. With k = 0 it is LE to the last character.
   Controls: `mimic` shows the wrong question without the answer, `random` any question.
3. Samples are read, checked, and compared with the tasks, with each other and with test sets (`tests`). `sample_size` of each kind stay.

Kinds of tasks, by their columns: numbers (question, answer), choices (question, A to D, answer), code (prompt, test, entry_point).

The published code differs in this:
- It reads code from the first `def` on, so that imports and helpers are lost. Here several ways to read an answer are tried, and it is
  wrong only where all fail (generators/grade.py). `--regrade FOLDER` grades the released answers by both.
- It keeps samples unchecked. Here arithmetic is computed again, code passes its own tests in the sandbox, and a choice must have four
  different options and not contradict itself; whether the choice is true is not known (generators/verify.py). `verify: false` is the
  published way.
- It does not look at test sets. Here a sample that has 13 words in a row from a test question, or is one, is removed.
- Its prompts ask for code without tests. The wording of all prompts here is ours.

Answers are kept (`cache`): a run that was stopped asks only for what is missing. A request that failed is counted, and asked again by
the next run.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from modelwright.core.ask.desk import Counts, Desk, failures
from modelwright.core.ask.kept import Kept
from modelwright.core.data.read import iter_rows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Generator, knob
from modelwright.core.step import EvalResult, StepContext
from modelwright.curate.generators.grade import Grade, Kind, grade, kind_of
from modelwright.curate.generators.lessons import Asked, Lesson, Settings, teach
from modelwright.curate.generators.overlap import Seen
from modelwright.curate.generators.regrade import regrade
from modelwright.curate.generators.tasks import question_of, to_student, trained_on
from modelwright.curate.generators.writers import open_writer


@dataclass(frozen=True)
class Knobs(Generator):
    data: Data = knob(Data(), "graded tasks of a training split: a table of numbers, choices or code")
    strategy: Literal["le", "lec", "mimic", "random"] = knob("le", "what the instructor sees: error; error and contrast; question; any")
    sample_size: int = knob(3000, "samples to keep of each kind of task", low=1)
    k: int = knob(3, "nearest right questions in an LEC call", low=0)
    encoder: str = knob("bert-base-uncased", "checkpoint for the nearest questions, or words: weighed word counts", path=True)
    response: str = knob("", "column with the student's recorded answers; empty: the checkpoint answers")
    answer_tokens: int = knob(1024, "tokens of a student's answer, at most", low=1)
    tests: list[str] = knob([], "test sets (tables of tasks) that no sample may repeat", path=True)
    overlap: int = knob(13, "words in a row that make a sample repeat a test question; 0: whole questions only", low=0)
    verify: bool = knob(True, "keep only samples that pass their check")
    rounds: int = knob(3, "times that every wrong answer is asked about, at most", low=1)
    temperature: float = knob(0.8, "of the instructor", low=0)
    max_tokens: int = knob(4095, "tokens of an instructor's reply, at most", low=1)
    regrade: str | None = knob(None, "grade the recorded answers in a folder again, and do nothing else", path=True)


Task = tuple[int, Kind, dict[str, Any]]  # row number, kind, row


def instructors(knobs: Knobs, job: StepContext) -> EvalResult:
    """One cycle: grade, ask, check. Writes dataset.jsonl (messages with their origin) and removed.jsonl."""
    if knobs.regrade:
        with job.progress.task("regrade") as tick:
            return regrade(Path(knobs.regrade), job.folder, tick)
    tasks = read_tasks(knobs.data, knobs.response)
    tests = Seen((question_of(kind, row) for _, kind, row in _test_tasks(knobs.tests)), knobs.overlap)
    repeated = sum(question_of(kind, row) in tests for _, kind, row in tasks)
    desk = open_writer(knobs, job.folder, job.seed)
    asked, graded, unanswered = _graded(tasks, knobs, job)
    if not any(not a.right for of in asked.values() for a in of):
        what = f"{len(tasks):,} tasks, {unanswered:,} without an answer, none answered wrongly"
        raise UserError("the student made no errors", what, "give harder tasks")
    s = Settings(knobs.strategy, knobs.sample_size, knobs.k, knobs.encoder, knobs.verify, knobs.rounds, knobs.temperature, knobs.max_tokens)
    rng = Random(job.seed)  # noqa: S311 - which samples stay, not a secret
    lessons: dict[Kind, Lesson] = {}
    for kind, of in asked.items():
        with job.progress.task(f"{knobs.strategy} {kind}") as desk.tick:
            lessons[kind] = teach(kind, of, desk, s, tests, rng)
    rows = _write(lessons, knobs.strategy, desk.judge.name, job.folder, rng)
    if not rows:
        lost = "; ".join(f"{n:,} {reason}" for reason, n in _reasons(lessons).most_common(3))
        raise UserError(
            "the instructor gave nothing usable", lost or "it was never asked", "ask a stronger model; --cache FILE keeps its answers"
        )
    return _finding(lessons, graded, desk.plain(), {"tasks": len(tasks), "unanswered": unanswered, "tasks_in_test_sets": repeated})


# ---- tasks and grades ---------------------------------------------------------------------------------------------------
def read_tasks(data: Data, response: str = "") -> list[Task]:
    """The tasks of a table. Raises UserError for a row that is no task, or whose gold answer or recorded answer is missing."""
    if not data.path:
        raise UserError("no tasks were given", how="give --data FILE, or --regrade FOLDER")
    found: list[Task] = []
    for i, row in enumerate(iter_rows(data)):
        kind, where = kind_of(row), f"row {i + 1} of {data.path}"
        if kind is None:
            why = "a task has question and answer, with A to D for choices, or prompt, test and entry_point"
            raise UserError(f"{where} is no task", why, "rename its columns, or drop it")
        gold = "test" if kind == "code" else "answer"
        if row[gold] is None or not str(row[gold]).strip():
            raise UserError(f"{where} has no gold answer", f"its column '{gold}' is empty", "fix or drop the row")
        if response and not isinstance(row.get(response), str):
            raise UserError(f"{where} has no text in '{response}'", "the student's answer is read there", "check --response")
        found.append((i, kind, row))
    if not found:
        raise UserError(f"{data.path} holds no tasks", "it has no rows", "give a table with at least one task")
    return found


def _test_tasks(files: list[str]) -> list[Task]:
    return [task for file in files for task in read_tasks(Data(file))]


def _graded(tasks: list[Task], knobs: Knobs, job: StepContext) -> tuple[dict[Kind, list[Asked]], dict[Kind, Counter[str]], int]:
    """By kind: the answered tasks, and how many grades of each sort there were; and how many tasks had no answer."""
    responses = _responses(tasks, knobs, job)
    asked: dict[Kind, list[Asked]] = {}
    graded: dict[Kind, Counter[str]] = {}
    with job.progress.task("grade", len(tasks)) as tick:
        for (place, kind, row), response in zip(tasks, responses, strict=True):
            tick(1)
            if response is None:
                continue
            found: Grade = grade(kind, row, response)
            count = graded.setdefault(kind, Counter())
            count["right" if found.right else "wrong"] += 1
            count[f"{'right' if found.right else 'wrong'}: {found.how}"] += 1
            asked.setdefault(kind, []).append(Asked(question_of(kind, row), response, found.right, place))
    return asked, graded, responses.count(None)


def _responses(tasks: list[Task], knobs: Knobs, job: StepContext) -> list[str | None]:
    """The student's answers, recorded or asked for now; None where there is none."""
    if knobs.response:
        return [row[knobs.response] for _, _, row in tasks]
    if job.source is None:
        raise UserError("no student was given", "somebody's errors are needed", "give --base CHECKPOINT, or --response COLUMN")
    from modelwright.core.ask.local import Local

    student = Kept(Local(job.source, batch=knobs.batch, seed=job.seed), job.folder / "student.jsonl")
    with job.progress.task("student", len(tasks)) as tick:
        answers = Desk(student, tick)(to_student(kind, question_of(kind, row), knobs.answer_tokens) for _, kind, row in tasks)
    if all(a.failed for a in answers):
        raise UserError("the student answered no task", f"the first failed with '{answers[0].status}'", "lower --answer-tokens")
    return [None if a.failed else a.text for a in answers]


# ---- results ------------------------------------------------------------------------------------------------------------
def _write(lessons: dict[Kind, Lesson], strategy: str, generator: str, folder: Path, rng: Random) -> int:
    """All kinds mixed and shuffled; returns how many rows were kept."""
    rows = []
    for kind, lesson in lessons.items():
        for item in lesson.kept:
            sample = item["sample"]
            turns = [("user", sample.question), ("assistant", trained_on(kind, sample))]
            origin = {"kind": kind, "scheme": strategy, "generator": generator, "source": item["source"], "round": item["round"]}
            rows.append({"messages": [{"role": r, "content": text} for r, text in turns], **origin})
    rng.shuffle(rows)
    removed = [{"kind": kind, **row} for kind, lesson in lessons.items() for row in lesson.removed]
    for name, some in (("dataset.jsonl", rows), ("removed.jsonl", removed)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        (folder / name).write_text(text, encoding="utf-8")
    return len(rows)


def _reasons(lessons: dict[Kind, Lesson]) -> Counter[str]:
    return sum((lesson.reasons for lesson in lessons.values()), Counter())


def _plain(lesson: Lesson) -> dict[str, int]:
    return {"kept": len(lesson.kept), "calls": lesson.calls, "samples_per_call": lesson.per_call, "rounds": lesson.rounds}


def _finding(lessons: dict[Kind, Lesson], graded: dict[Kind, Counter[str]], counts: Counts, facts: dict[str, int]) -> EvalResult:
    kept = sum(len(lesson.kept) for lesson in lessons.values())
    reasons = _reasons(lessons)
    wrong = sum(c["wrong"] for c in graded.values())
    metrics = {
        "kept": kept,
        **facts,
        "graded": {kind: dict(c) for kind, c in graded.items()},
        "lessons": {k: _plain(v) for k, v in lessons.items()},
        "removed": dict(reasons),
        "requests": counts,
    }
    rows = [[k, graded[k]["right"], graded[k]["wrong"], v.calls, v.per_call, len(v.kept), v.rounds] for k, v in lessons.items()]
    text = f"{kept:,} samples about {wrong:,} wrong answers; {sum(reasons.values()):,} were removed."
    if facts["tasks_in_test_sets"]:
        text += f" {facts['tasks_in_test_sets']:,} of the tasks themselves stand in a test set."
    return EvalResult(
        metrics,
        text=text,
        tiles=[(f"{kept:,}", "samples kept", ""), (f"{wrong:,}", "wrong answers", ""), (f"{counts['requests']:,}", "requests", "")],
        tables=[
            {
                "title": "Lessons",
                "columns": ["tasks", "right", "wrong", "calls", "samples a call", "kept", "rounds"],
                "rows": rows,
            },
            {"title": "Removed", "columns": ["reason", "samples"], "rows": [[r, n] for r, n in reasons.most_common()]},
            *failures(counts),
        ],
    )


METHOD = instructors
