"""Does HyperMoE gain from knowing which experts a token did NOT choose, or from having an adapter at all?

A mixture of 12 layers (d=64, 8 experts of 64 neurons, top-2) learns the first half of the characters of Shakespeare and is frozen, so that
every arm has the same backbone and routers. Each arm adds its part at exactly zero and trains that alone on other text, with the same
steps, data order and seeds:
- HyperMoE (a=16, b=e=hidden=q=32, c=10); and "small start", its linear layers started as transformers does (standard deviation 0.02,
  whatever their width), which makes the codes of all sets nearly alike;
- constant code: the same hypernetwork, fed with the average set of experts in place of a token's own: one adapter per layer;
- shuffled codes: the same, each set of experts handed the code of another, drawn anew in every pass: no information, as much variety;
- adapter: an ordinary bottleneck beside the experts of every layer, of as many trained parameters;
- nothing: the frozen mixture. Each arm's learning rate is the best of its sweep on the first seed.

    python bench/hyper_claims.py [--base 450] [--steps 150]
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import Cache, save
from modelwright.core.model.anatomy import add_role
from modelwright.core.model.checkpoint import silence_transformers
from modelwright.core.train.technique import Technique
from modelwright.models.hyper_moe import HyperMoEConfig, HyperMoEForCausalLM
from modelwright.moe.hyper import SetCode
from modelwright.tune.balance import Balance
from modelwright.tune.balance import Knobs as BalanceKnobs
from routing_claims import SIZES, fresh, loss, rows, train

SEEDS, RATES = [0, 1, 2], [3e-4, 1e-3, 3e-3]
HYPER = {"adapter": 16, "bottleneck": 32, "expert_embedding": 32, "process": 32, "code": 32, "layer_embedding": 10, "init": "zero"}


class Constant(SetCode):
    def forward(self, chosen: Tensor) -> Tensor:
        share = 1 - chosen.shape[1] / len(self.embedding)
        return self.process(share * self.embedding.sum(0, keepdim=True)).expand(len(chosen), -1)


class Shuffled(SetCode):
    def forward(self, chosen: Tensor) -> Tensor:
        return super().forward(chosen)[torch.randperm(len(chosen))]


class Bottleneck(nn.Module):
    """U ReLU(D x + b_D) + b_U, the form of a generated adapter; zero at the start."""

    def __init__(self, d: int, width: int):
        super().__init__()
        self.down, self.up = nn.Linear(d, width), nn.Linear(width, d)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x).relu())


add_role(r"\.mlp\.beside\.(down|up)", "adapter")
CODES = {"HyperMoE": SetCode, "HyperMoE, small start": SetCode, "constant code": Constant, "shuffled codes": Shuffled}
WHOLE = "HyperMoE, all weights trained"
ARMS = ["nothing", *CODES, "adapter"]
HYPERMOE, CONTROLS = "HyperMoE", ["constant code", "shuffled codes", "adapter", "HyperMoE, small start", "nothing"]


def base(vocab: int, seed: int, steps: int) -> dict[str, Tensor]:
    """The weights that every arm starts from."""
    file = Path(os.environ.get("MODELWRIGHT_BENCH_CACHE", tempfile.gettempdir())) / f"modelwright-hyper_claims-{steps}-{seed}.pt"
    if not file.exists():
        model = train(fresh("SMoE", vocab, seed), rows()[0], steps, seed, [Balance(BalanceKnobs(kind="switch"))])
        torch.save(model.state_dict(), file)
    return torch.load(file, weights_only=True)


def conditioned(model: Any, code: type[SetCode]) -> None:
    for layer in model.model.layers:
        layer.mlp.code.__class__ = code  # the same weights, read in another way


def extended(arm: str, vocab: int, seed: int, weights: dict[str, Tensor]) -> tuple[Any, int]:
    """The arm's model and how many parameters it adds."""
    model = fresh("SMoE", vocab, seed)
    size = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    model.load_state_dict(weights)
    if arm == "nothing":
        return model, 0
    before = size(model)
    torch.manual_seed(seed)
    hyper = HyperMoEForCausalLM(HyperMoEConfig(vocab_size=vocab, **SIZES, **{f"hyper_{k}": v for k, v in HYPER.items()}))
    hyper.load_state_dict(weights, strict=False)
    added, d, layers = size(hyper) - before, SIZES["hidden_size"], SIZES["num_hidden_layers"]
    if arm in CODES or arm == WHOLE:
        conditioned(hyper, CODES.get(arm, SetCode))
        if "small" in arm:
            parts = [hyper.model.hyper.mix, *(m for layer in hyper.model.layers for m in layer.mlp.code.process)]
            for linear in (m for m in parts if isinstance(m, nn.Linear)):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        return hyper, added
    for layer in model.model.layers:
        layer.mlp.beside = Bottleneck(d, round((added / layers - d) / (2 * d + 1)))
        layer.mlp.register_forward_hook(lambda block, given, y: y + block.beside(given[0]))
    return model, size(model) - before


