"""Every method by name: one line each. Nothing is imported until used.

Other packages add methods by an entry point of the group `modelwright.methods` that names a list of `method(...)` lines:

    [project.entry-points."modelwright.methods"]
    my_methods = "my_methods:METHODS"
"""

import ast
import dataclasses
import os
import sys
import typing
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError, did_you_mean, short
from modelwright.core.knobs import Tune, build, knob


@dataclass(frozen=True)
class Shape:
    """What a kind of method takes and gives: checkpoint, dataset, scores. One that gives nothing only measures."""

    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    may_take: tuple[str, ...] = ()
    loads_in: str = ""


@dataclass(frozen=True)
class Entry:
    """One method: its name (family.method), one line, its papers (arXiv numbers or words), and the module that holds it."""

    name: str
    line: str
    paper: str
    shape: Shape
    module: str
    loads_in: str

    @property
    def family(self) -> str:
        return self.name.split(".")[0]

    @property
    def takes(self) -> tuple[str, ...]:
        return self.shape.takes

    @property
    def gives(self) -> tuple[str, ...]:
        return self.shape.gives

    @property
    def may_take(self) -> tuple[str, ...]:
        return self.shape.may_take

    @property
    def file(self) -> Path:
        """The method's source file, found without importing it."""
        return _source(self.module)


def method(name: str, line: str, paper: str, shape: Shape, *, module: str = "", loads_in: str = "") -> Entry:
    """One line of the table. The module is modelwright.FAMILY.METHOD unless given; its name METHOD is the function or class."""
    return Entry(name, line, paper, shape, module or f"modelwright.{name}", loads_in or shape.loads_in)


