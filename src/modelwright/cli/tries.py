"""`modelwright try METHOD`: any method on the embedded model and made data, within two minutes on a laptop.

One table says what a method needs beyond its family's usual: steps before it, made data (modelwright/testing.py), knobs.
"""

import os
import shutil
import sys
import webbrowser
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from modelwright import registry
from modelwright.cli.output import free_folder, print_json, resumable, say
from modelwright.core.errors import UserError
from modelwright.core.knobs import default_of, flat
from modelwright.testing import made

_TRAIN = {"tokens": "20k", "context": 128, "batch": 8, "lr": 1e-3, "eval_every": 5}
_TEXT = {"curate.stdlib": {"parts": ["unicode"], "characters": 60_000}}
_MIXTURE = {"reshape.upcycle": {"experts": 4, "top_k": 2}}


@dataclass(frozen=True)
class Sample:
    """What a method is tried on: steps before it, a kind of made data, its own knobs."""

    knobs: dict[str, Any] = field(default_factory=dict)
    make: str = ""
    before: tuple[dict[str, Any], ...] = ()
    base: bool = True  # give the embedded model where the method takes one


SAMPLES: dict[str, Sample] = {
    "curate.stdlib": Sample({"parts": ["topics", "unicode"], "characters": 100_000}),
    "reshape.fresh": Sample(
        {"vocab": 512, "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 128, "context": 128}, before=(_TEXT,)
    ),
    "reshape.hyper_moe": Sample({"a": 16, "b": 32, "e": 32, "hidden": 32, "q": 32, "init": "zero"}, before=(_MIXTURE,)),
    "reshape.rmoe": Sample({"experts": 4, "p": 32}),
    "reshape.half_reset": Sample({"pretrained": "seedling"}, before=(_TEXT, {"tune.full": {"train": _TRAIN}})),
    "reshape.edit": Sample({"steps": 10}, "fact"),
    "reshape.growth_plan": Sample({"params": 7e9, "tokens": 2e12}, base=False),
    "reshape.gqa": Sample({"kv_heads": 1}),
    "inspect.scaling_law": Sample({}, "losses", base=False),
    "modalities.backcast": Sample({"learner": "Ridge", "hide": [2021]}, "days", base=False),
    "modalities.critical_temperature": Sample({"draws": 200}, "days", base=False),
    "tune.mix": Sample({"methods": ["hft", "migu"]}, before=(_TEXT,)),
    "tune.c_rlft": Sample({"weights": {"good": 1.0, "bad": 0.1}, "conditions": {"good": "Good", "bad": "Bad"}}, "chats"),
    "tune.balance": Sample(before=(_TEXT, _MIXTURE)),
    "tune.gw_moe": Sample({"threshold": 0.2, "unit": "share"}, before=(_TEXT, _MIXTURE)),
    "tune.rectify": Sample({"factor": 1.0}, before=(_TEXT, _MIXTURE)),
    "tune.lora_moe": Sample({"experts": 4, "r": 4}, before=(_TEXT,)),
    "reward.calibrate": Sample({"frac": 0.5}, "pairs"),
    "reward.bench": Sample({"suite": "rewardbench"}, "pairs"),
    "cache.generate": Sample({"prompt": "def read(self, size=-1):\n    pass\n\n" * 6, "keep": 0.5, "compare": True}),
    "cache.bench": Sample({"context": 96, "continuation": 32, "rows": 8, "keep": [0.5, 0.2], "tasks": ["copy"]}, "text"),
    "judge.continual": Sample({}, "matrix", base=False),
    "judge.llmbar": Sample({"strategies": ["vanilla", "rules"], "verdict": "logits"}, "judged"),
    "judge.select": Sample({"n": 8, "window": 3}, "chains"),
    "judge.aor": Sample({"n": 4, "max": 8, "verifier": "letters"}, "chains", base=False),
    "curate.extract": Sample({"how": "plain"}, "pages"),
    "curate.web": Sample({"extract": {"how": "plain"}, "rules": {"use": []}}, "pages"),
    "reshape.moefy": Sample({"experts": 8, "top_k": 4, "router": "ridge", "tokens": "4k"}, before=(_TEXT,)),
    "tune.masked": Sample({"ramp": 1}, before=(_TEXT, {"reshape.grow": {"operator": "masked", "depth": 2}})),
    "tune.new_blocks": Sample(before=(_TEXT, {"reshape.grow": {"operator": "zero", "depth": 2}})),
    "inspect.experts": Sample({"tokens": 2048, "pairs": 3}, before=(_TEXT, _MIXTURE)),
    "inspect.modularity": Sample({"partitions": 20, "disturb": [0.06], "draws": 1}, "functions"),
    "tune.masks": Sample({"experts": 4, "top_k": 2, "ramp": 0.3, "hard": 0.2}, before=(_TEXT,)),
    "reshape.upit": Sample({"experts": 4, "seed_rows": 8, "context": 64, "epochs": 2}, "checkpoints"),
    "tune.dha": Sample({"budget": 0.5, "search": 4, "omega_lr": 0.2}, before=(_TEXT,)),
    "tune.moi": Sample({"systems": {"sums": "You add.", "talk": "You talk."}}, "domains"),
    "tune.knife": Sample({"way": "teacher"}, "questions"),
    "tune.map_tuning": Sample({}, "entities"),
    "inspect.map_tuning": Sample({}, "plugged"),
    "reward.train": Sample({"debias": "pbc", "train": {"epochs": 8, "batch": 4, "context": 64, "lr": 1e-3}}, "answers"),
    "tune.dpo": Sample({"train": {"epochs": 8, "batch": 4, "context": 64, "lr": 5e-4}}, "answers"),
    "reward.themis_train": Sample({"train": {"epochs": 4, "batch": 4, "context": 256, "lr": 2e-3}}, "traces"),
    "reward.themis": Sample({}, "recorded", base=False),
    "rl.ppo": Sample(
        {
            "reward_function": "modelwright.rl.rollout.examples:letters",
            "response_tokens": 24,
            "updates": 12,
            "train": {"batch": 12, "lr": 3e-4, "warmup": 0.0},
        },
        "text",
    ),
    "inspect.multilingual": Sample({}, "languages"),
    "curate.lamini": Sample({"data": "openbezoar-twin", "recorded": "openbezoar-twin", "size": 8, "ask": 8}),
    "curate.evol": Sample({"data": "openbezoar-twin", "recorded": "openbezoar-twin", "rounds": 1}),
    "curate.orca": Sample({"data": "openbezoar-twin", "recorded": "openbezoar-twin"}),
    "curate.judge_filter": Sample({"data": "openbezoar-twin", "recorded": "openbezoar-twin"}),
    "curate.instructors": Sample({"sample_size": 4}, "lessons", base=False),
    "modalities.taptap": Sample({"hidden": 32, "layers": 2, "train": {"epochs": 6, "batch": 16, "lr": 3e-3}}, "people", base=False),
    "inspect.influence": Sample({"epochs": 100, "objective": "roll_out"}, "dynamics"),
    "tune.shear": Sample({"layers": 3, "ffn": 192, "mask_lr": 0.3, "multiplier_lr": 3.0}, before=(_TEXT,)),
    "tune.dynamic_batch": Sample(
        {"domain": "kind", "every": 5}, before=({"curate.stdlib": {"parts": ["topics", "unicode"], "characters": 100_000}},)
    ),
    "tune.ssd": Sample({"experts": 8, "top_k": 4, "check_every": 3, "stable": -1.0, "zeros": 0.0}, before=(_TEXT,)),
    "judge.frontier": Sample(
        {
            "ways": ["hft"],
            "lrs": [3e-4, 3e-3],
            "between": False,
            "seeds": 2,
            "held": 4,
            "train": {"tokens": "2k", "context": 64, "batch": 4},
        },
        "text",
    ),
    "tune.ernie_code": Sample({}, "translations"),
    "modalities.pixels": Sample({"train": dict(_TRAIN), "patch": 8, "font_size": 7, "patches": 32}, "text"),
    "modalities.music": Sample(
        {"length": 512, "widths": [16, 32], "stem": 4, "layers": 1, "each": 2, "steps": 10}
        | {"train": {"epochs": 30, "batch": 8, "lr": 2e-3}},
        "tones",
    ),
    "curate.query": Sample({}, "library", base=False),
    "curate.quality": Sample({"learner": "LogisticRegression"}, "graded"),
}


def sample_of(e: registry.Entry) -> Sample:
    """The method's sample, or its family's usual one. Raises UserError where a knob without a default is left open."""
    if e.name in SAMPLES:
        return SAMPLES[e.name]
    return Sample(before=(_TEXT,)) if "dataset" in e.takes else Sample()


def recipe_of(e: registry.Entry, sets: list[str], folder: Path, seed: int) -> Any:
    """The recipe that tries a method; its made data is written into `folder`."""
    from modelwright.runner import recipe as recipes

    sample = sample_of(e)
    knobs = dict(sample.knobs)
    if e.family == "tune":
        knobs = {"train": dict(_TRAIN), **knobs}
    if sample.make:
        knobs |= made(sample.make, folder / "data")
    base = knobs.pop("base", "seedling")  # some data comes with a model of another kind
    takes = "checkpoint" in (*e.takes, *e.may_take)
    steps = [*({k: dict(v) for k, v in step.items()} for step in sample.before), {e.name: knobs}]
    raw: dict[str, Any] = {"name": f"try {e.name}", "seed": seed, "steps": steps, "save": {"to": str(folder / "result")}}
    if sample.base and takes:
        raw["base"] = base
    for assignment in sets:
        recipes.override(raw, f"steps.{len(steps) - 1}.{assignment}")
    open_knobs = [n for n, f in flat(registry.knobs(e)) if default_of(f) is MISSING and n not in knobs]
    if open_knobs:
        wanted = " ".join(f"--set {n}=..." for n in open_knobs)
        raise UserError(f"{e.name} has no made data to be tried on", f"it needs {', '.join(open_knobs)}", f"give {wanted}")
    return recipes.parse(raw, Path.cwd(), e.name)


def try_method(name: str, sets: list[str], to: str | None, look: bool, seed: int, as_json: bool) -> Any:
    """Run the method and show its report; nothing is left behind where it refuses."""
    e = registry.entry(name)
    folder = Path(to).expanduser() if to else free_folder(Path("out") / "try" / e.name)
    if to and folder.exists():
        raise UserError(f"{to} exists already", "nothing is overwritten", "choose another folder or remove it")
    try:
        recipe = recipe_of(e, sets, folder, seed)
        from modelwright.core.report.progress import choose
        from modelwright.runner.recipe import check
        from modelwright.runner.run import run_recipe

        check(recipe)
        with resumable():
            result = run_recipe(recipe, choose(as_json))
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    assert result.to is not None  # the recipe saves
    report = result.to / "report.html"
    if as_json:
        print_json(result.plain() | {"report": str(report)})
        return result
    result.report.print()
    say(f"\nresult  {result.to}\nreport  {report}")
    if look and sys.stdout.isatty() and _desktop():
        webbrowser.open(report.resolve().as_uri())
    return result


def _desktop() -> bool:
    """Whether a browser would open in a window and not in this terminal."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
