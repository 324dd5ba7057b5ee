"""The training side of judge.continual: one model, learning task after task, scored by the likelihood of label words."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modelwright.core.checkpoint import Checkpoint
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.packing import Texts, padded
from modelwright.core.technique import LossTerm
from modelwright.core.text import Rows, collate
from modelwright.core.trainer import forward
from modelwright.core.training import fit


class Learner:
    """A model that is trained one task at a time; its weights are kept after each, so that a stopped run goes on."""

    def __init__(self, source: Checkpoint, train: Train, folder: Path, done: int):
        self.folder, self.train = folder, train
        self.tokenizer = source.tokenizer()
        self.model = (Checkpoint(self._kept(done - 1)) if done else source).model(torch.float32)
        self._seen: dict[str, tuple[Rows, int]] = {}

    def _kept(self, i: int) -> Path:
        return self.folder / f"after-{i}"

    def learn(self, task: Any, i: int, techniques: list[Any], seed: int, tick: Callable[[int, int], None]) -> None:
        """Train on one task; the answer alone is learnt."""
        for t in techniques:
            t.round, t.first_task = i, i == 0
        rows = self.rows([(r["sentence"], r["label"]) for r in task.train])
        out = fit(self.model, rows, self.train, techniques=techniques, evals={}, folder=self.folder / f"task-{i}", seed=seed + i, tick=tick)
        self.model = out.model
        for t in techniques:
            self.model = t.export(self.model, self.folder / f"task-{i}")
        self.model.requires_grad_(True)
        self.model.save_pretrained(self._kept(i))
        shutil.rmtree(self.folder / f"task-{i}")
        if i:
            shutil.rmtree(self._kept(i - 1))

    def rows(self, pairs: list[tuple[str, str]]) -> Rows:
        """Rows 'sentence, answer: label', the label learnt; a sentence too long loses its end, never its label."""
        tails = self.tokenizer(["\nAnswer: " + label for _, label in pairs], add_special_tokens=False)["input_ids"]
        opening = len(self.tokenizer("\nAnswer:", add_special_tokens=False)["input_ids"])
        heads = self.tokenizer([s.strip() for s, _ in pairs])["input_ids"]
        if (longest := max(map(len, tails))) + 2 > self.train.context:
            raise UserError(f"train.context={self.train.context} is too short", f"an answer alone has {longest} tokens", "raise it")
        texts, cut = Texts(), 0
        for head, tail in zip(heads, tails, strict=True):
            room = self.train.context - len(tail)
            cut += len(head) > room
            ids = head[:room] + tail
            texts.ids.append(ids)
            texts.weights.append([0.0] * (len(ids) - len(tail) + opening) + [1.0] * (len(tail) - opening))
        rows = padded(texts, self.train.context)
        rows.facts["sentences cut at the context"] = cut
        return rows

    @torch.no_grad()
    def accuracy(self, task: Any) -> float:
        """Share of test examples whose likeliest label is right, in percent."""
        if task.name not in self._seen:
            pairs = [(r["sentence"], label) for r in task.test for label in task.labels]
            self._seen[task.name] = self.rows(pairs), len(task.labels)
        rows, n = self._seen[task.name]
        model, term = self.model.eval(), LossTerm()
        order, scores = rows.lengths.argsort(), torch.zeros(len(rows))
        for chunk in order.split(8 * self.train.batch):
            batch = {k: v.to(model.device) for k, v in collate([rows[int(i)] for i in chunk]).items()}
            scores[chunk] = -term.sums(batch, forward(model, batch)).cpu()
        right = torch.tensor([task.labels.index(r["label"]) for r in task.test])
        return 100 * float((scores.view(-1, n).argmax(1) == right).float().mean())

    def tidy(self) -> None:
        """Remove the weights that were kept for resuming."""
        for folder in self.folder.glob("after-*"):
            shutil.rmtree(folder)