STOCK = "transformers, vLLM"
OURS = "transformers, after `import modelwright.models`"
RESHAPES = Shape(takes=("checkpoint",), gives=("checkpoint",), loads_in=STOCK)
CREATES = Shape(takes=("dataset",), gives=("checkpoint",), loads_in=STOCK)
TUNES = Shape(takes=("checkpoint", "dataset"), gives=("checkpoint",), loads_in=STOCK)
CURATES = Shape(gives=("dataset",), loads_in="datasets")
REFINES = Shape(takes=("dataset",), gives=("dataset",), loads_in="datasets")
SCORES = Shape(gives=("scores",), loads_in="any reader of jsonl; reward functions and models through modelwright.reward.table.wrapper")
MEASURES = Shape()  # from recorded results alone
JUDGES = Shape(may_take=("checkpoint",))
INSPECTS = Shape(may_take=("checkpoint", "dataset"))  # a checkpoint, or recorded results
PROBES = Shape(takes=("checkpoint",), may_take=("dataset",))
SERVES = Shape(takes=("checkpoint",))
# fmt: off
METHODS = [
    method("curate.stdlib", "text that every Python installation carries, as a dataset", "ours", CURATES),
    method("reshape.fresh", "an untrained Llama and its own BPE tokenizer, sized by knobs; norms pre, post, Mix-LN or OLMo 2", "ours, 2412.13795", CREATES),
    method("curate.extract", "the main text of web pages from WARC or HTML: a fast extractor, and a careful one where it is unsure", "2402.19282", CURATES),
    method("curate.rules", "Gopher, C4, FineWeb and other rules from one tokenisation: a column per signal, a reason per removal", "2402.19282, 2112.11446, 1910.10683, 2406.17557", REFINES),
    method("curate.dedup", "exact and near-duplicates out: MinHash bands, verified pairs, one copy of each cluster stays by a rule", "2402.19282", REFINES),
    method("curate.safety", "domain and word lists, classifiers as plug-ins, personal data masked with check digits", "2402.19282", REFINES),
    method("curate.web", "from pages or raw text to a corpus: extract, rules, dedup and safety as one funnel that multiplies out", "2402.19282", CURATES),
    method("reshape.upcycle", "dense to mixture of experts by copying: sparse, noise, Drop-Upcycling, Branch-Train-MiX", "2212.05055, 2502.19261, 2403.07816", RESHAPES),
    method("reshape.grow", "more blocks, wider blocks or both from the weights that are there: stack, interpolate, zero, Net2Net, masked; SOLAR, LLaMA-Pro", "2405.15319, 1511.05641, 2310.07999, 2305.02869, 2312.15166, 2401.02415", RESHAPES),
    method("reshape.growth_plan", "when to grow: tokens of the small model by G_stack's law, both halves in FLOPs", "2405.15319", MEASURES),
    method("reshape.gqa", "fewer key and value heads without training: mean, first, or turned towards each other and then averaged", "2305.13245, 2412.20677", RESHAPES),
    method("reshape.moefy", "dense to mixture of experts by splitting the feed-forward part: same parameters, fewer per token", "2110.01786, 2502.04416", RESHAPES),
    method("reshape.half_reset", "give a tuned model half of its pre-trained matrices back", "2404.18466", RESHAPES),
    method("reshape.edit", "teach one fact by moving the keys or the values of one layer's memories", "2402.12233", RESHAPES),
    method("reshape.rmoe", "experts whose routers are recurrent over depth, from a dense model or from Mixtral", "2408.06793", RESHAPES, loads_in=OURS),
    method("reshape.hyper_moe", "a Mixtral whose idle experts give each token an adapter, through a hypernetwork", "2402.12656", RESHAPES, loads_in=OURS),
    method("tune.full", "train every weight", "the baseline", TUNES),
    method("tune.mix", "several ways to tune in one step: selectors, update rules, loss terms and data policies together", "ours", TUNES),
    method("tune.hft", "half fine-tuning: freeze a random half of the matrices each round", "2404.18466", TUNES),
    method("tune.migu", "only output units that fire strongly may move", "2406.17245", TUNES),
    method("tune.key_value", "tune the keys or the values of the feed-forward memories", "2402.12233", TUNES),
    method("tune.masked", "open the hidden parts of a model that was grown by masks, little by little", "2305.02869", TUNES),
    method("tune.new_blocks", "train only the blocks that growing added", "2401.02415", TUNES),
    method("tune.c_rlft", "mixed-quality chats: the source as a condition and a weight, padding-free packing", "2309.11235", TUNES),
    method("tune.gw_moe", "tokens with an undecided router are sent to all experts while training", "2406.12375", TUNES),
    method("tune.rectify", "train experts under a capacity, with dropped tokens and empty slots put to use", "2402.12399", TUNES),
    method("tune.lora_moe", "LoRA experts with a soft router on a frozen dense model, in two groups for knowledge and for tasks", "2312.09979", TUNES, loads_in=OURS),
    method("tune.balance", "keep the load of experts even: per-layer and global-batch losses, z-loss, or a bias without a loss", "2101.03961, 2501.11873, 2412.19437, 2202.08906, 2408.15664", TUNES),
    method("tune.lora", "train low-rank adapters through PEFT, saved as an adapter or merged", "2106.09685", TUNES, loads_in=STOCK + ", PEFT"),
    method("reward.calibrate", "take a known bias, such as length, out of recorded reward scores", "2409.17407", SCORES),
    method("reward.bench", "RewardBench, JudgeBench, RM-Bench and AlpacaEval from recorded scores, raw and calibrated", "2409.17407, 2403.13787, 2410.12784, 2410.16184, 2404.04475", MEASURES),
    method("cache.generate", "continue a long prompt with most of its keys and values evicted: NACL and seven known ways", "2408.03675", SERVES),
    method("cache.bench", "what a checkpoint loses under each way to evict, on your text and on made tasks", "2408.03675", PROBES),
    method("inspect.depth", "what each block does: gradient norm, angular distances, the loss without it", "2412.13795, 2403.17887", PROBES),
    method("inspect.scaling_law", "a / N^b + c for each domain, and the reference losses that it predicts", "2310.06694", MEASURES),
    method("judge.continual", "accuracy matrices of task sequences: AA, BWT, FWT, learning accuracy; or train a sequence and fill one", "GEM 1706.08840, TRACE 2310.06762", JUDGES),
    method("judge.llmbar", "how well a judge follows instructions: fifteen ways to ask, both orders; recorded runs recomputed", "2310.07641", JUDGES),
    method("judge.select", "one answer out of many sampled chains: votes, complexity, early stopping, rewards; budget curves", "2203.11171, 2210.00720, 2401.10480, 2305.11860", MEASURES),
    method("inspect.experts", "do the experts of a mixture differ: weights, outputs, router; copies and dead experts with advice", "2406.18219", INSPECTS),
    method("inspect.modularity", "which neurons and experts carry a function: predictivity, functional experts, perturbation, stabilisation", "2305.18390", INSPECTS),
    method("modalities.backcast", "daily values of years of which only monthly or yearly totals are known, from temperature and calendar", "2407.20057", MEASURES),
    method("modalities.critical_temperature", "the temperature at which a daily series turns from falling to rising, with its interval", "2407.20057", MEASURES),
    method("judge.aor", "choose among answers by judging how they were reached: local scores, global evaluation, dynamic sampling", "2405.12939", JUDGES),
]
# fmt: on
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

