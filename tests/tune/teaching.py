"""Training runs for test_teaching_processes.py, by one process or under torchrun: python teaching.py FOLDER DATA PROCESSES."""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from modelwright.core.knobs import Train, build
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train import dist
from modelwright.core.train.loop import fit
from modelwright.tune import ernie_code, knife, map_tuning

TEACHER: dict[str, Any] = {"way": "teacher"}
STUDENT: dict[str, Any] = {"way": "student", "states": "fp32"}
STILL: dict[str, Any] = {"dropout": 0.0}
CASES: dict[str, tuple[Any, str, str, dict[str, Any], dict[str, Any]]] = {
    "teacher t5": (knife, "questions", "t5", TEACHER, {}),
    "teacher decoder recomputed": (knife, "questions", "seedling", TEACHER, {"gradient_checkpointing": True}),
    "student t5 accumulated": (knife, "questions", "t5", STUDENT, {"accumulate": 2}),
    "student decoder": (knife, "questions", "seedling", {**STUDENT, "kd_out": "kl"}, {}),
    "map bert": (map_tuning, "entities", "bert", STILL, {}),
    "map decoder recomputed": (map_tuning, "entities", "seedling", STILL, {"gradient_checkpointing": True}),
    "languages": (ernie_code, "translations", "t5", {}, {}),
    "languages accumulated": (ernie_code, "translations", "t5", {"form": "concatenated"}, {"accumulate": 2}),
}


def given_for(name: str, data: Path) -> tuple[dict[str, Any], str]:
    """What the data of a case gives, and the base."""
    import json

    given = json.loads((data / f"{CASES[name][1]}.json").read_text())
    own = given.pop("base", None)
    base = CASES[name][2]
    return given, base if base == "seedling" else own or str(data / base)


def one(name: str, folder: Path, data: Path, strategy: str = "ddp") -> dict[str, Any]:
    """Train one case; the same rows a step whatever the processes."""
    module, _, _, knobs, train = CASES[name]
    given, base = given_for(name, data)
    technique = module.METHOD(build(module.Knobs, given | knobs))
    source = technique.source = Checkpoint(base)
    settings = Train(
        **{"batch": 4 // dist.world(), "lr": 0.05, "schedule": "constant", "warmup": 0.0, "context": 48, "optimizer": "sgd"}
        | {"record": False, "strategy": strategy, "eval_every": 50}
        | train
    )
    torch.manual_seed(3)
    model, tokenizer = source.model(torch.float32), source.tokenizer()
    for part in model.modules():
        for what in ("p", "dropout"):
            if isinstance(getattr(part, what, None), float):
                setattr(part, what, 0.0)
    objective = technique.objective(model, tokenizer, settings, 0)
    rows = technique.rows(technique.knobs.data, tokenizer, int(model.config.vocab_size), settings, 0)
    if objective is None:
        from modelwright.core.train.objective import objective_class

        objective = objective_class(model)(model, tokenizer)
    evals = {"rows": rows.split(8)[0]}
    done = fit(model, rows, settings, techniques=[technique], evals=evals, folder=folder, seed=0, objective=objective)
    weights = {} if done.model is None else {n: p.detach().float().cpu() for n, p in done.model.named_parameters()}
    return {"weights": weights, "evals": [e["loss"] for e in done.evals], "tokens": done.tokens, "liveness": done.liveness}


def main(folder: Path, data: Path, world: int) -> None:
    torch.set_num_threads(1)
    dist.start(world)
    for strategy in ("ddp", "fsdp2"):
        for name in CASES:
            made = one(name, folder / f"{strategy} {name}", data, strategy)
            if dist.rank() == 0:
                torch.save(made, folder / f"{strategy} {name}.pt")
    dist.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
