"""PPO runs for test_ppo_processes.py, by one process or under torchrun: python ppo_processes.py FOLDER PROCESSES."""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from families import model_of
from modelwright.core.knobs import Train
from modelwright.core.train import dist
from modelwright.core.train.loop import fit
from modelwright.rl.ppo import Knobs, Ppo
from small import rows

CASES: dict[str, dict[str, Any]] = {
    "model": {},
    "head": {"critic": "head", "segmenter": "perplexity"},
    "passes": {"ppo_epochs": 2, "minibatches": 2, "segmenter": "random"},
}


def one(name: str, folder: Path, stop: int | None = None, **changes: Any) -> dict[str, Any] | None:
    """Train one case; what to compare, on the first process. With `stop` the run is broken off there and taken up again."""
    usual = {"reward_function": "modelwright.rl.rollout.examples:letters", "response_tokens": 8, "reward_clip": 0.0}
    train = {"batch": 4 // dist.world(), "lr": 1e-3, "schedule": "constant", "warmup": 0.0, "epochs": 3.0, "save_every": 1}
    knobs = Train(**{**train, "divergence": 0.0, "record": False, **changes})
    arguments = {"evals": {"new": rows(6, 6, ragged=True, seed=4)}, "folder": folder, "seed": 3}

    def tick(step: int, of: int) -> None:
        if step == stop:
            raise KeyboardInterrupt

    technique = Ppo(Knobs(**{**usual, **CASES[name]}))
    try:
        out = fit(model_of("llama"), rows(8, 6, ragged=True), knobs, techniques=[technique], tick=tick, **arguments)
    except KeyboardInterrupt:
        technique = Ppo(Knobs(**{**usual, **CASES[name]}))
        out = fit(model_of("llama"), rows(8, 6, ragged=True), knobs, techniques=[technique], **arguments)
    if dist.rank():
        return None
    return {
        "weights": {n: p.detach().clone() for n, p in out.model.state_dict().items()},
        "critic": {n: p.detach().clone() for n, p in technique.critic.state_dict().items()},
        "updates": technique.history.updates,
        "evals": [[e["loss"], e["reward"], e["response tokens"]] for e in out.evals],
        "facts": out.facts,
        "tokens": out.tokens,
    }


def main(folder: Path, processes: int) -> None:
    torch.set_num_threads(1)
    dist.start(processes)
    for strategy in ("ddp", "fsdp2"):
        for name, stop in [*((n, None) for n in CASES), ("passes", 3), ("model", 2)]:
            found = one(name, folder / f"{strategy} {name} {stop}", stop, strategy=strategy)
            if found:
                torch.save(found, folder / f"{strategy} {name} {stop}.pt")
    dist.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
