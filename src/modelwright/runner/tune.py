"""A step that trains: rows made, techniques put together, trained in one process or many, certified."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import modelwright.models  # noqa: F401 - our classes become known to the Auto classes
from modelwright import registry
from modelwright.core.data.chats import with_template
from modelwright.core.data.rows import IGNORE, TokenRows
from modelwright.core.errors import UserError
from modelwright.core.files import write_json
from modelwright.core.knobs import Data
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.certificate import certify, require_same_weights, require_same_when_reloaded
from modelwright.core.model.checkpoint import Checkpoint, check_vocabulary, silence_transformers
from modelwright.core.model.parts import write_parts
from modelwright.core.model.writer import Built, as_stored, staging, write_model
from modelwright.core.train import dist, precision
from modelwright.core.train.loop import Outcome, fit, objective_of
from modelwright.core.train.objective import Objective
from modelwright.core.train.requirements import keeps_apart
from modelwright.core.train.technique import Technique, combine, environment
from modelwright.core.train.trainer import forward
from modelwright.moe.watch import domain_plot, watch
from modelwright.runner import recipe
from modelwright.runner.context import Run, with_artifacts
from modelwright.runner.processes import PROGRESS, train_apart
from modelwright.runner.recipe import Save, Step

Tick = Callable[[int, int], None]
Say = Callable[[dict[str, Any]], None]


def tune(r: Run, step: Step, folder: Path) -> dict[str, Any]:
    """Train, save and certify; what is in `folder` of a stopped run is taken up."""
    silence_transformers()
    step = replace(step, knobs=with_artifacts(r, step.knobs))
    assert r.checkpoint
    source = Checkpoint(r.checkpoint)
    shutil.rmtree(folder / "result", ignore_errors=True)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    with staging(folder / "result") as part:
        if r.processes > 1:
            entry = train_apart(r, step, source, folder, part, train_job)
        else:
            with r.progress.task(f"{step.entry.name}: train", 1) as tick:
                entry = train(step, source, folder, part, r.recipe.seed, r.recipe.save, r.tuned, tick.to, tick.say)
        with r.progress.task(f"{step.entry.name}: certify"):
            certificate = certify(
                source,
                Checkpoint(part, incomplete=True),
                entry.pop("promise"),
                mode=r.recipe.save.certificate,
                prompts=entry.pop("prompts", []),
            )
    return entry | {"certificate": certificate.plain()}


def train(
    step: Step, source: Checkpoint, folder: Path, part: Path, seed: int, save: Save, rounds: int, tick: Tick, say: Say = lambda n: None
) -> dict[str, Any]:
    """Train and write the plain model into `part`; runs in every process, the first one writes. Returns the step's entry."""
    knobs, techniques = step.knobs, registry.techniques(step.entry, step.knobs)
    for t in techniques:
        t.round, t.source = rounds, source
    tokenizer, vocab = with_template(source.tokenizer(), knobs.data.chat_template), int(source.hf_config.get_text_config().vocab_size)
    check_vocabulary(tokenizer, vocab, source.folder)
    combine(techniques, environment(source.skeleton, knobs.train))
    kind = precision.load_type(knobs.train, source.types())
    model = _loaded(source, kind, techniques, knobs.train)
    objective = objective_of(techniques, model, tokenizer, knobs.train, seed)
    maker = RowMaker(techniques, objective, model, tokenizer, vocab, knobs.train, seed)
    rows, evals = maker(knobs.data), {n: maker(d) for n, d in knobs.evals.items()}
    if not evals and len(rows) > 1 and knobs.holdout:
        at = max(1, len(rows) - max(1, round(len(rows) * knobs.holdout)))
        rows, evals["held out"] = rows.split(at)
    settings = knobs.train
    for t in techniques:
        settings = t.settings(rows, settings)
    outcome = fit(
        model, rows, settings, techniques=techniques, evals=evals, folder=folder, seed=seed, tick=tick, say=say, objective=objective
    )
    entry = _entry(outcome, rows)
    entry["plots"] = [p for t in techniques for p in t.plots()]
    entry["unit"] = objective.unit
    entry["promise"] = "trained" if all(t.same_kind for t in techniques) else "another kind of model"
    if objective.kind == "causal" and tokenizer is not None:
        entry["prompts"] = _prompts(next(iter(evals.values()), rows))
    if outcome.model is not None and any(dist.offset(p) is not None for p in outcome.model.parameters()):
        _write_sharded(outcome.model, entry, techniques, source, tokenizer, rows, part, save)
    elif dist.rank() == 0:
        _write(outcome, entry, techniques, source, tokenizer, rows, evals or {"data": rows}, knobs.train.batch, folder, part, save)
    return entry


