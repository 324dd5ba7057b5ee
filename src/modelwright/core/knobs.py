"""Knobs: the settings of a method, a frozen dataclass at the head of the method's file.

The command line, the recipe, `show` and the docs are read off the same dataclass. Nothing here imports torch, so a
recipe is checked in a fraction of a second.
"""

import copy
import dataclasses
import math
import os
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from modelwright.core.errors import UserError, did_you_mean, shown
from modelwright.core.files import expanded

_SUFFIX = {"k": 10**3, "m": 10**6, "b": 10**9}
_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*(?<!\.txt)(?<!\.json)(?<!\.jsonl)(?<!\.csv)(?<!\.parquet)")


def knob(
    default: Any = MISSING,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    path: bool = False,
    argument: bool = False,
    alias: str | tuple[str, ...] = (),
) -> Any:
    """One setting: default, meaning with its unit, inclusive bounds; whether it names a file or folder, and whether the
    command line takes it by place instead of by flag; the names that other tools give it, which are understood too."""
    meta = {"help": help, "low": low, "high": high, "path": path, "argument": argument, "alias": alias}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=meta)
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True)
class Source:
    """One of several sources of rows. A bare string in a recipe is the path."""

    path: str = knob(help="as data.path", path=True)
    weight: float = knob(1.0, "share of the rows that come from it, relative to the other sources", low=0)
    column: str | None = knob(None, "as data.column")
    split: str = knob("train", "split of a hub dataset")
    limit: int | None = knob(None, "use at most this many rows", low=1)


@dataclass(frozen=True)
class Data:
    """Where rows come from. A bare string in a recipe is the path."""

    path: str | None = knob(
        None, "text, jsonl, json, csv or parquet file, folder of text files, or hub id; empty: the dataset of an earlier step", path=True
    )
    column: str | None = knob(None, "column to learn from; empty: recognised (text, messages, conversations, instruction, prompt, chosen)")
    split: str = knob("train", "split of a hub dataset")
    limit: int | None = knob(None, "use at most this many rows (of a text file: lines)", low=1)
    sources: list[Source] = knob([], "several sources with weights, instead of path")
    chat_template: str | None = knob(None, "chat template: a file, or turns or chatml; empty: the tokenizer's own")
    refused: Literal["stop", "drop"] = knob("stop", "a row that cannot be used stops the run, or is left out and counted")


@dataclass(frozen=True)
class Train:
    """How long and how fast to train. Defaults suit a small model; a recipe states its paper's."""

    tokens: int | None = knob(None, "training tokens, padding excluded; overrides epochs", low=1)
    epochs: float = knob(1.0, "passes over the data", low=0, alias="num_train_epochs")
    lr: float = knob(1e-3, "peak learning rate", low=0, alias="learning_rate")
    schedule: Literal["linear", "cosine", "constant"] = knob("linear", "learning rate after warm-up", alias="lr_scheduler_type")
    warmup: float = knob(0.03, "share of the steps with rising learning rate", low=0, high=1, alias="warmup_ratio")
    batch: int = knob(8, "sequences per device and forward pass", low=1, alias=("batch_size", "per_device_train_batch_size"))
    accumulate: int = knob(1, "forward passes per optimizer step", low=1, alias="gradient_accumulation_steps")
    context: int = knob(256, "tokens per sequence", low=2, alias=("max_length", "max_seq_length"))
    weight_decay: float = knob(0.0, "AdamW weight decay", low=0)
    clip: float = knob(1.0, "gradient norm limit; 0: none", low=0, alias="max_grad_norm")
    optimizer: str = knob("adamw", "adamw, adafactor, sgd, adamw_8bit (bitsandbytes), or any name that transformers knows", alias="optim")
    weights: Literal["fp32", "stored"] = knob("fp32", "weights that train are held in fp32, or in the type they are stored in")
    rounding: Literal["nearest", "stochastic"] = knob("nearest", "how a step rounds weights that are held in 16 bits (weights: stored)")
    states: Literal["fp32", "bf16"] = knob("fp32", "type of the optimizer's moments; bf16 needs adamw and weights: stored")
    attention: str | None = knob(None, "attention of transformers: sdpa, eager, flash_attention_2 ...; empty: its default")
    packing: Literal["auto", "yes", "no"] = knob("auto", "several chats in one row; auto: where the model keeps them apart")
    mask_share: float = knob(0.15, "masked language models: share of the tokens to be found again", low=0.01, high=0.9)
    eval_every: int | None = knob(None, "steps between evaluations; empty: about ten in the run", low=1, alias="eval_steps")
    save_every: int = knob(200, "steps between resumable states", low=1, alias="save_steps")
    keep: int = knob(0, "states whose weights stay with the result, in steps/*/checkpoint-N: experts for reshape.upit", low=0)
    gradient_checkpointing: bool = knob(False, "recompute activations to save memory")
    strategy: Literal["ddp", "fsdp2", "hsdp", "ep"] = knob(
        "ddp", "several processes: whole copies of the model, shards of it, copies of shards, or shards with the experts spread"
    )
    replicas: int | None = knob(None, "hsdp: copies of the sharded model; empty: one a machine", low=1)
    divergence: float = knob(3.0, "stop when the smoothed loss is above its lowest by this factor (and by 1 nat); 0: never", low=0)
    report_to: list[str] = knob([], "also report to tensorboard, trackio or wandb, through transformers")
    record: bool = knob(True, "write the training dynamics to dynamics.parquet")


