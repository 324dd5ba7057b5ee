"""Does a map from entity vectors help a frozen model to find hidden mentions again, and does it still help once the model was tuned?"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import modelwright
from common import SHARED, Cache, save
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.core.train.evaluate import evaluate_rows
from modelwright.tune.entities.mentions import Sentence, mention_rows
from modelwright.tune.entities.plug import EntityMap, Plug
from modelwright.tune.entities.vectors import read_vectors
from modelwright.tune.map_tuning import HiddenMentions

ARMS = {"no dropout": 0.0, "dropout 0.25": 0.25, "vectors of other entities": 0.0}
WIDTH = 32


def fewrel() -> list[dict[str, Any]]:
    """All sentences with their relation, in a fixed order."""
    held = json.loads((SHARED / "fewrel" / "val_wiki.json").read_text())
    rows = [{**r, "relation": name} for name, sentences in held.items() for r in sentences]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def transe(rows: list[dict[str, Any]], file: Path, epochs: int = 60, margin: float = 1.0) -> None:
    """TransE (Bordes et al., 2013): h + r is near t and far from another entity; entities have length 1."""
    torch.manual_seed(0)
    entities = sorted({r[k][1] for r in rows for k in "ht"})
    relations, at = sorted({r["relation"] for r in rows}), {e: i for i, e in enumerate(entities)}
    triples = torch.tensor([[at[r["h"][1]], relations.index(r["relation"]), at[r["t"][1]]] for r in rows])
    e, rel = (torch.nn.Parameter(F.normalize(torch.randn(n, WIDTH))) for n in (len(entities), len(relations)))
    optimizer = torch.optim.Adam([e, rel], lr=0.02)
    for _ in range(epochs):
        for h, r, t in (b.unbind(1) for b in triples[torch.randperm(len(triples))].split(2048)):
            other = torch.randint(len(entities), (len(h), 2))
            near = (e[h] + rel[r] - e[t]).norm(dim=1)
            far = [(e[h] + rel[r] - e[other[:, 0]]).norm(dim=1), (e[other[:, 1]] + rel[r] - e[t]).norm(dim=1)]
            optimizer.zero_grad()
            sum(F.relu(margin + near - f).mean() for f in far).backward()  # type: ignore[union-attr]
            optimizer.step()
            with torch.no_grad():
                e.copy_(F.normalize(e))
    np.savez(file, ids=np.array(entities), vectors=e.detach().numpy())


def bert(folder: Path, texts: list[str]) -> None:
    """An untrained BERT with WordPiece of these texts."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=2000, special_tokens=list(special.values()), show_progress=False))
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    BertForMaskedLM(BertConfig(vocab_size=2000, pad_token_id=0, **size)).save_pretrained(folder)


