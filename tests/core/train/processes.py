"""Training runs for test_processes.py, by one process or under torchrun: python processes.py FOLDER PROCESSES."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from families import model_of, sigmoid_moe
from modelwright.core.data.packing import Texts, packed
from modelwright.core.data.rows import Rows
from modelwright.core.knobs import Train
from modelwright.core.train import dist
from modelwright.core.train.loop import fit
from modelwright.core.train.technique import Technique
from modelwright.tune import balance, gw_moe, hft, key_value, lora, lora_moe, migu, rectify


def chats() -> Rows:
    """Packed rows of texts with uneven lengths and weights."""
    g = torch.Generator().manual_seed(5)
    texts = Texts()
    for i in range(40):
        n = int(torch.randint(3, 15, (), generator=g))
        texts.ids.append(torch.randint(3, 96, (n,), generator=g).tolist())
        texts.weights.append([0.0, *([1.0, 0.1][i % 2] * float(x > 0.3) for x in torch.rand(n - 1, generator=g)), 0.5][:n])
    return packed(texts, 16, 8, seed=0)


def ragged() -> Rows:
    g = torch.Generator().manual_seed(6)
    ids = torch.randint(3, 96, (29, 16), generator=g, dtype=torch.int32)
    lengths = torch.randint(3, 17, (29,), generator=g)
    real = torch.arange(16) < lengths[:, None]
    return Rows(torch.where(real, ids, 0), torch.where(real, ids, -100), lengths)


def _migu(**k: Any) -> Callable[[], list[Technique]]:
    return lambda: [migu.Migu(migu.Knobs(leak_every=2, **k))]


def _rectify() -> list[Technique]:
    return [rectify.Rectify(rectify.Knobs(factor=0.6, ranks=2))]  # simulated in one process, two processes else


CASES: dict[str, tuple[str, Callable[[], list[Technique]], Callable[[], Rows], dict[str, Any]]] = {
    "full": ("llama", lambda: [Technique()], ragged, {}),
    "scheduled": ("llama", lambda: [Technique()], ragged, {"schedule": "linear", "warmup": 0.3}),
    "full accumulated": ("llama", lambda: [Technique()], ragged, {"accumulate": 2}),
    "full recomputed": ("llama", lambda: [Technique()], ragged, {"gradient_checkpointing": True}),
    "weighted packed": ("llama", lambda: [Technique()], chats, {}),
    "hft": ("llama", lambda: [hft.Hft(hft.Knobs())], ragged, {"weight_decay": 0.1}),
    "hft fused": ("phi3", lambda: [hft.Hft(hft.Knobs(round=1))], ragged, {"weight_decay": 0.1}),
    "hft experts": ("mixtral", lambda: [hft.Hft(hft.Knobs(round=2))], ragged, {"weight_decay": 0.1}),
    "values": ("llama", lambda: [key_value.KeyValue(key_value.Knobs(part="values"))], ragged, {}),
    "migu": ("llama", _migu(), ragged, {}),
    "migu accumulated recomputed": ("llama", _migu(guard="update"), ragged, {"accumulate": 2, "gradient_checkpointing": True}),
    "migu random": ("llama", _migu(rows="random", guard="update"), ragged, {}),
    "migu conv1d": ("gpt2", _migu(guard="update"), ragged, {}),
    "lora": ("llama", lambda: [lora.Lora(lora.Knobs(r=2))], ragged, {}),
    "lora migu": ("llama", lambda: [lora.Lora(lora.Knobs(r=2)), *_migu(guard="update")()], ragged, {}),
    "rectify": ("mixtral", _rectify, ragged, {}),
    "rectify accumulated recomputed": ("qwen3_moe", _rectify, ragged, {"accumulate": 2, "gradient_checkpointing": True}),
    "rectify packed": ("granitemoe", _rectify, chats, {}),
    "balance global": ("mixtral", lambda: [balance.Balance(balance.Knobs())], ragged, {"lr": 3e-5}),
    "balance bias": ("glm4_moe", lambda: [balance.Balance(balance.Knobs(kind="bias"))], ragged, {}),
    "gw_moe": ("qwen3_moe", lambda: [gw_moe.GwMoe(gw_moe.Knobs(threshold=0.9, unit="normalised"))], ragged, {}),
    "lora_moe": ("llama", lambda: [lora_moe.LoraMoe(lora_moe.Knobs(experts=2, r=2, dropout=0.0, beta=0.0))], ragged, {}),
    "all together": ("llama", lambda: [hft.Hft(hft.Knobs()), *_migu(guard="update")()], chats, {}),
}


REFUSED = {("fsdp2", "lora_moe")}


def _model(family: str) -> Any:
    model = sigmoid_moe() if family == "glm4_moe" else model_of(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # each process draws its own
            module.p = 0.0
    return model


def one(name: str, folder: Path, stop: int | None = None, **changes: Any) -> dict[str, Any] | None:
    """Train one case; what to compare, on the first process. With `stop` the run is broken off there and taken up again."""
    family, make, data, train = CASES[name]
    knobs = Train(**{"batch": 8 // dist.world(), "lr": 1e-4, "schedule": "constant", "warmup": 0.0, "epochs": 2.0, "save_every": 1} | train)
    knobs = Train(**vars(knobs) | changes)

    def tick(step: int, of: int) -> None:
        if step == stop:
            raise KeyboardInterrupt

    arguments = {"evals": {"new": ragged()}, "folder": folder, "seed": 3}
    techniques = make()
    try:
        out = fit(_model(family), data(), knobs, techniques=techniques, tick=tick, **arguments)
    except KeyboardInterrupt:
        stop, techniques = None, make()
        out = fit(_model(family), data(), knobs, techniques=techniques, **arguments)
    if dist.rank():
        return None
    model = out.model.eval()
    with torch.no_grad():
        model(torch.arange(3, 9)[None])  # the first process goes on alone and must wait for nobody
    for t in techniques:
        model = t.export(model, folder)
    return {
        "weights": {n: p.clone() for n, p in model.state_dict().items()},
        "masks": {n: m for t in techniques if hasattr(t, "masks") for n, m in t.masks.items()},
        "frozen": {n: m for t in techniques if hasattr(t, "frozen") for n, m in t.frozen.items()},
        "evals": [e["loss"] for e in out.evals],
        "liveness": out.liveness,
        "facts": out.facts,
        "tokens": out.tokens,
        "steps": out.steps,
    }


def main(folder: Path, processes: int) -> None:
    torch.set_num_threads(1)
    dist.start(processes)
    for strategy in ("ddp", "fsdp2"):
        for name in [n for n in CASES if (strategy, n) not in REFUSED]:
            found = one(name, folder / f"{strategy} {name}", strategy=strategy)
            if found:
                torch.save(found, folder / f"{strategy} {name}.pt")
        for name in ("migu", "hft fused", "scheduled", "balance bias"):
            found = one(name, folder / f"{strategy} {name} resumed", stop=3, strategy=strategy)
            if found:
                torch.save(found, folder / f"{strategy} {name} resumed.pt")
    dist.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