@dataclass(frozen=True)
class Tune:
    """What every way to tune asks for; a method's Knobs add its own."""

    data: Data = knob(Data(), "what to learn from")
    evals: dict[str, Data] = knob({}, "held-out texts by name; empty: a share of the data is held out")
    holdout: float = knob(0.05, "share of the rows held out when no evals are given", low=0, high=0.5)
    train: Train = knob(Train(), "how long and how fast")


@dataclass(frozen=True)
class Generator:
    """Which model answers: an endpoint, a checkpoint, or recorded answers."""

    url: str | None = knob(None, "the model that is asked: OpenAI-compatible endpoint, as in https://api.openai.com/v1 (extra: endpoint)")
    model: str | None = knob(None, "name of the model at the endpoint")
    endpoint: dict[str, Any] = knob({}, "key (environment variable), timeout, retries, backoff, rate, workers, price_in, price_out, body")
    generator: str | None = knob(None, "the model that is asked: a checkpoint folder or hub id", path=True)
    recorded: str | None = knob(None, "the model that is asked: recorded answers, rows of prompt and answer", path=True)
    cache: str | None = knob(None, "file that keeps every answer; empty: in the step's folder", path=True)
    batch: int = knob(8, "prompts per forward pass of a checkpoint", low=1)


def number(value: Any) -> float:
    """3, "3e-4", "300k" and "1.5M" as a number."""
    if isinstance(value, bool):
        raise ValueError(value)
    if isinstance(value, str):
        text = value.strip().replace("_", "")
        if text[-1:].lower() in _SUFFIX:
            return float(Decimal(text[:-1]) * _SUFFIX[text[-1].lower()])
        return float(text)
    return float(value)  # a whole number may be past the range: OverflowError


def type_name(kind: Any) -> str:
    """A type as a person would say it."""
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in get_args(kind) if a is not type(None))
    if get_origin(kind) is list:
        return f"list of {type_name(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "mapping"
    return {int: "whole number", float: "number", bool: "true or false", str: "text"}.get(kind, "mapping")


def _wrong(where: str, kind: Any, value: Any) -> UserError:
    return UserError(f"{where}={shown(value)} does not fit", f"it must be {type_name(kind)}")


