"""Every method with tiny knobs: one row per registry entry, run by test_matrix.py over the families it fits."""

from dataclasses import dataclass, field
from typing import Any

DENSE = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Row:
    """Knobs small enough for a test; the families to run on; the test files that prove the method."""

    knobs: dict[str, Any]
    proofs: tuple[str, ...]
    families: tuple[str, ...] = DENSE
    data: bool = False  # give token ids as data
    loads_in: dict[str, str] = field(default_factory=dict)


_TRAIN = {"tokens": 64, "batch": 2, "context": 16, "lr": 1e-2, "save_every": 100, "warmup": 0.0}
ROWS: dict[str, Row] = {
    "curate.stdlib": Row({"parts": ["topics"], "characters": 2000}, ("tests/curate/test_stdlib.py",), families=("",)),
    "reshape.fresh": Row(
        {"vocab": 300, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48, "context": 64},
        ("tests/reshape/test_fresh.py",),
        families=("",),
        data=True,
    ),
    "reshape.upcycle": Row(
        {"experts": 4, "top_k": 2},
        ("tests/reshape/test_upcycle.py", "tests/reshape/test_stock.py", "tests/reshape/test_routers.py"),
        loads_in={
            "llama": "MixtralForCausalLM",
            "mistral": "MixtralForCausalLM",
            "qwen2": "Qwen2MoeForCausalLM",
            "qwen3": "Qwen3MoeForCausalLM",
        },
    ),
    "tune.full": Row(
        {"train": _TRAIN},
        ("tests/core/test_training.py", "tests/tune/test_tune.py"),
        families=(*DENSE, "gpt2", "gpt_neox", "opt", "mixtral"),
        data=True,
    ),
    "tune.lora": Row({"train": _TRAIN, "r": 2}, ("tests/tune/test_tune.py",), families=(*DENSE, "gpt2", "phi3"), data=True),
}
