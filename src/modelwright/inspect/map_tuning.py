"""The published results of map-tuning as tables (Plug-and-Play Knowledge Injection, arXiv 2305.17691).

When to use it: before `tune.map_tuning`, to see what a map brought where. The file is one json of the official results, path -> value:
 `output/TASK/WAY/MODEL[_NwayKshot]/test_result.out` holds micro-F1, precision and recall, `mapping_networks/SOURCE/loss_EPOCH` the
mean loss of a map in training.

Three tables: the frozen fully tuned BERT against a general map plugged in, a map tuned for the task, and BERT tuned with a map; the same
general map in four frozen models; the losses of the maps by dropout. A figure that is missing stays empty.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError, short
from modelwright.core.knobs import knob
from modelwright.core.step import EvalResult, StepContext

_RESULT = re.compile(r"output/(\w+)/(BaseModel|Plug_General|Plug_TaskSpecific|FineTuning)/(?:(.+)/)?test_result\.out")
_LOSS = re.compile(r"(mapping_networks\w*)/(.+)/loss_(\d+)")
_SHOTS = re.compile(r"_?(\d+way\d+shot)$")
_MODELS = ("BERT", "LoRA", "Adapter", "BitFit")


@dataclass(frozen=True)
class Knobs:
    published: str = knob(help="results.json, or the folder that holds it", path=True)


Key = tuple[str, str, str]  # task with its shots, way, model or map


def read_results(path: str) -> tuple[dict[Key, float], dict[str, dict[int, float]]]:
    """Micro-F1 by task, way and model; losses of each map by epoch."""
    file = Path(path).expanduser()
    file = file / "results.json" if file.is_dir() else file
    try:
        held = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read", short(error), "give results.json or its folder") from None
    scores: dict[Key, float] = {}
    losses: dict[str, dict[int, float]] = {}
    for name, value in held.items() if isinstance(held, dict) else ():
        if found := _RESULT.fullmatch(name):
            task, way, model = found[1], found[2], found[3] or ""
            if shots := _SHOTS.search(model):
                task, model = f"{task} {shots[1]}", model[: shots.start()]
            scores[task, way, model] = float(value["micro_f1"])
        elif found := _LOSS.fullmatch(name):
            losses.setdefault(f"{found[1]}/{found[2]}", {})[int(found[3])] = float(value)
    if not scores:
        raise UserError(f"{file} holds no results of map-tuning", "no name is output/TASK/WAY/MODEL/test_result.out", "give results.json")
    return scores, losses


def tables_of(scores: dict[Key, float], losses: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    """Title, columns and rows of the three tables."""
    tasks = sorted({task for task, *_ in scores})
    ways = [
        ("BaseModel", "BERT"),
        ("Plug_General", "BERT"),
        ("Plug_TaskSpecific", ""),
        ("FineTuning", "Downstream"),
        ("FineTuning", "Wikipedia"),
    ]
    first = [[t, *(scores.get((t, *w)) for w in ways)] for t in tasks]
    second = [[t, *(scores.get((t, way, m)) for m in _MODELS for way in ("BaseModel", "Plug_General"))] for t in tasks]
    third = [[name, by[min(by)], by[max(by)], max(by)] for name, by in sorted(losses.items())]
    return [
        {
            "title": "BERT: micro-F1",
            "columns": ["task", "frozen", "general map", "map for the task", "tuned with the task's map", "tuned with Wikipedia's"],
            "rows": first,
        },
        {
            "title": "A general map in frozen models: micro-F1 without and with it",
            "columns": ["task", *(f"{m}{plus}" for m in _MODELS for plus in ("", " + map"))],
            "rows": second,
        },
        {"title": "Losses of the maps", "columns": ["map", "first epoch", "last epoch", "epochs"], "rows": third},
    ]


def map_tuning(knobs: Knobs, job: StepContext) -> EvalResult:
    """The tables, and in how many frozen models a general map helps."""
    scores, losses = read_results(knobs.published)
    pairs = {
        (task, model): (value, scores[task, "Plug_General", model])
        for (task, way, model), value in scores.items()
        if way == "BaseModel" and (task, "Plug_General", model) in scores
    }
    better = sum(plugged > frozen for frozen, plugged in pairs.values())
    gain = sum(plugged - frozen for frozen, plugged in pairs.values()) / max(len(pairs), 1)
    few = [plugged for (task, _), (_, plugged) in pairs.items() if task.startswith("FewRel")]
    metrics = {
        "scores": {"/".join(filter(None, key)): value for key, value in sorted(scores.items())},
        "pairs": len(pairs),
        "better": better,
        "mean gain": gain,
        "fewrel general map": sum(few) / len(few) if few else None,
        "losses": losses,
    }
    return EvalResult(
        metrics,
        text=f"A general map helps a frozen model in {better} of {len(pairs)} published pairs, by {gain:+.4f} micro-F1 on average.",
        tiles=[(f"{better} of {len(pairs)}", "pairs in which a map helps", ""), (f"{gain:+.4f}", "mean gain in micro-F1", "")],
        tables=tables_of(scores, losses),
    )


METHOD = map_tuning
