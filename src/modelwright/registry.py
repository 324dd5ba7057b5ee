"""Every method by name: where it lives, its paper, and what its result loads in. Nothing is imported until used."""

import ast
import dataclasses
import typing
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Tune, build, knob


@dataclass(frozen=True)
class Entry:
    """One method. `takes`, `may_take` and `gives` name artifacts: checkpoint, dataset, scores; without `gives` it only measures."""

    name: str
    object: str
    line: str
    paper: str
    takes: tuple[str, ...] = ("checkpoint",)
    gives: tuple[str, ...] = ("checkpoint",)
    may_take: tuple[str, ...] = ()
    loads_in: str = ""

    @property
    def family(self) -> str:
        return self.name.split(".")[0]

    @property
    def file(self) -> Path:
        module = self.object.split(":")[0]
        return Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")


STOCK = "transformers, vLLM"
OURS = "transformers, after `import modelwright.models`"
ENTRIES = [
    Entry(
        "curate.stdlib",
        "modelwright.curate.stdlib:stdlib",
        "text that every Python installation carries, as a dataset",
        "ours",
        takes=(),
        gives=("dataset",),
        loads_in="datasets",
    ),
    Entry(
        "reshape.fresh",
        "modelwright.reshape.fresh:fresh",
        "an untrained Llama and its own BPE tokenizer, sized by knobs",
        "ours",
        takes=("dataset",),
        loads_in=STOCK,
    ),
    Entry(
        "reshape.upcycle",
        "modelwright.reshape.upcycle:upcycle",
        "dense to mixture of experts by copying: sparse, noise, Drop-Upcycling, Branch-Train-MiX",
        "arXiv 2212.05055, 2502.19261, 2403.07816",
        loads_in=STOCK,
    ),
    Entry(
        "reshape.half_reset",
        "modelwright.reshape.half_reset:half_reset",
        "give a tuned model half of its pre-trained matrices back",
        "arXiv 2404.18466",
        loads_in=STOCK,
    ),
    Entry(
        "reshape.edit",
        "modelwright.reshape.edit:edit",
        "teach one fact by moving the keys or the values of one layer's memories",
        "arXiv 2402.12233",
        loads_in=STOCK,
    ),
    Entry(
        "reshape.rmoe",
        "modelwright.reshape.rmoe:rmoe",
        "experts whose routers are recurrent over depth, from a dense model or from Mixtral",
        "arXiv 2408.06793",
        loads_in=OURS,
    ),
    Entry(
        "reshape.hyper_moe",
        "modelwright.reshape.hyper_moe:hyper_moe",
        "a Mixtral whose idle experts give each token an adapter, through a hypernetwork",
        "arXiv 2402.12656",
        loads_in=OURS,
    ),
    Entry("tune.full", "modelwright.tune.full:Full", "train every weight", "the baseline", takes=("checkpoint", "dataset"), loads_in=STOCK),
    Entry(
        "judge.continual",
        "modelwright.judge.continual:continual",
        "accuracy matrices of task sequences: AA, BWT, FWT, learning accuracy; or train a sequence and fill one",
        "GEM 1706.08840, TRACE 2310.06762",
        takes=(),
        gives=(),
        may_take=("checkpoint",),
    ),
    Entry(
        "tune.mix",
        "modelwright.tune.mix:Mix",
        "several ways to tune in one step: selectors, update rules, loss terms and data policies together",
        "ours",
        takes=("checkpoint", "dataset"),
        loads_in=STOCK,
    ),
    Entry(
        "tune.hft",
        "modelwright.tune.hft:Hft",
        "half fine-tuning: freeze a random half of the matrices each round",
        "arXiv 2404.18466",
        takes=("checkpoint", "dataset"),
        loads_in=STOCK,
    ),
    Entry(
        "tune.migu",
        "modelwright.tune.migu:Migu",
        "only output units that fire strongly may move",
        "arXiv 2406.17245",
        takes=("checkpoint", "dataset"),
        loads_in=STOCK,
    ),
    Entry(
        "tune.key_value",
        "modelwright.tune.key_value:KeyValue",
        "tune the keys or the values of the feed-forward memories",
        "arXiv 2402.12233",
        takes=("checkpoint", "dataset"),
        loads_in=STOCK,
    ),
    Entry(
        "tune.c_rlft",
        "modelwright.tune.c_rlft:CRlft",
        "mixed-quality chats: the source as a condition and a weight, padding-free packing",
        "arXiv 2309.11235",
        takes=("checkpoint", "dataset"),
        loads_in=STOCK,
    ),
    Entry(
        "tune.gw_moe",
        "modelwright.tune.gw_moe:GwMoe",
        "tokens with an undecided router are sent to all experts while training",
        "arXiv 2406.12375",
        takes=("checkpoint", "dataset"),
        loads_in=STOCK,
    ),
    Entry(
        "tune.rectify",
        "modelwright.tune.rectify:Rectify",
        "train experts under a capacity, with dropped tokens and empty slots put to use",
        "arXiv 2402.12399",
        takes=("checkpoint", "dataset"),
        loads_in=STOCK,
    ),
    Entry(
        "tune.lora_moe",
        "modelwright.tune.lora_moe:LoraMoe",
        "LoRA experts with a soft router on a frozen dense model, in two groups for knowledge and for tasks",
        "arXiv 2312.09979",
        takes=("checkpoint", "dataset"),
        loads_in=OURS,
    ),
    Entry(
        "tune.balance",
        "modelwright.tune.balance:Balance",
        "keep the load of experts even: per-layer and global-batch losses, z-loss, or a bias without a loss",
        "arXiv 2101.03961, 2501.11873, 2412.19437, 2202.08906, 2408.15664",
        takes=("checkpoint", "dataset"),
        loads_in=STOCK,
    ),
    Entry(
        "tune.lora",
        "modelwright.tune.lora:Lora",
        "train low-rank adapters through PEFT, saved as an adapter or merged",
        "arXiv 2106.09685",
        takes=("checkpoint", "dataset"),
        loads_in=STOCK + ", PEFT",
    ),
    Entry(
        "reward.calibrate",
        "modelwright.reward.calibrate:calibrate",
        "take a known bias, such as length, out of recorded reward scores",
        "arXiv 2409.17407",
        takes=(),
        gives=("scores",),
        loads_in="any reader of jsonl; reward functions and models through modelwright.reward.wrapper",
    ),
    Entry(
        "reward.bench",
        "modelwright.reward.bench:bench",
        "RewardBench, JudgeBench, RM-Bench and AlpacaEval from recorded scores, raw and calibrated",
        "arXiv 2409.17407, 2403.13787, 2410.12784, 2410.16184, 2404.04475",
        takes=(),
        gives=(),
    ),
    Entry(
        "judge.llmbar",
        "modelwright.judge.llmbar:llmbar",
        "how well a judge follows instructions: fifteen ways to ask, both orders; recorded runs recomputed",
        "arXiv 2310.07641",
        takes=(),
        gives=(),
        may_take=("checkpoint",),
    ),
    Entry(
        "judge.select",
        "modelwright.judge.select:select_step",
        "one answer out of many sampled chains: votes, complexity, early stopping, rewards; budget curves",
        "arXiv 2203.11171, 2210.00720, 2401.10480, 2305.11860",
        takes=(),
        gives=(),
    ),
    Entry(
        "judge.aor",
        "modelwright.judge.aor:aor_step",
        "choose among answers by judging how they were reached: local scores, global evaluation, dynamic sampling",
        "arXiv 2405.12939",
        takes=(),
        gives=(),
        may_take=("checkpoint",),
    ),
    Entry(
        "cache.generate",
        "modelwright.cache.generate:generate",
        "continue a long prompt with most of its keys and values evicted: NACL and seven known ways",
        "arXiv 2408.03675",
        gives=(),
    ),
    Entry(
        "cache.bench",
        "modelwright.cache.bench:bench",
        "what a checkpoint loses under each way to evict, on your text and on made tasks",
        "arXiv 2408.03675",
        gives=(),
        may_take=("dataset",),
    ),
]
FAMILIES = {
    "curate": "data: extraction, rules, quality",
    "reshape": "model to model",
    "tune": "training without forgetting",
    "reward": "reward models and their calibration",
    "rl": "alignment by reinforcement",
    "cache": "serving in less memory",
    "judge": "judging and selecting answers",
    "inspect": "what is inside",
    "modalities": "tables, pixels, music, series",
}


