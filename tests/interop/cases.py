"""What is made and asked: every method that names an engine, from every source family it takes, and configs that look real.

A case is a method, a source and the knobs. Sources are random models with heads of width 32, the narrowest that vLLM's attention
takes, with the seedling's tokenizer. Methods, families and tiny knobs come from tests/matrix.py, so that a new method is asked
without a word here; ONLY_HERE adds settings of config.json that engines are known to read in different ways.
"""

import json
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import modelwright
from families import FAMILIES, model_of
from matrix import ROWS
from modelwright import registry
from modelwright.core.files import fingerprint
from modelwright.core.model.checkpoint import SEEDLING, Checkpoint
from modelwright.core.model.portable import make_portable
from modelwright.core.model.writer import copy_companions

PROBE = Path(modelwright.__file__).parent / "data" / "probe.txt"
PLUGIN = Path(modelwright.__file__).parent / "models" / "vllm.py"
_WIDE = {"vocab_size": 2048, "max_position_embeddings": 512, "hidden_size": 128, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
_OWN_WORDS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 2048, "n_positions": 512, "n_embd": 128, "bos_token_id": 0, "eos_token_id": 0},
    "opt": _WIDE | {"word_embed_proj_dim": 64, "bos_token_id": 0},
}
_EXPERTS = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "intermediate_size": 96}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
_THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
_LONG = {  # longer than anything asked: vLLM chooses the factors by the longest text it may see, transformers by the text at hand
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 16, "long_factor": [4.0] * 16},
}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {kind: (kind, {}) for kind in FAMILIES} | {
    "llama theta 1e6": ("llama", _THETA),
    "llama llama3 rope": ("llama", {"rope_parameters": _LLAMA3}),
    "llama yarn": ("llama", {"rope_parameters": _YARN}),
    "llama linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama one key head": ("llama", {"num_key_value_heads": 1}),
    "llama biases": ("llama", {"attention_bias": True}),
    "llama wide heads": ("llama", {"head_dim": 64}),
    "mistral theta 1e6": ("mistral", _THETA),
    "mistral window": ("mistral", {"sliding_window": 16}),
    "qwen2 theta 1e6, tied": ("qwen2", _THETA | {"tie_word_embeddings": True}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": _YARN}),
    "qwen3 theta 1e6, tied": ("qwen3", _THETA | {"tie_word_embeddings": True}),
    "granite theta 1e6, tied": ("granite", _THETA | {"tie_word_embeddings": True}),
    "phi3 longrope": ("phi3", _LONG),
    "phi3 part rotary": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "gemma3 theta": (
        "gemma3",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
    ),
    "gpt_neox theta 1e5": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5}},
    ),
}
CHAT = "seedling with a chat template"
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
_LEARN = {"tokens": 60000, "batch": 8, "context": 64, "lr": 3e-3, "save_every": 1000, "warmup": 0.0, "eval_every": 1000}
TELLING: dict[str, dict[str, Any]] = {  # knobs under which a router that is read wrongly shows: experts that differ, scores that differ
    "reshape.upcycle": {"method": "drop", "router_std": 0.3},
    "reshape.hyper_moe": {"init": "paper"},
    "tune.c_rlft": {"train": _LEARN},  # long enough that its chats end
}
_LLAMAS = tuple(s for s in SOURCES if s.startswith(("llama", "mistral")))
ONLY_HERE: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "tune.full": [*((s, {}) for s in SOURCES if s not in ("bert", "t5", "t5_v1_1")), (CHAT, {})],
    "reshape.upcycle": [
        *((s, {}) for s in (*_LLAMAS, *(s for s in SOURCES if s.startswith(("qwen2 ", "qwen3 ", "granite ", "phi3 longrope"))))),
        *((s, {}) for s in ("granite", "phi3")),
        *((s, {"target": t}) for s in ("llama", "llama theta 1e6", "llama tied") for t in ("qwen2_moe", "granitemoe", "granitemoeshared")),
        ("mistral window", {"target": "qwen2_moe"}),
        ("llama llama3 rope", {"target": "qwen2_moe"}),
    ],
    "tune.lora_moe": [("llama", {"merge": "uniform"}), ("qwen2", {"merge": "uniform"})],
}


