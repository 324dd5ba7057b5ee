"""One round of instruction: whom to ask about what, and which samples of the replies are kept, each loss with its reason."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from modelwright.core.ask.desk import Desk
from modelwright.core.ask.protocol import Answer
from modelwright.curate.generators import neighbours
from modelwright.curate.generators.grade import Kind
from modelwright.curate.generators.overlap import Seen
from modelwright.curate.generators.tasks import Sample, Strategy, message, parse, samples_per_call, to_instructor
from modelwright.curate.generators.verify import wrong_with


@dataclass(frozen=True)
class Asked:
    """A task that the student was given: its text, what it answered, and whether that was right. `place` is its row."""

    question: str
    response: str
    right: bool
    place: int


@dataclass(frozen=True)
class Settings:
    """How the instructor is asked and what is kept."""

    strategy: Strategy
    wanted: int
    k: int
    encoder: str
    verify: bool
    rounds: int
    temperature: float
    max_tokens: int


@dataclass
class Lesson:
    """The samples of one kind of task, and what became of the rest."""

    kept: list[dict[str, Any]] = field(default_factory=list)
    removed: list[dict[str, Any]] = field(default_factory=list)
    calls: int = 0
    per_call: int = 0
    rounds: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, source: int, sample: Sample | None = None) -> None:
        self.reasons[reason] += 1
        texts = {"question": sample.question, "answer": sample.answer} if sample else {}
        self.removed.append({"reason": reason, "source": source, **texts})


def messages_of(kind: Kind, asked: Sequence[Asked], s: Settings, rng: Random) -> list[tuple[int, str]]:
    """(row, the instructor's task) for each call of a round."""
    wrong = [a for a in asked if not a.right]
    about = rng.sample(list(asked), min(len(wrong), len(asked))) if s.strategy == "random" else wrong
    m = samples_per_call(s.wanted, len(about)) if about else 0
    near = _contrast(asked, about, s)
    told = s.strategy in ("le", "lec")
    return [(a.place, message(kind, a.question, a.response if told else None, near[i], m)) for i, a in enumerate(about)]


def _contrast(asked: Sequence[Asked], about: Sequence[Asked], s: Settings) -> list[list[str]]:
    """For each question the nearest ones that the student can do; none unless the strategy is LEC."""
    right = [a.question for a in asked if a.right]
    if s.strategy != "lec" or not s.k or not right or not about:
        return [[] for _ in about]
    found = neighbours.vectors([*(a.question for a in about), *right], s.encoder)
    places = neighbours.nearest(found[: len(about)], found[len(about) :], s.k)
    return [[right[j] for j in row] for row in places]


def teach(kind: Kind, asked: Sequence[Asked], desk: Desk, s: Settings, tests: Seen, rng: Random) -> Lesson:
    """Ask in rounds until enough samples are kept, the rounds are used up, or a round gives nothing."""
    lesson, seen = Lesson(), Seen(a.question for a in asked)
    tasks = messages_of(kind, asked, s, rng)
    lesson.per_call = samples_per_call(s.wanted, len(tasks)) if tasks else 0
    while tasks and lesson.rounds < s.rounds and len(lesson.kept) < s.wanted:
        before = len(lesson.kept)
        prompts = [to_instructor(kind, text, s.temperature, s.max_tokens, lesson.rounds) for _, text in tasks]
        lesson.rounds, lesson.calls = lesson.rounds + 1, lesson.calls + len(prompts)
        for (place, _), answer in zip(tasks, desk(prompts), strict=True):
            _take(kind, answer, place, lesson, s, (seen, tests))
        if len(lesson.kept) == before:
            break
    if len(lesson.kept) > s.wanted:
        lesson.reasons["beyond what was wanted"] = len(lesson.kept) - s.wanted
        lesson.kept = rng.sample(lesson.kept, s.wanted)
    return lesson


def _take(kind: Kind, answer: Answer, place: int, lesson: Lesson, s: Settings, known: tuple[Seen, Seen]) -> None:
    """The samples of one reply that are readable, new and right."""
    if answer.failed:
        return lesson.drop(f"request failed: {answer.status}", place)
    samples, torn = parse(kind, answer.text)
    for _ in range(torn):
        lesson.drop("not whole", place)
    if not samples and not torn:
        lesson.drop("no sample in the reply", place)
    seen, tests = known
    for sample in samples:
        if sample.question in tests:
            lesson.drop("repeats a test set", place, sample)
        elif sample.question in seen:
            lesson.drop("repeats a question", place, sample)
        elif reason := wrong_with(kind, sample) if s.verify else "":
            lesson.drop(reason, place, sample)
        else:
            seen.add(sample.question)
            lesson.kept.append({"sample": sample, "source": place, "round": lesson.rounds})
    return None
