"""A recipe: a base, a list of steps, and where the result goes. Strict: an unknown key is an error."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from modelwright import registry
from modelwright.core.errors import UserError, did_you_mean, short, shown
from modelwright.core.files import expanded
from modelwright.core.knobs import build, default_of, knob, plain, resolve
from modelwright.registry import Entry


@dataclass(frozen=True)
class Save:
    """Where the result goes and in what form."""

    to: str | None = knob(None, "folder of the result; must not exist yet")
    shard_size: int = knob(5_000_000_000, "bytes per weight file, at most", low=1_000_000)
    certificate: Literal["auto", "full", "structure"] = knob("auto", "auto: compare logits when both models fit in memory")
    dtype: Literal["source", "float32", "bfloat16", "float16"] = knob("source", "type that trained weights are saved in")
    force: bool = knob(False, "save a result whose certificate failed")
    discard: bool = knob(False, "begin anew where a stopped run with other settings lies, and throw its states away")


@dataclass(frozen=True)
class Step:
    """One method with its settings."""

    entry: Entry
    knobs: Any


@dataclass(frozen=True)
class Recipe:
    """Steps in order, each fed by the one before."""

    name: str
    steps: list[Step]
    base: str | None = None
    seed: int = 0
    save: Save = field(default_factory=Save)

    def plain(self) -> dict[str, Any]:
        """The recipe as plain values, defaults written out."""
        return {
            "name": self.name,
            "seed": self.seed,
            "base": self.base,
            "steps": [{s.entry.name: plain(s.knobs)} for s in self.steps],
            "save": plain(self.save),
        }

    def as_yaml(self) -> str:
        """The recipe as it would be written, settings at their defaults left out."""
        steps: list[Any] = []
        for s in self.steps:
            default = {f.name: default_of(f) for f in fields(type(s.knobs))}
            given = {n: _without_defaults(v, default.get(n)) for n, v in plain(s.knobs).items() if getattr(s.knobs, n) != default.get(n)}
            steps.append({s.entry.name: given} if given else s.entry.name)
        whole = {"name": self.name, "seed": self.seed, **({"base": self.base} if self.base else {}), "steps": steps}
        return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=100)


RECIPES = Path(__file__).parent.parent / "recipes"
_KEYS = ("name", "seed", "base", "steps", "save")


def _without_defaults(value: Any, default: Any) -> Any:
    if isinstance(value, dict) and is_dataclass(default):
        return {n: v for n, v in value.items() if v != plain(default).get(n)}
    return value


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: set = set()
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        name = loader.construct_object(key)
        if name in seen:
            raise UserError(f"key '{name}' stands twice (line {key.start_mark.line + 1})", how="keep one")
        seen.add(name)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(text: str, where: str) -> Any:
    """Plain values from YAML text; UserError names the line that does not parse."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader subclass
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where} is not valid YAML{line}", getattr(error, "problem", None) or "it does not parse") from None
    except UserError:
        raise
    except (
        TypeError,
        ValueError,
        OverflowError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:  # a list for a key, a number that is none
        raise UserError(f"{where} is not valid YAML", short(error)) from None


def _split_step(item: Any, i: int) -> tuple[str, Any]:
    if isinstance(item, str):
        return item, {}
    if isinstance(item, Mapping) and len(item) == 1 and isinstance(next(iter(item)), str):
        return next(iter(item.items()))
    raise UserError(f"steps.{i} must be one method with its settings", f"it is {shown(item)}", "write '- reshape.upcycle: {experts: 4}'")


def override(raw: dict[str, Any], assignment: str) -> None:
    """Apply one `--set key=value` to the raw recipe in place: save.to=out, steps.1.train.lr=3e-4 (steps count from 0)."""
    key, eq, text = assignment.partition("=")
    if not eq:
        raise UserError(f"--set {assignment} has no '='", how="write --set steps.1.train.lr=3e-4")
    path, at = key.strip().split("."), raw
    if path[0] not in _KEYS:
        raise UserError(f"--set: unknown key '{path[0]}'", how=did_you_mean(path[0], _KEYS))
    if path[0] == "steps":
        steps = raw.get("steps") or []
        if len(path) < 3 or not (path[1].isascii() and path[1].isdigit() and len(path[1]) < 9) or int(path[1]) >= len(steps):
            raise UserError(
                f"--set {key} names no step", f"the recipe has {len(steps)} steps, counted from 0", "write --set steps.0.KEY=VALUE"
            )
        name, settings = _split_step(steps[int(path[1])], int(path[1]))
        settings = dict(settings or {})
        steps[int(path[1])] = {name: settings}
        path, at = path[2:], settings
    for part in path[:-1]:
        below = at.get(part)
        below = {} if below is None else {"path": below} if isinstance(below, str) else below
        if not isinstance(below, dict):
            raise UserError(f"--set {key} goes below '{part}', which is a plain value")
        at[part] = below
        at = below
    at[path[-1]] = read_yaml(text, f"--set {key}")


def parse(raw: Any, root: Path = Path("."), name: str = "recipe") -> Recipe:
    """A recipe from plain values. Relative paths are taken from `root`. Imports neither torch nor transformers."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{name} holds no recipe", "it is not a mapping with 'steps'")
    for key in raw:
        if key not in _KEYS:
            raise UserError(f"unknown key {shown(key)}", how=did_you_mean(str(key), _KEYS))
    if not isinstance(raw.get("steps"), list) or not raw["steps"]:
        raise UserError("the recipe has no steps", how="write 'steps:' and a list of methods; `modelwright list` shows them")
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UserError(f"seed={shown(seed)} does not fit", "it must be a whole number from 0 to 4294967295, as for numpy's generator")
    steps = []
    for i, item in enumerate(raw["steps"]):
        step_name, values = _split_step(item, i)
        if step_name == "tune":
            step_name, values = "tune.mix", {"methods": values} if isinstance(values, list) else values
        e = registry.entry(step_name)
        made = build(registry.knobs(e), values, f"steps.{i}.{step_name}", root)
        if step_name == "tune.mix":
            registry.mixed(made)
        steps.append(Step(e, made))
    save = build(Save, {"to": raw["save"]} if isinstance(raw.get("save"), str) else raw.get("save"), "save", root)
    if save.to:
        save = replace(save, to=os.path.abspath(root / expanded(save.to)))
    base = raw.get("base")
    if base is not None and not isinstance(base, str):
        raise UserError(f"base={shown(base)} does not fit", "it must be a folder or a hub id")
    title = str(raw.get("name") or name)
    if title in (".", "..") or not title.isprintable() or "/" in title or "\\" in title or len(title) > 120:
        raise UserError(f"name={shown(title)} does not fit", "it names the folder of the result", "use letters, digits, dots and dashes")
    return Recipe(title, steps, resolve(base, root), seed, save)


def read(path: str | Path, sets: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe in a YAML file (or a ready one by name), with `--set` overrides applied."""
    file = expanded(path)
    if not file.is_file() and (ready := ready_recipes().get(str(path))):
        file = ready
    if not file.is_file():
        raise UserError(f"no recipe at {path}", how=did_you_mean(str(path), ready_recipes()))
    try:
        words = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be read", (error.strerror or "the system refuses").lower(), "check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is no text", "it is not UTF-8", "give a recipe in YAML") from None
    raw = read_yaml(words, str(file))
    if isinstance(raw, dict):
        for assignment in sets:
            override(raw, assignment)
    inside = file.is_relative_to(RECIPES)
    return parse(raw, Path.cwd() if inside else file.resolve().parent, file.stem)


def ready_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {p.stem: p for p in sorted(RECIPES.glob("*.yaml"))}


def check(recipe: Recipe) -> list[str]:
    """What can be known without loading a model: artifacts flow, folders exist. Returns remarks; raises UserError."""
    have = {"checkpoint"} if recipe.base else set()
    for i, step in enumerate(recipe.steps):
        data = getattr(step.knobs, "data", None)
        given = set(have)
        if data is not None and (data.path or data.sources):
            given.add("dataset")
        for path in [] if data is None else [data.path or "", *(s.path for s in data.sources)]:
            if os.sep in path and not _could_be_hub(path) and not Path(path).exists():
                raise UserError(f"no data at {path}", f"steps.{i}.{step.entry.name}.data names nothing there", "check the path")
        for need in step.entry.takes:
            if need not in given:
                how = {"checkpoint": "give 'base: FOLDER'", "dataset": "give 'data: {path: FILE, column: NAME}'"}.get(need, "")
                raise UserError(f"steps.{i}.{step.entry.name} has no {need}", "nothing before it gives one", how)
        have.update(step.entry.gives)
    if recipe.base and recipe.base != "seedling" and not _could_be_hub(recipe.base):
        folder = Path(recipe.base)
        if not folder.is_dir():
            raise UserError(f"no folder at {recipe.base}", "the base must be a checkpoint folder or a hub id", "check the path")
        if not (folder / "config.json").is_file():
            raise UserError(f"{recipe.base} is no checkpoint", "it has no config.json", "point to a folder saved with save_pretrained")
    if recipe.save.to is None:
        return ["no 'save.to': the result goes to out/" + recipe.name]
    if os.path.exists(recipe.save.to):
        return [f"{recipe.save.to} exists already: the run will stop there unless it is this recipe's own result"]
    return []


def _could_be_hub(value: str) -> bool:
    return not os.path.isabs(value) and value.count("/") <= 1 and not value.startswith(".")
