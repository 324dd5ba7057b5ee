"""From web pages or raw text to a corpus: the whole funnel in one step, each stage as it also stands alone.

When to use it: one machine, a folder of WARC or HTML files or of text, and the wish for a corpus whose every removal has its reason.

Paper: WanJuan-CC (arXiv 2402.19282). Left of its pages: .526 after extraction and language, .327 after the rules, .0321 after
deduplication, .0275 after safety, .0137 after its quality models.

extract -> rules -> dedup -> safety -> quality. The last is left out unless `stages` names it: it needs labelled texts or a classifier of
yours to remove anything. `pages` starts with extraction, `data` with the rules. Each stage reads what the one before kept
and writes removed-STAGE.jsonl; dataset.jsonl is what the last one kept. The report is a table whose shares multiply out. A run that
was stopped goes on after the last whole stage.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Data, build, knob
from modelwright.core.step import EvalResult
from modelwright.curate import dedup, extract, quality, rules, safety
from modelwright.curate.kernels.funnel import Stage, table

MODULES = {"extract": extract, "rules": rules, "dedup": dedup, "safety": safety, "quality": quality}


@dataclass(frozen=True)
class Knobs:
    pages: str = knob("", "WARC or HTML file, plain or gz, or a folder of them", path=True)
    data: Data = knob(Data(), "documents instead of pages: jsonl, jsonl.gz, parquet, csv, text, or a folder of them")
    stages: list[str] = knob(
        ["extract", "rules", "dedup", "safety"], "stages in their order, quality last; extract is left out where data are given"
    )
    extract: dict[str, Any] = knob({}, "settings of curate.extract")
    rules: dict[str, Any] = knob({}, "settings of curate.rules")
    dedup: dict[str, Any] = knob({}, "settings of curate.dedup")
    safety: dict[str, Any] = knob({}, "settings of curate.safety")
    quality: dict[str, Any] = knob({}, "settings of curate.quality")


def prepare(knobs: Knobs) -> dict[str, Any]:
    """Each stage's own settings, checked before anything is read."""
    for name in knobs.stages:
        if name not in MODULES:
            raise UserError(f"there is no stage '{name}'", how=did_you_mean(name, MODULES))
    if knobs.stages != [s for s in MODULES if s in knobs.stages]:
        raise UserError(
            f"stages={knobs.stages} are in another order", "it is part of the method", f"write {list(MODULES)} or leave some out"
        )
    if bool(knobs.pages) == bool(knobs.data.path):
        what = "pages and data are both given" if knobs.pages else "neither pages nor data are given"
        raise UserError(what, "the funnel starts with one of them", "give pages: FOLDER, or data: {path: FILE}")
    names = [s for s in knobs.stages if s != "extract" or knobs.pages]
    if knobs.pages and names[:1] != ["extract"]:
        raise UserError("pages are given without the stage extract", "only it reads pages", "add it, or give data")
    found = {name: build(MODULES[name].Knobs, getattr(knobs, name), name) for name in names}
    if knobs.pages:
        found["extract"] = replace(found["extract"], pages=knobs.pages)
    return found


def web(knobs: Knobs, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Run the stages; write dataset.jsonl and removed-STAGE.jsonl; returns the funnel and every stage's facts."""
    settings, source = prepare(knobs), knobs.data
    facts: dict[str, Any] = {}
    for name, own in settings.items():
        place = folder / "stages" / name
        if name != "extract":
            own = replace(own, data=source)
        facts[name] = _stage(MODULES[name].METHOD, own, place, seed)
        column = source.column if source.path else None
        source = Data(str(place / "dataset.jsonl"), "text" if name == "extract" else column)
        if not facts[name]["kept"]:
            raise UserError(f"{name} left no document", f"it got {_before(facts[name])}", "look at its limits; drop: false shows them")
    for name in settings:
        if (removed := folder / "stages" / name / "removed.jsonl").exists():
            shutil.copyfile(removed, folder / f"removed-{name}.jsonl")
    os.replace(str(source.path), folder / "dataset.jsonl")
    shutil.rmtree(folder / "stages")
    funnel = table([Stage(name, _before(f), f["kept"]) for name, f in facts.items()])
    return {"funnel": funnel, "top domains": _domains(folder / "dataset.jsonl"), **facts}


def _before(facts: dict[str, Any]) -> int:
    """Documents that came into a stage."""
    return facts["documents"] if "documents" in facts else facts["pages"]


def _stage(method: Callable[..., dict[str, Any] | EvalResult], settings: Any, place: Path, seed: int) -> dict[str, Any]:
    """Run one stage, unless an earlier run finished it with the same settings."""
    done, key = place / "done.json", repr((settings, seed))
    if done.is_file() and (known := json.loads(done.read_text()))["key"] == key:
        return known["facts"]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    found = method(settings, place, seed)
    facts = found.metrics if isinstance(found, EvalResult) else found
    part = place / "done.part"
    part.write_text(json.dumps({"key": key, "facts": facts}))
    os.replace(part, done)
    return facts


def _domains(file: Path, most: int = 10) -> dict[str, int]:
    """The hosts with the most documents; empty where no document has an address."""
    count: Counter[str] = Counter()
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            if url := json.loads(line).get("url"):
                count[urlsplit(url if "//" in url else "//" + url).netloc.lower()] += 1
    return dict(count.most_common(most))


METHOD = web