def one(arm: str, lr: float, seed: int, first: int, steps: int) -> dict[str, Any]:
    _, more, held, vocab = rows()
    model, added = extended(arm, vocab, seed, base(vocab, seed, first))
    if arm == "nothing":
        return {"added": 0, "loss": loss(model.eval(), held)}
    for name, p in model.named_parameters():
        p.requires_grad_(arm == WHOLE or any(part in name for part in (".code.", ".hyper.", ".beside.")))
    train(model, more, steps, seed, [Technique()], lr)
    found = {"added": added, "loss": loss(model, held)}
    if arm.startswith(HYPERMOE):  # does the trained model listen to its codes?
        conditioned(model, Shuffled)
        torch.manual_seed(seed)
        found["shuffled"] = loss(model, held)
    return found


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--base", type=int, default=450)
    arguments.add_argument("--steps", type=int, default=150)
    a = arguments.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    cache = Cache("hyper_claims")

    def of(arm: str, lr: float, seed: int) -> dict[str, Any]:
        return cache([arm, lr, seed, a.base, a.steps], lambda: one(arm, lr, seed, a.base, a.steps))

    rates = {arm: RATES if arm != "nothing" else [0.0] for arm in ARMS}
    best = {arm: min(rates[arm], key=lambda lr, arm=arm: of(arm, lr, 0)["loss"]) for arm in ARMS}
    each = {arm: [of(arm, best[arm], s) for s in SEEDS] for arm in ARMS}
    table, against = [], {}
    for arm in ARMS:
        losses = [e["loss"] for e in each[arm]]
        against[arm] = [e["loss"] - h for h, e in zip(losses, each[HYPERMOE], strict=True)]
        rise = deaf(each[arm]) if arm.startswith(HYPERMOE) else ""
        gap = "" if arm == HYPERMOE else show(against[arm])
        sweep = ", ".join(f"{of(arm, lr, 0)['loss']:.4f}" for lr in rates[arm])
        seeds = ", ".join(f"{v:.4f}" for v in losses)
        rate = f"{best[arm]:g}" if best[arm] else ""
        table.append([arm, f"{each[arm][0]['added']:,}", sweep, rate, seeds, f"{statistics.mean(losses):.4f}", gap, rise])
    whole = deaf([of(WHOLE, 2e-3, s) for s in SEEDS])
    words = "; ".join(
        f"{c}: {show(against[c]).partition(' (')[0]}, HyperMoE lower on {sum(g < 0 for g in against[c])} of {len(SEEDS)}" for c in CONTROLS
    )
    ends = [arm for arm in ARMS if len(rates[arm]) > 1 and best[arm] in (RATES[0], RATES[-1])]
    save(
        "hyper_claims",
        claim="HyperMoE has a lower loss than the same mixture without it, and than the same parameters that are not told which experts a "
        "token did not choose (2402.12656).",
        outcome=f"Held-out loss of HyperMoE minus each control's, paired by seed, mean ± standard deviation. {words}.",
        columns=["arm", "parameters added", f"sweep on seed 0: lr {', '.join(f'{r:g}' for r in RATES)}", "best lr"]
        + ["held-out loss by seed", "mean", "HyperMoE minus this arm (by seed)", "rise when its codes are shuffled"],
        rows=table,
        seeds=SEEDS,
        notes=[
            f"{a.base} steps of 8 x 64 characters for the mixture, {a.steps} for what is added; 256 held-out rows.",
            "Equal in parameters, not in arithmetic: a generated adapter has 16 neurons, the ordinary one as many as the parameters buy.",
            f"With all weights trained at the mixture's own rate, 2e-3, shuffling the codes raises HyperMoE's loss by {whole}.",
            f"Best rate at an end of the sweep, so that a wider one could lower it: {', '.join(ends) or 'no arm'}.",
        ],
        command=f"python bench/hyper_claims.py --base {a.base} --steps {a.steps}",
    )


def deaf(found: list[dict[str, Any]]) -> str:
    return show([e["shuffled"] - e["loss"] for e in found])


def show(values: list[float]) -> str:
    return f"{statistics.mean(values):+.4f} ± {statistics.stdev(values):.4f} ({', '.join(f'{v:+.4f}' for v in values)})"


if __name__ == "__main__":
    main()
