"""The model that writes data: an endpoint, a checkpoint, or a record of what one wrote. Answers are kept and never paid for twice."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from modelwright.core.ask.desk import Desk
from modelwright.core.ask.kept import Kept
from modelwright.core.ask.protocol import Answer, Judge, Prompt
from modelwright.core.data.tables import records
from modelwright.core.errors import UserError
from modelwright.curate.generators.rows import shipped


class Writes(Protocol):
    """The settings that every generating method has."""

    @property
    def url(self) -> str | None: ...
    @property
    def model(self) -> str | None: ...
    @property
    def endpoint(self) -> dict[str, Any]: ...
    @property
    def generator(self) -> str | None: ...
    @property
    def recorded(self) -> str | None: ...
    @property
    def cache(self) -> str | None: ...
    @property
    def batch(self) -> int: ...


class Recorded:
    """A generator that was recorded, or written by hand: rows of `prompt` and `answer`.

    A row fits a request whose last message contains its prompt; the prompt that ends last counts, of these the longest. The n-th row of a
    prompt answers its n-th attempt. A request that no row fits fails with the status "not recorded".
    """

    def __init__(self, file: Path):
        self.name = f"recorded in {file.name}"
        self.answers: dict[str, list[str]] = {}
        for i, row in enumerate(records(file), 1):
            if not isinstance(row.get("prompt"), str) or not isinstance(row.get("answer"), str):
                raise UserError(f"row {i} of {file} is no recorded answer", "it needs the texts prompt and answer", "repair or drop it")
            self.answers.setdefault(row["prompt"], []).append(row["answer"])
        if not self.answers:
            raise UserError(f"{file} holds no recorded answers", "it has no rows", "record some, or ask a model")

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        for i, prompt in enumerate(prompts):
            said = self._fitting(prompt.messages[-1][1])
            if prompt.attempt < len(said):
                text = said[prompt.attempt]
                yield i, Answer(text, "ok" if text else "empty")
            else:
                yield i, Answer(status="not recorded")

    def _fitting(self, text: str) -> list[str]:
        places = [(text.rfind(p) + len(p), len(p), p) for p in self.answers if p in text]
        return self.answers[max(places)[2]] if places else []


def open_writer(knobs: Writes, folder: Path, seed: int) -> Desk:
    """The generator that the settings name, with its counts. Raises UserError where they name none or several."""
    named = {"url": knobs.url, "generator": knobs.generator, "recorded": knobs.recorded}
    given = [name for name, value in named.items() if value]
    if len(given) != 1:
        what = f"{' and '.join(given)} are given" if given else "no generator was given"
        raise UserError(what, "one model writes", "give --url and --model of an endpoint, --generator CHECKPOINT, or --recorded FILE")
    return Desk(Kept(_model(knobs, seed), Path(knobs.cache) if knobs.cache else folder / "answers.jsonl"))


def _model(knobs: Writes, seed: int) -> Judge:
    if knobs.recorded:
        return Recorded(Path(shipped(knobs.recorded, "recorded")))
    if knobs.url:
        from modelwright.core.ask.endpoint import open_endpoint

        return open_endpoint(knobs.url, knobs.model, knobs.endpoint)
    from modelwright.core.ask.local import Local
    from modelwright.core.model.checkpoint import Checkpoint

    return Local(Checkpoint(knobs.generator or ""), batch=knobs.batch, seed=seed)
