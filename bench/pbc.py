"""Prompt Bias Calibration on made pairs: four formats, every pair within one format, quality known.

A text is a format token, a topic, an end of the prompt and twelve words. Each word has a value, and the quality of an answer is the sum of
its words' values less the mean of its format: no format is better than another. The chosen answer is drawn by Bradley-Terry from the
qualities. A small Llama is trained from random weights, with and without PBC. Two kinds of formats:
- shared: all use the same words, with different frequencies, so that a format has more of what pairs are won by;
- own: each has words of its own, and nothing ties the level of one to that of another.
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
KINDS = ("shared", "own")
ETAS = (0.0, 0.01, 0.05, 0.1)


class Pairs(TokenRows):
    """Made pairs; `formats` and `better` (whether the first answer is truly better) are known."""

    facts: dict[str, Any] = {}
    stops: list[int] = []
    bytes, width, packed = 0, LENGTH + 3, False

    def __init__(self, n: int, values: torch.Tensor, seed: int, kind: str):
        g = torch.Generator().manual_seed(seed)
        self.formats = torch.randint(0, FORMATS, (n,), generator=g)
        tilt = torch.linspace(-0.6, 0.6, FORMATS)[:, None] if kind == "shared" else torch.zeros(FORMATS, 1)
        odds = (tilt * values).softmax(1)  # (formats, words)
        words = torch.multinomial(odds[self.formats].repeat(2, 1), LENGTH, replacement=True, generator=g).view(2, n, LENGTH)
        quality = values[self.formats[None, :, None], words].sum(2)  # (2, n), up to a constant of the format
        first = torch.rand(n, generator=g) < torch.sigmoid(quality[0] - quality[1])
        topic = torch.randint(0, 8, (n,), generator=g)
        prompt = torch.stack([2 + self.formats, 6 + topic, torch.ones_like(topic)], 1)
        first_word = 14 + (0 if kind == "shared" else self.formats[None, :, None] * WORDS)
        texts = torch.cat([prompt.expand(2, -1, -1), first_word + words], 2)
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


def once(kind: str, eta: float, seed: int, pairs: int, epochs: float, lr: float) -> dict[str, float]:
    g = torch.Generator().manual_seed(100 + seed)
    values = torch.randn(1 if kind == "shared" else FORMATS, WORDS, generator=g).expand(FORMATS, -1) * 0.8
    values = values - values.mean(1, keepdim=True)
    technique = TrainReward(Knobs(debias="pbc" if eta else "none", eta_c=eta))
    model = technique.load(Fresh(seed), None)
    train = Train(epochs=epochs, batch=32, lr=lr, context=32, record=False, save_every=10**6)
    with tempfile.TemporaryDirectory() as tmp:
        fit(model, Pairs(pairs, values, 2 * seed, kind), train, techniques=[technique], evals={}, folder=Path(tmp), seed=seed)
    return measure(model, Pairs(2000, values, 2 * seed + 1, kind))


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
    settings = [a.pairs, a.epochs, a.lr]
    found = {
        (kind, eta): [cache([kind, eta, s, *settings], lambda k=kind, e=eta, s=s: once(k, e, s, *settings)) for s in range(a.seeds)]
        for kind in KINDS
        for eta in ETAS
    }
    mean = {key: {k: statistics.mean(r[k] for r in runs) for k in runs[0]} for key, runs in found.items()}
    ratio = {k: mean[k, 0.05]["debiased"] / mean[k, 0.0]["raw"] for k in KINDS}
    lost = {k: mean[k, 0.0]["accuracy"] - mean[k, 0.05]["accuracy"] for k in KINDS}
    holds = {k: ratio[k] < 0.4 and lost[k] < 1 for k in ratio}
    said = {k: f"{ratio[k]:.2f} of the plain model's spread, accuracy {lost[k]:+.2f} points lower" for k in ratio}
    save(
        "pbc",
        claim="PBC brings the mean rewards of formats together: below 0.4 of the plain model's spread, at less than one point of accuracy",
        outcome=f"Formats with words of their own: {said['own']}: the claim {'holds' if holds['own'] else 'does not hold'} there. "
        f"Formats that share words: {said['shared']}: the claim {'holds' if holds['shared'] else 'does not hold'} there.",
        columns=["formats' words", "eta_c", "between formats / within a pair, r", "the same, r - C", "pair accuracy, %", "r - C by seed"],
        rows=[
            [
                kind,
                f"{eta:g}",
                f"{mean[kind, eta]['raw']:.3f}",
                f"{mean[kind, eta]['debiased']:.3f}",
                f"{mean[kind, eta]['accuracy']:.1f}",
                ", ".join(f"{r['debiased']:.3f}" for r in runs),
            ]
            for (kind, eta), runs in found.items()
        ],
        seeds=list(range(a.seeds)),
        notes=[f"{a.pairs} pairs, {a.epochs:g} passes, 2,000 new pairs; eta_c 0 is the plain model, whose r - C is r"],
    )


if __name__ == "__main__":
    main()