ALIASES = {  # what people type for it elsewhere -> methods and commands; the first that is there is named
    "sft": ("tune.full", "tune.lora"),
    "finetune": ("tune.full", "tune.lora"),
    "fine_tune": ("tune.full", "tune.lora"),
    "finetuning": ("tune.full", "tune.lora"),
    "train": ("tune.full", "tune.lora"),
    "pretrain": ("reshape.fresh", "tune.full"),
    "peft": ("tune.lora",),
    "qlora": ("tune.lora",),
    "openchat": ("tune.c_rlft",),
    "dpo": ("rl.dpo", "tune.dpo"),
    "ppo": ("rl.ppo",),
    "rlhf": ("rl.ppo", "rl.dpo"),
    "grpo": ("rl.grpo",),
    "reward_model": ("reward.model", "reward.train"),
    "merge": ("reshape.merge", "reshape.upcycle"),
    "moe": ("reshape.upcycle",),
    "upcycling": ("reshape.upcycle",),
    "prune": ("reshape.prune",),
    "evict": ("cache.generate", "cache.bench"),
    "kv_cache": ("cache.generate", "cache.bench"),
    "arena": ("judge.llmbar",),
    "self_consistency": ("judge.select",),
    "inference": ("modelwright generate", "cache.generate"),
    "sample": ("modelwright generate", "cache.generate"),
    "generate": ("modelwright generate", "cache.generate"),
    "complete": ("modelwright generate",),
    "chat": ("modelwright chat",),
    "talk": ("modelwright chat",),
    "eval": ("modelwright eval",),
    "evaluate": ("modelwright eval",),
    "lm_eval": ("modelwright eval --tasks",),
    "perplexity": ("modelwright eval",),
    "upload": ("modelwright push",),
    "push": ("modelwright push",),
    "try": ("modelwright try",),
}


GROUP = "modelwright.methods"


def _declared() -> bool:
    """Whether an installed package declares the group at all. Looking is ten times cheaper than importing importlib.metadata."""
    for folder in dict.fromkeys(sys.path):
        try:
            names = [n for n in os.listdir(folder or ".") if n.endswith((".dist-info", ".egg-info"))]
        except OSError:
            continue
        for name in names:
            try:
                with open(os.path.join(folder, name, "entry_points.txt"), "rb") as file:
                    if GROUP.encode() in file.read():
                        return True
            except OSError:
                continue
    return False


@cache
def _installed() -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Our methods and those of installed packages, and a sentence for each package that could not be read."""
    found = {e.name: e for e in METHODS}
    problems: list[str] = []
    if not _declared():
        return tuple(found.values()), ()
    from importlib import metadata

    for point in metadata.entry_points(group=GROUP):
        try:
            added = _table(point)
            for e in added:
                if not isinstance(e, Entry) or e.family not in FAMILIES or not e.name.split(".", 1)[-1].isidentifier():
                    raise TypeError(f"{e!r} is no method of a family ({', '.join(FAMILIES)})")
                if e.name in found:
                    raise ValueError(f"{e.name} exists already")
                if not e.file.is_file():
                    raise FileNotFoundError(f"{e.name} has no file {e.file}")
        except Exception as error:  # whatever another package does must not take the command line away
            problems.append(f"the methods of {point.value} are left out: {type(error).__name__}: {short(error)}")
        else:
            found |= {e.name: e for e in added}
    return tuple(found.values()), tuple(problems)


def _table(point: typing.Any) -> list[Entry]:
    """The list that an entry point names: its statement alone is run, so that `list` does not import the package.

    Where the statement needs more than this module's names, the package is imported."""
    file = _source(point.module)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "modelwright.registry" and not n.level]
    named = [n for n in tree.body if isinstance(n, ast.Assign) and [getattr(t, "id", "") for t in n.targets] == [point.attr]]
    space: dict[str, Any] = {}
    try:
        exec(compile(ast.Module([*imports, *named], []), str(file), "exec"), space)  # noqa: S102 - an installed package
        return list(space[point.attr])
    except (NameError, KeyError):
        return list(point.load())