def _loaded(source: Checkpoint, kind: torch.dtype | None, techniques: list[Technique], train: Any) -> Any:
    """The model to train. Where it is sharded and nothing is added to it, each process reads its own part alone."""
    for t in techniques:
        if (own := t.load(source, kind)) is not None:
            return own
    if any(t.adds_weights for t in techniques):
        return source.model(kind)
    if train.strategy == "ep":
        import modelwright.moe.parallel  # noqa: F401 - its way to lay experts on processes becomes known
    plan = dist.layout(train.strategy, train.replicas)
    if plan is None:
        return source.model(kind)
    names = {id(m): n for n, m in source.skeleton.named_modules()}
    with dist.cut_at([names[id(b.module)] for b in Anatomy(source.skeleton).blocks]):
        return source.model(kind, distributed_config=plan)


def train_job(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`train` from plain values, in one of several processes; the first one notes how far it is."""
    step = recipe.parse({"steps": [job["step"]], "base": job["source"]}).steps[0]
    seen: dict[str, Any] = {"at": [0, 1], "numbers": {}}

    def show(**what: Any) -> None:
        seen.update(what)
        if dist.rank() == 0:
            write_json(folder / PROGRESS, seen)

    return train(
        step,
        Checkpoint(job["source"]),
        folder,
        Path(job["part"]),
        job["seed"],
        recipe.Save(**job["save"]),
        job["rounds"],
        lambda done, of: show(at=[done, of]),
        lambda numbers: show(numbers=numbers),
    )


def _entry(outcome: Outcome, rows: TokenRows) -> dict[str, Any]:
    return {
        "facts": {
            "data": rows.facts,
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            "processes": dist.world(),
            "energy_j": outcome.energy_j,
            "energy_source": outcome.energy_source,
            **outcome.facts,
        },
        "evals": outcome.evals,
        "liveness": outcome.liveness,
        "log": outcome.log,
        "notes": outcome.notes,
    }


def _prompts(rows: TokenRows, most: int = 2, tokens: int = 48) -> list[list[int]]:
    """The beginnings of a few rows: of a chat or pair what is given, of running text a few words."""
    found = []
    for i in range(min(most, len(rows))):
        row = rows[i]
        ids, learnt = row["input_ids"][: int(row["length"])].tolist(), (row["labels"][: int(row["length"])] != IGNORE).tolist()
        begin = learnt.index(True) if True in learnt else len(ids)
        n = begin if begin > 1 else min(24, len(ids) // 2)
        if 0 < n <= 4 * tokens:
            found.append(ids[:n])
    return found


def _write_sharded(
    model: Any,
    entry: dict[str, Any],
    techniques: list[Technique],
    source: Checkpoint,
    tokenizer: Any,
    rows: TokenRows,
    part: Path,
    save: Save,
) -> None:
    """The plain model, gathered block by block; all processes take part and the first one writes."""
    for t in techniques:
        model = t.export(model, part.parent)
    parts = dist.in_parts(model, [b.module for b in Anatomy(model).blocks])
    if dist.rank() == 0:
        built = Built(model, _changed_tokenizer(techniques, source, tokenizer), source, stops=_stops(rows, techniques))
        entry["facts"] |= write_parts(built, parts, save.dtype, part, save.shard_size)
        entry["notes"] += _endless(rows)
    for _ in parts:  # what the first process has gone through already
        pass


def _changed_tokenizer(techniques: list[Technique], source: Checkpoint, tokenizer: Any) -> Any:
    """A tokenizer to save instead of the source's, or None."""
    changed = next((t.tokenizer for t in techniques if t.tokenizer is not None), None)
    if changed is None and getattr(tokenizer, "chat_template", None) != getattr(source.tokenizer(), "chat_template", None):
        return tokenizer
    return changed


def _stops(rows: TokenRows, techniques: list[Technique]) -> list[int]:
    return list(dict.fromkeys([*rows.stops, *(s for t in techniques for s in t.stops)]))


def _endless(rows: TokenRows) -> list[str]:
    n = rows.facts.get("answers without an end token")
    return [f"{n} answers end without a special token: the model is not taught to stop after them"] if n else []


def _write(
    outcome: Outcome,
    entry: dict[str, Any],
    techniques: list[Technique],
    source: Checkpoint,
    tokenizer: Any,
    rows: TokenRows,
    texts: dict[str, TokenRows],
    batch: int,
    folder: Path,
    part: Path,
    save: Save,
) -> None:
    """The plain model, in the type of the source; plots of the routers; what rounding took; where generation stops."""
    model = outcome.model
    if all(t.same_kind for t in techniques) and any(p.role == "router" for p in Anatomy(source.skeleton)):
        entry["plots"] += routing_plots(model, texts, batch)
    for t in techniques:
        model = t.export(model, folder)
    for t in techniques:
        if said := t.exported():
            entry["facts"][t.name] = entry["facts"].get(t.name, {}) | said
    changed, stops = _changed_tokenizer(techniques, source, tokenizer), _stops(rows, techniques)
    lost = as_stored(model, source, save.dtype)
    if lost is not None:
        entry["facts"]["weights that rounding gave back to the source"] = lost
    built = Built(model, changed, source, stops=stops)
    entry["facts"] |= write_model(built, part, save.shard_size)
    entry["notes"] += _endless(rows)
    saved = Checkpoint(part, incomplete=True)
    if all(t.same_kind for t in techniques):
        entry["facts"]["reload_max_abs_dlogit"] = require_same_when_reloaded(model, saved)
    else:
        require_same_weights(model, saved)


class RowMaker:
    """The rows of a source as the techniques want them, or as the objective makes them."""

    def __init__(self, techniques: list[Technique], objective: Objective, model: Any, tokenizer: Any, vocab: int, train: Any, seed: int):
        self.techniques, self.objective, self.model, self.tokenizer = techniques, objective, model, tokenizer
        self.vocab, self.train, self.seed = vocab, train, seed
        self._apart: bool | None = None

    @property
    def packing(self) -> bool:
        """Whether several chats share a row."""
        if self.train.packing != "auto" or self.objective.kind != "causal":
            return self.train.packing == "yes"
        if self._apart is None:
            self._apart = self.model is not None and keeps_apart(self.model)
        return self._apart

    def __call__(self, data: Data) -> TokenRows:
        for t in self.techniques:
            if (rows := t.rows(data, self.tokenizer, self.vocab, self.train, self.seed)) is not None:
                return rows
        if not data.path and not data.sources:
            raise UserError("no data was given", how="give data: {path: FILE, column: NAME}")
        bins = self.train.batch * self.train.accumulate * dist.world()
        self.objective.tokenizer = self.tokenizer
        return self.objective.rows(data, self.vocab, self.train, bins, self.packing)


def make_rows(techniques: list[Technique], data: Data, tokenizer: Any, vocab: int, train: Any, seed: int, model: Any) -> TokenRows:
    """The rows of one source; `model` may be on the meta device, then chats are not packed."""
    objective = objective_of(techniques, model, tokenizer, train, seed)
    return RowMaker(techniques, objective, None if model.device.type == "meta" else model, tokenizer, vocab, train, seed)(data)


def routing_plots(model: Any, texts: dict[str, TokenRows], batch: int) -> list[dict[str, Any]]:
    """How the routers use their experts on the held-out texts, 64 rows of each at most; one process alone."""
    from modelwright.core.data.rows import collate

    counts: dict[str, Any] = {}
    model.eval()
    with watch(model) as seen, torch.no_grad():
        for name, rows in texts.items():
            before = seen.counts.clone()
            for i in range(0, min(len(rows), 64), batch):
                part = collate([rows[j] for j in range(i, min(len(rows), i + batch))])
                forward(model, {k: v.to(model.device) for k, v in part.items()})
            counts[name] = seen.counts - before
    return [*seen.plots(), *([domain_plot(counts)] if len(counts) > 1 else [])]