def entry(name: str) -> Entry:
    """The entry called `name`; UserError with the nearest name otherwise."""
    for e in ENTRIES:
        if e.name == name:
            return e
    raise UserError(f"unknown step '{name}'", how=did_you_mean(name, [e.name for e in ENTRIES]))


def tuning(name: str) -> Entry:
    """The way to tune called `name`, with or without its family."""
    e = entry(name if "." in name else f"tune.{name}")
    if e.family != "tune":
        ways = ", ".join(one.name.split(".")[1] for one in ENTRIES if one.name.startswith("tune."))
        raise UserError(f"{e.name} is no way to tune", "it does not train", f"choose one of {ways}")
    return e


def load(e: Entry) -> Any:
    """Import the method itself (this may import torch)."""
    module, attribute = e.object.split(":")
    return getattr(import_module(module), attribute)


def mixed(mix: Any) -> list[tuple[Entry, Any]]:
    """The methods that tune.mix puts together, each with its knobs; data and training are shared."""
    shared = {f.name: getattr(mix, f.name) for f in dataclasses.fields(Tune)}
    found = []
    if not mix.methods:
        raise UserError("tune.mix has no methods", how="write tune: [hft, migu]")
    for item in mix.methods:
        name, own = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, {})
        if not isinstance(name, str) or name in ("mix", "tune.mix"):
            raise UserError(
                f"methods has {item!r}", "each is a way to tune, or one with its settings", "write methods: [hft, lora: {r: 4}]"
            )
        e = tuning(name)
        if extra := set(own or {}) & shared.keys():
            raise UserError(f"methods.{name} has {', '.join(sorted(extra))}", "data and training are shared", "give it beside methods")
        found.append((e, dataclasses.replace(build(knobs(e), own or {}, f"methods.{name}"), **shared)))
    return found


