"""Shared fixtures: tiny random checkpoints of many families, the real small checkpoint, one thread, fixed seeds."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MODELWRIGHT_CACHE", tempfile.mkdtemp(prefix="modelwright-tests-"))
SHARED = Path(os.environ.get("MODELWRIGHT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if "modelwright-tests-" in os.environ["MODELWRIGHT_CACHE"] and not hasattr(session.config, "workerinput"):
        shutil.rmtree(os.environ["MODELWRIGHT_CACHE"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take more than three CPU seconds run with `make slow`; they are listed where they do not say so themselves."""
    listed = set((Path(__file__).parent / "slow.txt").read_text().splitlines())
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import sys

    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real test data; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"real data is not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A really trained Llama of 260,032 parameters."""
    return shared / "stories260K" / "hf"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny("qwen2", tied=False, ...) -> folder of a tiny random checkpoint with spread-out weights, made once per variant."""
    made: dict[str, Path] = {}

    def make(kind: str, *, seed: int = 0, dtype: str = "float32", shard: str = "5GB", **changes: Any) -> Path:
        key = json.dumps([kind, seed, dtype, shard, changes], sort_keys=True)
        if key not in made:
            from families import model_of

            folder = tmp_path_factory.mktemp(kind)
            model_of(kind, seed=seed, dtype=dtype, **changes).save_pretrained(folder, max_shard_size=shard)
            made[key] = folder
        return made[key]

    return make
