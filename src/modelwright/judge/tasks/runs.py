"""The training side of judge.frontier: one checkpoint, tuned again and again from its beginning, measured on new and old text."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modelwright.core.data.rows import Rows, TokenRows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train
from modelwright.core.model.checkpoint import Checkpoint, check_vocabulary
from modelwright.core.train import precision
from modelwright.core.train.loop import fit, objective_of
from modelwright.core.train.objective import objective_class
from modelwright.core.train.technique import combine, environment, overrides

_STARTS = ("bos_token_id", "eos_token_id")
_WRITTEN = 7  # seed of the text that the checkpoint writes, the same for every run


class Teacher:
    """Rows of new and old text, and runs on them. Raises UserError for a way that cannot be compared, before anything is trained."""

    def __init__(self, source: Checkpoint, knobs: Any, ways: dict[str, Callable[[], list[Any]]]):
        self.source, self.ways = source, ways
        for way, make in ways.items():
            self._refuse(way, make(), knobs.train)
        self.tokenizer, self.vocab = source.tokenizer(), int(source.hf_config.get_text_config().vocab_size)
        check_vocabulary(self.tokenizer, self.vocab, source.folder)
        self.kind = precision.load_type(knobs.train, source.types())
        model = source.model(self.kind)
        whole = self._rows(model, knobs.data, knobs.train)
        if len(whole) <= knobs.held:
            how = "give more data, or lower held or train.context"
            raise UserError(f"the new data has {len(whole)} rows", f"{knobs.held} of them are held out", how)
        self.learnt, held = whole.split(len(whole) - knobs.held)
        old = self._rows(model, knobs.old, knobs.train) if knobs.old.path or knobs.old.sources else written(source, knobs)
        self.evals = {"new": held, "old": old}

    def _refuse(self, way: str, techniques: list[Any], train: Train) -> None:
        for t in techniques:
            if overrides(t, "rows"):
                raise UserError(f"{way} cannot be compared here", "it makes its own rows, and all ways learn from the same", "leave it out")
            if not t.same_kind:
                raise UserError(f"{way} cannot be compared here", "it makes a model of another kind", "leave it out")
        combine(techniques, environment(self.source.skeleton, train))

    def _rows(self, model: Any, data: Data, train: Train) -> TokenRows:
        objective = objective_class(model)(model, self.tokenizer, 0, train.mask_share)
        return objective.rows(data, self.vocab, train, train.batch * train.accumulate, train.packing == "yes")

    def run(self, way: str, train: Train, seed: int, folder: Path, tick: Callable[[int, int], None]) -> tuple[list[float], list[float]]:
        """Tune a fresh copy; the losses on new and old text at each evaluation."""
        techniques, model = self.ways[way](), self.source.model(self.kind)
        objective = objective_of(techniques, model, self.tokenizer, train, seed)
        for t in techniques:
            t.source = self.source
            train = t.settings(self.learnt, train)
        out = fit(
            model, self.learnt, train, techniques=techniques, evals=self.evals, folder=folder, seed=seed, tick=tick, objective=objective
        )
        return [e["loss"] for e in out.evals if e["name"] == "new"], [e["loss"] for e in out.evals if e["name"] == "old"]


@torch.no_grad()
def written(source: Checkpoint, knobs: Any) -> Rows:
    """Rows that the untouched checkpoint writes at temperature 1, `held` of them as long as the context."""
    model, config = source.model(torch.float32).eval(), source.hf_config.get_text_config()
    tokenizer = source.tokenizer()
    start = getattr(tokenizer, "bos_token_id", None) if tokenizer is not None else None
    start = start if start is not None else next((t for t in (getattr(config, n, None) for n in _STARTS) if t is not None), None)
    if start is None or not model.can_generate() or config.is_encoder_decoder:
        raise UserError("the checkpoint writes no text", "it has no token to begin with, or is no decoder", "give old: FILE")
    context = knobs.train.context
    with torch.random.fork_rng():
        torch.manual_seed(_WRITTEN)
        ids = model.generate(
            torch.full((knobs.held, 1), int(start)),
            attention_mask=torch.ones(knobs.held, 1, dtype=torch.long),
            do_sample=True,
            top_k=0,
            max_new_tokens=context - 1,
            min_new_tokens=context - 1,
            pad_token_id=0,
        )
    return replace(Rows(ids.int(), ids.int(), torch.full((knobs.held,), context)), facts={"written": knobs.held})