@dataclass(frozen=True)
class Case:
    """One result to be made: a method, the name of its source, knobs beside those of the matrix."""

    method: str
    source: str
    knobs: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        more = ", ".join(f"{k} {v}" for k, v in self.knobs.items())
        return f"{self.method} from {self.source or 'nothing'}" + (f" ({more})" if more else "")

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() or c in ".-" else "_" for c in self.name)


def cases() -> list[Case]:
    """Every method whose entry names transformers, from every family of its row, and what stands only here."""
    found = {}
    for e in registry.METHODS:
        if "transformers" not in e.loads_in or e.name not in ROWS:
            continue
        rows = [(f, {}) for f in ROWS[e.name].families if f not in ("bert", "t5", "t5_v1_1")]
        for source, knobs in [*rows, *ONLY_HERE.get(e.name, [])]:
            case = Case(e.name, source, knobs)
            found[case.name] = case
    return list(found.values())


def source(name: str, work: Path) -> Path | str | None:
    """The folder of a source, made once."""
    if name in ("", "seedling"):
        return name or None
    folder = work / "sources" / name.replace(" ", "_").replace(",", "")
    if name == CHAT and not folder.exists():
        shutil.copytree(SEEDLING, folder)
        (folder / "chat_template.jinja").write_text(_TEMPLATE)
    if not (folder / "config.json").exists():
        kind, changes = SOURCES[name]
        values = FAMILIES[kind][2]
        sizes = _OWN_WORDS.get(kind, _WIDE) | {k: v for k, v in _EXPERTS.items() if k in values}
        sizes |= {"head_dim": 32} if "head_dim" in values else {}
        model_of(kind, **{**sizes, **changes}).save_pretrained(folder)
        copy_companions(Checkpoint(SEEDLING), folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        make_portable(folder)  # as on the hub, where most settings stand in the old spelling
    return folder


def make(case: Case, work: Path) -> Path:
    """Run the method; the folder of the result, made once."""
    to = results(work) / case.folder
    if (to / "modelwright.json").exists():
        return to
    base = source(case.source, work)
    knobs = {**ROWS[case.method].knobs, **TELLING.get(case.method, {}), **case.knobs}
    knobs |= _data("chats" if case.source == CHAT else ROWS[case.method].data, work)
    knobs |= {"train": _LEARN, "data": {"path": knobs["data"], "column": "messages"}} if case.source == CHAT else {}
    knobs = {k: str(base) if v == "BASE" else v for k, v in knobs.items()}
    modelwright.run(case.method, base=base, to=to, **knobs)
    return to


@cache
def results(work: Path) -> Path:
    """Where results lie: a folder for this state of the source code; those of earlier states are removed."""
    files = [*sorted(Path(modelwright.__file__).parent.rglob("*.py")), *sorted(Path(__file__).parents[1].glob("*.py")), Path(__file__)]
    files.remove(PLUGIN)  # it changes how a result is asked, not the result
    found = work / f"results-{fingerprint(*files)[-12:]}"
    for old in set(work.glob("results-*")) - {found}:
        shutil.rmtree(old)
    return found


def _data(kind: bool | str, work: Path) -> dict[str, str]:
    work.mkdir(parents=True, exist_ok=True)
    if kind == "fact":
        fact = {"prompt": "import os is", "new": "red", "true": "blue", "neighbours": ["import re is"]}
        (work / "fact.json").write_text(json.dumps(fact))
        return {"fact": str(work / "fact.json")}
    rows: list[dict[str, Any]] = [{"text": line} for line in PROBE.read_text(encoding="utf-8").splitlines() if len(line) > 40][:24]
    if kind == "chats":
        rows = chats()
    name = work / f"{'chats' if kind == 'chats' else 'texts'}.jsonl"
    name.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"data": str(name)} if kind else {}


def chats() -> list[dict[str, Any]]:
    """Short chats whose answers can be learnt in seconds."""
    return [
        {
            "messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": f"it is {i + 1}"}],
            "source": ("good", "bad")[i % 2],
        }
        for i in range(24)
    ]
