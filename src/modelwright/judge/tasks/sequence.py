"""The training side of judge.continual: one model, learning task after task, scored by the likelihood of label words."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modelwright.core.data.packing import Texts, padded
from modelwright.core.data.rows import Rows, collate
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train.loop import fit
from modelwright.core.train.technique import LossTerm, combine, environment, overrides
from modelwright.core.train.trainer import forward


class Learner:
    """A model that is trained one task at a time; its weights are kept after each, so that a stopped run goes on."""

    def __init__(self, source: Checkpoint, train: Train, folder: Path, done: int):
        self.folder, self.train = folder, train
        self.tokenizer = source.tokenizer()
        self.model = (Checkpoint(self._kept(done - 1)) if done else source).model(torch.float32)
        self._seen: dict[int, tuple[Any, Rows]] = {}  # two tasks may have one name

    def refuse(self, techniques: list[Any], source: Checkpoint) -> None:
        """UserError if these cannot learn a sequence, before anything is measured."""
        for t in techniques:
            if overrides(t, "rows"):
                raise UserError(
                    f"tune={t.name} cannot learn a task", "it makes its own rows, and the runner makes them here", "choose another"
                )
        combine(techniques, environment(source.skeleton, self.train))

    def _kept(self, i: int) -> Path:
        return self.folder / f"after-{i}"

    def _run(self, i: int) -> Path:
        return self.folder / f"task-{i}"

    def learn(self, task: Any, i: int, techniques: list[Any], seed: int, tick: Callable[[int, int], None]) -> int:
        """Train on one task; the answer alone is learnt. Returns how many sentences were cut."""
        rows, train = self.rows([(r["sentence"], r["label"]) for r in task.train]), self.train
        for t in techniques:
            t.round, t.first_task = i, i == 0
            train = t.settings(rows, train)
        out = fit(self.model, rows, train, techniques=techniques, evals={}, folder=self._run(i), seed=seed + i, tick=tick)
        self.model = out.model
        for t in techniques:
            self.model = t.export(self.model, self._run(i))
        self.model.requires_grad_(True)
        self.model.save_pretrained(self._kept(i))
        return sum(rows.facts["cut"])

    def rows(self, pairs: list[tuple[str, str]]) -> Rows:
        """Rows 'sentence, answer: label', the label learnt; a sentence too long loses its end, never its label."""
        tails = self.tokenizer(["\nAnswer: " + label for _, label in pairs], add_special_tokens=False)["input_ids"]
        opening = len(self.tokenizer("\nAnswer:", add_special_tokens=False)["input_ids"])
        heads = self.tokenizer([s.strip() for s, _ in pairs])["input_ids"]
        longest = max(map(len, tails))
        if longest + 2 > self.train.context:
            raise UserError(f"train.context={self.train.context} is too short", f"an answer alone has {longest} tokens", "raise it")
        texts, cut = Texts(), []
        for head, tail in zip(heads, tails, strict=True):
            room = self.train.context - len(tail)
            cut.append(len(head) > room)
            ids = head[:room] + tail
            texts.ids.append(ids)
            texts.weights.append([0.0] * (len(ids) - len(tail) + opening) + [1.0] * (len(tail) - opening))
        rows = padded(texts, self.train.context)
        rows.facts["cut"] = cut
        return rows

    @torch.no_grad()
    def accuracy(self, task: Any) -> float:
        """Share of test examples whose likeliest label is right, in percent."""
        rows, n = self._rows_of(task), len(task.labels)
        model, term = self.model.eval(), LossTerm()
        order, scores = rows.lengths.argsort(), torch.zeros(len(rows))
        for chunk in order.split(8 * self.train.batch):
            batch = {k: v.to(model.device) for k, v in collate([rows[int(i)] for i in chunk]).items()}
            scores[chunk] = -term.sums(batch, forward(model, batch)).cpu()
        right = torch.tensor([task.labels.index(r["label"]) for r in task.test])
        return 100 * float((scores.view(-1, n).argmax(1) == right).float().mean())

    def _rows_of(self, task: Any) -> Rows:
        if id(task) not in self._seen:
            self._seen[id(task)] = task, self.rows([(r["sentence"], label) for r in task.test for label in task.labels])
        return self._seen[id(task)][1]

    def cut(self, task: Any) -> int:
        """Test sentences that lost their end, with any label."""
        flags, n = self._rows_of(task).facts["cut"], len(task.labels)
        return sum(any(flags[k : k + n]) for k in range(0, len(flags), n))

    def tidy(self, done: int) -> None:
        """Remove what resuming needs no more, now that task `done` is written down."""
        for folder in [self._run(done), *(self._kept(i) for i in range(done))]:
            shutil.rmtree(folder, ignore_errors=True)