def techniques(e: Entry, settings: Any) -> list[Any]:
    """The technique of a tuning step, or the techniques of a mix; imports them."""
    return [load(one)(k) for one, k in (mixed(settings) if e.name == "tune.mix" else [(e, settings)])]


def techniques_named(name: str, values: dict[str, Any]) -> list[Any]:
    """The same from a name, with or without its family, and plain settings."""
    return techniques(e := tuning(name), build(knobs(e), values, e.name))


@cache
def _light(path: Path) -> dict[str, Any]:
    # The knobs stand at the head of a file that also imports torch. Running only the head's dataclasses
    # keeps one file per method and lets `check` and `--help` answer in a fraction of a second.
    tree = ast.parse(path.read_text())
    keep: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in ("dataclasses", "typing", "modelwright.core.knobs"):
            keep.append(node)
        if isinstance(node, ast.ClassDef) and node.name == "Knobs":
            keep.append(node)
    space: dict[str, Any] = {"__name__": f"modelwright.light.{path.stem}", "knob": knob, "dataclass": dataclass, "typing": typing}
    exec(compile(ast.Module(keep, []), str(path), "exec"), space)  # noqa: S102 - our own source file
    space["__doc__"] = ast.get_docstring(tree) or ""
    return space


def knobs(e: Entry) -> Any:
    """The method's Knobs dataclass, without importing the method."""
    found = _light(e.file).get("Knobs")
    if not dataclasses.is_dataclass(found):
        raise TypeError(f"{e.file} has no dataclass named Knobs")
    return found


def doc(e: Entry) -> str:
    """The method's docstring, without importing the method."""
    return str(_light(e.file)["__doc__"])