def _source(module: str) -> Path:
    """The source file of a module, found without importing it."""
    package, *rest = module.split(".")
    spec = find_spec(package)
    if spec is None:
        raise UserError(f"{module} has no source", f"the package {package} is not installed", "install it again")
    if not spec.submodule_search_locations:
        return Path(spec.origin or "")
    at = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
    return at / "__init__.py" if at.is_dir() else at.with_suffix(".py")


def entries() -> tuple[Entry, ...]:
    """All methods, those of installed packages included."""
    return _installed()[0]


def problems() -> tuple[str, ...]:
    """A sentence for each installed package whose methods could not be read."""
    return _installed()[1]


def families() -> list[str]:
    """The families that have methods, in order."""
    return [f for f in FAMILIES if any(e.family == f for e in entries())]


def entry(name: str) -> Entry:
    """The entry called `name`; UserError with the nearest name otherwise."""
    for e in entries():
        if e.name == name:
            return e
    raise UserError(f"unknown step '{name}'", "; ".join(problems()), hint(name) or did_you_mean(name, [e.name for e in entries()]))


def hint(name: str) -> str:
    """What a word that names no method and no command is called here, or an empty text."""
    word = name.split(".")[-1].lower().replace("-", "_")
    known = {e.name: e for e in entries()}
    found = [n for n in (*ALIASES.get(word, ()), *(f"{f}.{word}" for f in FAMILIES)) if n in known or " " in n]
    if not found:
        return f"no method for {word} is here yet" if word in ALIASES else ""
    return f"{word} is {' or '.join(dict.fromkeys(found))} here"


def tuning(name: str) -> Entry:
    """The way to tune called `name`, with or without its family."""
    e = entry(name if "." in name else f"tune.{name}")
    if e.family != "tune":
        ways = ", ".join(one.name.split(".")[1] for one in entries() if one.name.startswith("tune."))
        raise UserError(f"{e.name} is no way to tune", "it does not train", f"choose one of {ways}")
    return e


def load(e: Entry) -> Any:
    """Import the method itself (this may import torch)."""
    return import_module(e.module).METHOD


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
    tree = ast.parse(path.read_text(encoding="utf-8"))
    keep: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in ("dataclasses", "typing", "modelwright.core.knobs"):
            keep.append(node)
        if isinstance(node, ast.ClassDef) and node.name == "Knobs":
            keep.append(node)
    space: dict[str, Any] = {"__name__": f"modelwright.light.{path.stem}", "knob": knob, "dataclass": dataclass, "typing": typing}
    exec(compile(ast.Module(keep, []), str(path), "exec"), space)  # noqa: S102 - a method's own source file
    space["__doc__"] = ast.get_docstring(tree) or ""
    return space


def _head(e: Entry) -> dict[str, Any]:
    """What stands at the head of a method's file; UserError where it cannot be read so."""
    try:
        head = _light(e.file)
        if not dataclasses.is_dataclass(head.get("Knobs")):
            raise TypeError("it has no dataclass named Knobs")
    except UserError:
        raise
    except Exception as error:  # a plug-in's file may hold anything
        why = f"{type(error).__name__}: {short(error)}"
        how = "its Knobs may use the names of dataclasses, typing and modelwright.core.knobs alone"
        raise UserError(f"the settings of {e.name} cannot be read from {e.file}", why, how) from None
    return head


def knobs(e: Entry) -> Any:
    """The method's Knobs dataclass, without importing the method."""
    return _head(e)["Knobs"]


def doc(e: Entry) -> str:
    """The method's docstring, without importing the method."""
    return str(_head(e)["__doc__"])