def lines(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


def sentences(rows: list[dict[str, Any]]) -> list[Sentence]:
    from modelwright.core.knobs import Data
    from modelwright.tune.entities.mentions import read_sentences

    with tempfile.TemporaryDirectory() as tmp:
        return read_sentences(Data(path=lines(Path(tmp) / "s.jsonl", rows)))


def loss(base: Path, test: list[Sentence], vectors: Path, the_map: Path | None) -> float:
    """Nats per hidden piece, with a map or without vectors and marks."""
    source = Checkpoint(base)
    model, tokenizer, table = source.model(torch.float32), source.tokenizer(), read_vectors(str(vectors))
    places = {name: len(tokenizer) + i for name, i in table.places.items()}
    rows = mention_rows(test, tokenizer, places, 96, masked=True, plain=the_map is None)
    if the_map is not None:
        one = EntityMap(table, model.get_input_embeddings().weight.shape[1], len(tokenizer))
        one.load(str(the_map))
        Plug(model, one)
    objective = HiddenMentions(model, tokenizer)
    objective.install(model)
    return float(evaluate_rows(model, rows, 64, objective)["loss"])


def tune(method: str, base: Path, to: Path, seed: int, **knobs: Any) -> Path:
    train = {"record": False, "eval_every": 10**6, "context": 96, "warmup": 0.0, **knobs.pop("train")}
    modelwright.run(method, base=base, to=to, seed=seed, train=train, save={"certificate": "structure"}, **knobs)
    return to


def once(seed: int, folder: Path, rows: list[dict[str, Any]], a: argparse.Namespace) -> dict[str, float]:
    """Losses of the frozen and of a tuned model without a map and with each."""
    base, vectors = folder / "base", folder / "transe.npz"
    tuned = tune(
        "tune.full",
        base,
        folder / f"tuned{seed}",
        seed,
        data=lines(folder / "later.jsonl", [{"text": " ".join(r["tokens"])} for r in rows[3 * a.n : 4 * a.n]]),
        train={"epochs": 2, "batch": 32, "lr": 2e-3},
    )
    test = sentences(rows[5 * a.n : 5 * a.n + a.n // 4])
    found = {"frozen, no map": loss(base, test, vectors, None), "tuned, no map": loss(tuned, test, vectors, None)}
    held = np.load(vectors)
    other = folder / f"other{seed}.npz"
    np.savez(other, ids=held["ids"], vectors=held["vectors"][np.random.default_rng(seed).permutation(len(held["ids"]))])
    for arm, dropout in ARMS.items():
        table = other if "other" in arm else vectors
        train = {"epochs": a.epochs, "batch": 64, "lr": a.lr}
        data = lines(folder / "linked.jsonl", rows[4 * a.n : 5 * a.n])
        the_map = tune(
            "tune.map_tuning", base, folder / f"{arm}{seed}", seed, data=data, vectors=str(table), dropout=dropout, holdout=0, train=train
        )
        for name, model in (("frozen", base), ("tuned", tuned)):
            found[f"{name}, {arm}"] = loss(model, test, table, the_map)
    return found


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--n", type=int, default=2000)
    args.add_argument("--epochs", type=float, default=1)
    args.add_argument("--lr", type=float, default=3e-3)
    args.add_argument("--seeds", type=int, default=3)
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    cache, rows = Cache("map_tuning"), fewrel()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        texts = [" ".join(r["tokens"]) for r in rows[: 3 * a.n]]
        transe(rows, folder / "transe.npz")
        bert(folder / "untrained", texts)
        data = lines(folder / "texts.jsonl", [{"text": t} for t in texts])
        tune("tune.full", folder / "untrained", folder / "base", 0, data=data, train={"epochs": 3, "batch": 32, "lr": 3e-3})
        found = [cache([s, a.n, a.epochs, a.lr], lambda s=s: once(s, folder, rows, a)) for s in range(a.seeds)]
    mean = {k: statistics.mean(f[k] for f in found) for k in found[0]}
    gain = {m: {arm: mean[f"{m}, no map"] - mean[f"{m}, {arm}"] for arm in ARMS} for m in ("frozen", "tuned")}
    better = sum(f["tuned, dropout 0.25"] < f["tuned, no dropout"] for f in found)
    save(
        "map_tuning",
        claim="A map helps a frozen model to find hidden mentions; one learnt under dropout serves a tuned model better (2305.17691)",
        outcome=f"Frozen model: {gain['frozen']['no dropout']:+.3f} nats gained, {gain['frozen']['vectors of other entities']:+.3f} "
        f"with the vectors of other entities. Tuned model: {gain['tuned']['no dropout']:+.3f} without dropout and "
        f"{gain['tuned']['dropout 0.25']:+.3f} with it; dropout is better in {better} of {len(found)} seeds.",
        columns=["model", "map", "nats per hidden piece", "by seed"],
        rows=[
            [
                *name.split(", "),
                f"{mean[name]:.3f} ± {statistics.stdev(f[name] for f in found):.3f}",
                ", ".join(f"{f[name]:.3f}" for f in found),
            ]
            for name in found[0]
        ],
        seeds=list(range(a.seeds)),
        notes=[
            f"FewRel; a BERT of 2 layers and width 64 learnt {3 * a.n:,} of its sentences, the tuned one {a.n:,} more; "
            f"the maps {a.n:,} others; tested on {a.n // 4}",
            f"TransE of width {WIDTH} on the triples of all sentences, those of the test too, as a knowledge base would hold them",
            "without a map neither vector nor mark is spliced; the control's vectors are permuted among the entities",
        ],
    )


if __name__ == "__main__":
    main()