def _coerce(kind: Any, value: Any, where: str, root: Path) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        arms = get_args(kind)
        if value is None and type(None) in arms:
            return None
        problem: UserError | None = None
        for arm in arms:
            if arm is type(None):
                continue
            try:
                return _coerce(arm, value, where, root)
            except UserError as error:
                problem = error
        if problem and len(arms) == 2:
            raise problem
        raise _wrong(where, kind, value)
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if value == choice or str(value) == str(choice):
                return choice
        raise UserError(f"{where}={shown(value)} is not a choice", how=did_you_mean(str(value), map(str, get_args(kind))))
    if get_origin(kind) is list:
        if not isinstance(value, (list, tuple)):
            raise _wrong(where, kind, value)
        return [_coerce(get_args(kind)[0], v, f"{where}[{i}]", root) for i, v in enumerate(value)]
    if get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, kind, value)
        return {str(k): _coerce(get_args(kind)[1], v, f"{where}.{k}", root) for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        if isinstance(value, str):
            value = {dataclasses.fields(kind)[0].name: value}
        return build(kind, value, where, root)
    if kind is Any:
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise _wrong(where, kind, value)
    if kind in (int, float):
        try:
            n = number(value)
        except (ValueError, TypeError, ArithmeticError):
            raise _wrong(where, kind, value) from None
        if not math.isfinite(n) or (kind is int and n != int(n)):
            raise _wrong(where, kind, value)
        return kind(n)
    if not isinstance(value, kind):
        raise _wrong(where, kind, value)
    return value


def build(cls: Any, values: Any, where: str = "", root: Path = Path(".")) -> Any:
    """Make the frozen dataclass `cls` from a plain mapping; relative paths are taken from `root`.

    Raises UserError for an unknown key (with the nearest known one), a missing key, a wrong type or a broken bound.
    """
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise UserError(f"{where or cls.__name__} must be a mapping of settings, not {shown(values)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    given = {}
    aliases = {alias: name for name, f in fields.items() for alias in _names(f.metadata.get("alias"))}
    for key, value in values.items():
        if key in aliases and key not in fields:
            if aliases[key] in values:
                raise UserError(f"{prefix}{key} and {prefix}{aliases[key]} are the same setting", how="give one of them")
            key = aliases[key]
        if key not in fields:
            raise UserError(f"unknown key {shown(prefix + str(key))}", how=did_you_mean(str(key), fields))
        f, name = fields[key], f"{prefix}{key}"
        value = _coerce(f.type, value, name, root)
        low, high = f.metadata.get("low"), f.metadata.get("high")
        if isinstance(value, (int, float)) and (low is not None and value < low or high is not None and value > high):
            span = f"at least {low}" if high is None else f"at most {high}" if low is None else f"between {low} and {high}"
            raise UserError(f"{name}={value} is out of range", f"it must be {span}")
        given[key] = resolve(value, root) if f.metadata.get("path") else value
    for name, f in fields.items():
        if name not in given and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{prefix}{name} is missing", f.metadata.get("help", ""), f"give {prefix}{name}")
    return cls(**given)


def _names(alias: Any) -> tuple[str, ...]:
    return (alias,) if isinstance(alias, str) else tuple(alias or ())


def resolve(value: Any, root: Path) -> Any:
    """A path as seen from `root`; a word that could be a hub id and is no file there is left alone."""
    if isinstance(value, list):
        return [resolve(v, root) for v in value]
    if isinstance(value, dict):
        return {k: resolve(v, root) for k, v in value.items()}
    if not isinstance(value, str) or not value:
        return value
    if Path(value).is_absolute():
        return str(expanded(value))
    at = root / expanded(value)
    return value if _HUB_ID.fullmatch(value) and not at.exists() else os.path.normpath(at)


def plain(settings: Any) -> dict[str, Any]:
    """The dataclass as plain nested values, for json and yaml."""
    return dataclasses.asdict(settings)


def paths(settings: Any) -> list[Path]:
    """Every file or folder that the settings name and that is there."""
    found: list[Path] = []
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for v in values:
            if dataclasses.is_dataclass(v):
                found += paths(v)
            elif f.metadata.get("path") and isinstance(v, str) and Path(v).exists():
                found.append(Path(v))
    return found


def flat(cls: Any, prefix: str = "") -> list[tuple[str, dataclasses.Field]]:
    """Every leaf setting with its dotted name; a nested dataclass gives one name per field."""
    rows = []
    for f in dataclasses.fields(cls):
        arms = get_args(f.type) if get_origin(f.type) in (Union, types.UnionType) else ()
        inner = [a for a in (f.type, *arms) if dataclasses.is_dataclass(a)]
        if inner:
            rows += flat(inner[0], f"{prefix}{f.name}.")
        else:
            rows.append((prefix + f.name, f))
    return rows


def default_of(f: dataclasses.Field) -> Any:
    """The field's default, or MISSING."""
    return f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else MISSING
