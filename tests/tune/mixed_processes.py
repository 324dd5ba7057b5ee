"""Training runs of SFTMix and SpIEL for test_mixed_processes.py, under torchrun: python mixed_processes.py FOLDER PROCESSES."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "core" / "train"))

import processes

from modelwright.core.train import dist
from modelwright.core.train.technique import Technique
from modelwright.tune import lora, sftmix, spiel


def _mix() -> list[Technique]:
    return [sftmix.SftMix(sftmix.Knobs(split="random", mu=1.0))]


def _sparse(**k: Any) -> Callable[[], list[Technique]]:
    return lambda: [spiel.Spiel(spiel.Knobs(**{"rank": 1, "reselect": 3, "window": 2, **k}))]


CASES: dict[str, Any] = {
    "sftmix": ("llama", _mix, processes.ragged, {"lr": 1e-3}),
    "sftmix packed": ("llama", _mix, processes.chats, {"accumulate": 2, "gradient_checkpointing": True}),
    "sftmix lora": ("llama", lambda: [lora.Lora(lora.Knobs(r=2)), *_mix()], processes.ragged, {}),
    "spiel ag": ("llama", _sparse(), processes.ragged, {"lr": 1e-3, "accumulate": 2, "weight_decay": 0.1}),
    "spiel ma": ("llama", _sparse(growth="ma"), processes.ragged, {"lr": 1e-3}),
    "spiel conv1d": ("gpt2", _sparse(), processes.ragged, {"lr": 1e-3, "gradient_checkpointing": True}),
}
RESUMED = ("sftmix", "spiel ag", "spiel ma")
processes.CASES.update(CASES)


def main(folder: Path, count: int) -> None:
    torch.set_num_threads(1)
    dist.start(count)
    for strategy in ("ddp", "fsdp2"):
        for name, stop in [*((n, None) for n in CASES), *((n, 3) for n in RESUMED)]:
            end = " resumed" if stop else ""
            found = processes.one(name, folder / f"{strategy} {name}{end}", stop=stop, strategy=strategy)
            if found:
                torch.save(found, folder / f"{strategy} {name}{end}.pt")
    dist.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
