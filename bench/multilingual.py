"""The multilingual report's claims on small models of English and German, trained on Multi30k (2404.00929).

A Llama of two blocks over a shared BPE of 800 tokens is trained on as many rows of two sentences in each arm. In a share of the rows they
are translations of each other, in either order; in the others both are of one language. Measured on 200 sentences of the test set that no
model has seen: translations found first (P@1) in the best block, with and without each language's mean, the language probe before and
after INLP and LEACE in the last block, and the loss of the model with these changes in place.
"""

import argparse
import gzip
import random
import statistics
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common import SHARED, Cache, save, spread
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.inspect.languages.shared import Halves, by_layer, debiased
from modelwright.inspect.languages.vectors import Reader

SHARES = (0.0, 0.5, 1.0)
LANGUAGES = ("en", "de")


def sentences(split: str, n: int) -> dict[str, list[str]]:
    found = {}
    for language in LANGUAGES:
        with gzip.open(SHARED / "multi30k" / f"{split}.{language}.gz", "rt") as file:
            found[language] = [text.strip() for text, _ in zip(file, range(n), strict=False)]
    return found


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer, whole.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    whole.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=800, special_tokens=["<s>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="<s>")


def rows_of(texts: dict[str, list[str]], share: float, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> torch.Tensor:
    """(N, 64) token ids: pairs of sentences, <s> before each."""
    pairs, n = [], len(texts["en"])
    for i in range(n):
        first, second = rng.sample(LANGUAGES, 2)
        if rng.random() < share:
            pairs.append((texts[first][i], texts[second][i]))
        else:
            pairs += [(texts[k][i], texts[k][rng.randrange(n)]) for k in rng.sample(LANGUAGES, 1)]
    ids = [tokenizer(f"<s>{a}<s>{b}")["input_ids"][:64] for a, b in pairs]
    return torch.tensor([row + [0] * (64 - len(row)) for row in ids])


def train(model: LlamaForCausalLM, rows: torch.Tensor, steps: int, rng: random.Random) -> None:
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        batch = rows[[rng.randrange(len(rows)) for _ in range(24)]]
        labels = batch.clone()
        labels[:, 1:][batch[:, 1:] == 0] = -100  # a few separators are not learnt either
        model(input_ids=batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()


def once(share: float, seed: int, steps: int) -> dict[str, float]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    texts = sentences("train", 4000)
    tokenizer = tokenizer_of(texts["en"] + texts["de"])
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, bos_token_id=0, eos_token_id=0, **sizes))
    train(model, rows_of(texts, share, tokenizer, rng), steps, rng)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        reader = Reader(Checkpoint(Path(folder)))
        held = sentences("test_2016_flickr", 200)
        vectors = {k: reader.pooled(of) for k, of in held.items()}
        halves = Halves.of(200, seed)
        layers = by_layer(vectors, "en", halves)[1:]
        without = debiased(vectors, "en", 2, halves, reader, held["en"])
    plain = max(at["precision_at_1_half"]["de"] for at in layers)
    return {
        "p1": 100 * plain,
        "p1 centred": 100 * max(at["precision_at_1_centred_half"]["de"] for at in layers),
        "probe": 100 * without["as it is"]["language_probe"],
        "probe INLP": 100 * without["INLP"]["language_probe"],
        "probe LEACE": 100 * without["LEACE"]["language_probe"],
        "loss": without["as it is"]["loss"],
        "loss INLP": without["INLP"]["loss"],
        "loss LEACE": without["LEACE"]["loss"],
    }


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--steps", type=int, default=250)
    args.add_argument("--seeds", type=int, default=3)
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    cache = Cache("multilingual")
    found = {
        share: [cache([share, s, a.steps], lambda share=share, s=s: once(share, s, a.steps)) for s in range(a.seeds)] for share in SHARES
    }

    def of(share: float, name: str) -> float:
        return statistics.median(v[name] for v in found[share])

    rises = of(0.0, "p1") < of(0.5, "p1") < of(1.0, "p1")
    runs = [v for of_share in found.values() for v in of_share]
    centring = sum(v["p1 centred"] > v["p1"] for v in runs)
    probes = [statistics.median(v[name] for v in runs) for name in ("probe", "probe INLP", "probe LEACE")]
    costs = [statistics.median(v[f"loss {way}"] - v["loss"] for v in runs) for way in ("INLP", "LEACE")]
    save(
        "multilingual",
        claim="Alignment rises with the share of parallel rows, and with centring; INLP brings the probe to chance, at a cost (2404.00929)",
        outcome=(
            f"P@1 of 100 sentences at shares 0, 0.5, 1: {of(0.0, 'p1'):.1f}, {of(0.5, 'p1'):.1f}, {of(1.0, 'p1'):.1f} %: it "
            f"{'rises' if rises else 'does not rise'}. Centring is better in {centring} of {len(runs)} runs. The probe for the language "
            f"goes from {probes[0]:.1f} to {probes[1]:.1f} % with INLP and {probes[2]:.1f} % with LEACE (chance 50); the loss rises by "
            f"{costs[0]:.3f} and {costs[1]:.3f} nats per token."
        ),
        columns=["share of parallel rows", *found[0.0][0]],
        rows=[[f"{share:g}", *(spread([v[name] for v in values]) for name in values[0])] for share, values in found.items()],
        seeds=list(range(a.seeds)),
        notes=[f"4,000 rows, {a.steps} steps of 24 rows; P@1 in the best block on 100 sentences, chance 1 %; losses of English"],
    )


if __name__ == "__main__":
    main()
