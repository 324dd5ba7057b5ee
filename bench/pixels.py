"""SST-2 read as pixels and tokens by one small Llama each: pre-training against none, and noisy letters.

Two blocks of width 96; 800 sentences to pre-train on (one pass), 800 to sort (four passes), 300 to measure on. All have the same number
of steps and rows a step. So small a model sorts little above chance: differences within the spread of the seeds mean nothing.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from common import SHARED, Cache, Clock, save, spread
from modelwright.core.knobs import Train
from modelwright.core.model.checkpoint import SEEDLING, Checkpoint
from modelwright.core.train.evaluate import evaluate_rows
from modelwright.core.train.loop import fit
from modelwright.core.train.technique import Technique
from modelwright.modalities.rendering.rows import PixelObjective, PixelRows, TokenTerm
from modelwright.modalities.rendering.text import Renderer
from modelwright.models.pixels import PixelLlamaForCausalLM

SEEDS, P, N, MOST = [0, 1, 2], 8, 800, 32
ALIKE = dict(zip("aeocpxy", "аеосрху", strict=True))  # Cyrillic letters of the same look
RENDER = Renderer(size=7, patch=P)
TOKENIZER = Checkpoint(SEEDLING).tokenizer()


def sentences(name: str, n: int) -> tuple[list[str], list[int]]:
    lines = [line.rsplit("\t", 1) for line in (SHARED / "text_sst2" / f"{name}.tsv").read_text().splitlines()]
    return [a for a, _ in lines[:n]], [int(b) for _, b in lines[:n]]


def typos(text: str, rng: np.random.Generator) -> str:
    """Two neighbouring letters swapped in half of the longer words."""
    out = []
    for w in text.split():
        if len(w) > 3 and rng.random() < 0.5:
            i = int(rng.integers(0, len(w) - 1))
            w = w[:i] + w[i + 1] + w[i] + w[i + 2 :]
        out.append(w)
    return " ".join(out)


def rows(texts: list[str], labels: list[int], see: str) -> PixelRows:
    none = torch.zeros(0, 3 * P * P, dtype=torch.uint8), torch.zeros(0, dtype=torch.int32)
    seen = [torch.from_numpy(RENDER(t, most=MOST)[0]) if see in ("pixel", "pair") else none[0] for t in texts]
    said = [torch.tensor(TOKENIZER(t)["input_ids"][: 2 * MOST], dtype=torch.int32) if see != "pixel" else none[1] for t in texts]
    return PixelRows(seen, said, labels, {})


class Apart(Technique):
    """Both losses of a pair count alike."""

    name = "pair"

    def terms(self):
        return [TokenTerm()]


def train(model, data: PixelRows, epochs: int, seed: int, classify: bool, pair: bool):
    apart = pair and not classify
    objective = PixelObjective(model, None, seed, "mended", classify, apart)
    settings = Train(batch=32, epochs=epochs, lr=2e-3, schedule="cosine", record=False)
    with tempfile.TemporaryDirectory() as folder:
        techniques = [Apart() if apart else Technique()]
        return fit(model, data, settings, techniques=techniques, evals={}, folder=Path(folder), seed=seed, objective=objective).model


def arm(see: str, pretrained: bool, seed: int) -> dict:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), max_position_embeddings=512, tie_word_embeddings=True, **sizes))
    model = PixelLlamaForCausalLM.from_llama(llama, patch_size=P)
    texts, labels = sentences("train", 2 * N)
    pair = see == "pair"
    with Clock() as clock:
        if pretrained:
            model = train(model, rows(texts[:N], labels[:N], see), 1, seed, False, pair)
        model = PixelLlamaForCausalLM.from_llama(model, num_classes=2)
        model = train(model, rows(texts[N:], labels[N:], see), 4, seed, True, pair)
    clean, truth = sentences("dev", 300)
    rng = np.random.default_rng(0)
    sets = {"clean": clean, "typos": [typos(t, rng) for t in clean], "look-alikes": ["".join(ALIKE.get(c, c) for c in t) for t in clean]}
    objective = PixelObjective(model, None, seed, "mended", True)
    return {n: 100 * evaluate_rows(model, rows(t, truth, see), 50, objective)["accuracy"] for n, t in sets.items()} | {"cpu": clock.cpu}


ARMS = {
    "pixels, pre-trained": ("pixel", True),
    "pixels, not pre-trained": ("pixel", False),
    "pixels and tokens, pre-trained": ("pair", True),
    "tokens, pre-trained": ("text", True),
}


def main() -> None:
    cache = Cache("pixels")
    found = {n: [cache([n, s], lambda a=a, s=s: arm(*a, s)) for s in SEEDS] for n, a in ARMS.items()}
    kinds = ("clean", "typos", "look-alikes")
    truth = sentences("dev", 300)[1]
    most = 100 * max(np.mean(truth), 1 - np.mean(truth))

    def mean(name: str, kind: str) -> float:
        return float(np.mean([f[kind] for f in found[name]]))

    drops = {n: {k: mean(n, "clean") - mean(n, k) for k in kinds[1:]} for n in found}
    save(
        "pixels",
        claim="pixel pre-training helps, tokens beside pixels help, and noisy letters hurt pixels less than tokens",
        outcome="accuracy "
        + "; ".join(f"{n} {mean(n, 'clean'):.1f}" for n in found)
        + f" (always the same answer: {most:.1f}). Lost to look-alike letters: "
        + "; ".join(f"{n} {d['look-alikes']:.1f}" for n, d in drops.items()),
        columns=["model", *[f"accuracy, {k}, %" for k in kinds], "CPU s"],
        rows=[[n, *(spread([f[k] for f in v]) for k in kinds), spread([f["cpu"] for f in v])] for n, v in found.items()],
        seeds=SEEDS,
        notes=[
            __doc__.strip().splitlines()[-1],
            "median (min to max) over seeds; look-alikes: seven Latin letters replaced by Cyrillic ones",
        ],
    )


if __name__ == "__main__":
    main()
