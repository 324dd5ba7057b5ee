"""Prompt Bias Calibration on made pairs: four formats, every pair within one format, quality known.

A text is a format token, a topic, an end of the prompt and twelve words of the format's own vocabulary. Each word has a value, centred
within its format, and the quality of an answer is the sum of its words' values: no format is better than another. The chosen answer is
drawn by Bradley-Terry from the qualities. A small Llama is trained from random weights, with and without PBC.
Measured on new pairs: how far the mean rewards of the formats lie apart over the spread within a pair, and the accuracy of the pairs.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from common import Cache, save
from modelwright.core.data.rows import TokenRows
from modelwright.core.knobs import Train
from modelwright.core.model.checkpoint import silence_transformers
from modelwright.core.train.loop import fit
from modelwright.reward.train import Knobs, TrainReward

FORMATS, WORDS, LENGTH = 4, 10, 12
ETAS = (0.0, 0.01, 0.05, 0.1)


class Pairs(TokenRows):
    """Made pairs; `formats` and `better` (whether the first answer is truly better) are known."""

    facts: dict[str, Any] = {}
    stops: list[int] = []
    bytes, width, packed = 0, LENGTH + 3, False

    def __init__(self, n: int, values: torch.Tensor, seed: int):
        g = torch.Generator().manual_seed(seed)
        self.formats = torch.randint(0, FORMATS, (n,), generator=g)
        words = torch.randint(0, WORDS, (2, n, LENGTH), generator=g)
        quality = values[self.formats[None, :, None], words].sum(2)  # (2, n)
        first = torch.rand(n, generator=g) < torch.sigmoid(quality[0] - quality[1])
        topic = torch.randint(0, 8, (n,), generator=g)
        prompt = torch.stack([2 + self.formats, 6 + topic, torch.ones_like(topic)], 1)
        texts = torch.cat([prompt.expand(2, -1, -1), 14 + self.formats[None, :, None] * WORDS + words], 2)
        order = torch.stack([torch.where(first, 0, 1), torch.where(first, 1, 0)])
        self.texts = texts[order, torch.arange(n)]

    def __len__(self) -> int:
        return self.texts.shape[1]

    def __getitem__(self, i: int) -> dict[str, Any]:
        n = torch.tensor(self.width)
        return {
            "chosen": self.texts[0, i],
            "rejected": self.texts[1, i],
            "chosen_from": 3,
            "rejected_from": 3,
            "length": n,
            "example_id": i,
        }

    def split(self, at: int) -> Any:
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        return self.texts.numel()


class Fresh:
    """A small Llama of random weights, in place of a checkpoint."""

    def __init__(self, seed: int):
        self.seed = seed

    def model(self, dtype: Any = None) -> Any:
        torch.manual_seed(self.seed)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(vocab_size=14 + FORMATS * WORDS, max_position_embeddings=32, **sizes)
        config.pad_token_id = 0
        return transformers.LlamaForCausalLM(config)


@torch.no_grad()
def measure(model: Any, pairs: Pairs) -> dict[str, float]:
    """Ratio of the spread between formats and within a pair, raw and debiased; accuracy in percent."""
    ids = pairs.texts.flatten(0, 1)
    out = model.eval()(ids, torch.ones_like(ids), torch.full((len(ids),), 3))
    found = {}
    for name, rewards in (("raw", out.rewards), ("debiased", out.logits[:, 0])):
        chosen, rejected = rewards.chunk(2)
        means = torch.stack([torch.cat([chosen[pairs.formats == k], rejected[pairs.formats == k]]).mean() for k in range(FORMATS)])
        found[name] = float(means.std(correction=0) / ((chosen - rejected).abs() / 2).mean())
        found["accuracy"] = 100 * float((chosen > rejected).float().mean())
    return found


def once(eta: float, seed: int, pairs: int, epochs: float, lr: float) -> dict[str, float]:
    g = torch.Generator().manual_seed(100 + seed)
    values = torch.randn(FORMATS, WORDS, generator=g) * 0.8
    values -= values.mean(1, keepdim=True)
    technique = TrainReward(Knobs(debias="pbc" if eta else "none", eta_c=eta))
    model = technique.load(Fresh(seed), None)
    train = Train(epochs=epochs, batch=32, lr=lr, context=32, record=False, save_every=10**6)
    with tempfile.TemporaryDirectory() as tmp:
        fit(model, Pairs(pairs, values, 2 * seed), train, techniques=[technique], evals={}, folder=Path(tmp), seed=seed)
    return measure(model, Pairs(2000, values, 2 * seed + 1))


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--pairs", type=int, default=1500)
    args.add_argument("--epochs", type=float, default=3)
    args.add_argument("--lr", type=float, default=2e-3)
    args.add_argument("--seeds", type=int, default=3)
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    cache = Cache("pbc")
    found = {
        eta: [cache([eta, s, a.pairs, a.epochs, a.lr], lambda eta=eta, s=s: once(eta, s, a.pairs, a.epochs, a.lr)) for s in range(a.seeds)]
        for eta in ETAS
    }
    mean = {eta: {k: statistics.mean(r[k] for r in runs) for k in runs[0]} for eta, runs in found.items()}
    ratio, lost = mean[0.05]["debiased"] / mean[0.0]["raw"], mean[0.0]["accuracy"] - mean[0.05]["accuracy"]
    holds = ratio < 0.4 and lost < 1
    save(
        "pbc",
        claim="PBC brings the mean rewards of formats together: below 0.4 of the plain model's spread, at less than one point of accuracy",
        outcome=f"With eta_c 0.05 the spread is {ratio:.2f} of the plain model's and the accuracy {lost:+.2f} points lower: "
        f"the claim {'holds' if holds else 'does not hold'} here.",
        columns=["eta_c", "between formats / within a pair, r", "the same, r - C", "pair accuracy, %", "r - C by seed"],
        rows=[
            [
                f"{eta:g}",
                f"{mean[eta]['raw']:.3f}",
                f"{mean[eta]['debiased']:.3f}",
                f"{mean[eta]['accuracy']:.1f}",
                ", ".join(f"{r['debiased']:.3f}" for r in runs),
            ]
            for eta, runs in found.items()
        ],
        seeds=list(range(a.seeds)),
        notes=[f"{a.pairs} pairs, {a.epochs:g} passes, 2,000 new pairs; formats differ in their words alone and are equally good"],
    )


if __name__ == "__main__":
    main()
