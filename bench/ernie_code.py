"""German to French without a German-French pair: span corruption, translation through English, and both, on Multi30k."""

import argparse
import gzip
import json
import statistics
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import modelwright
from common import SHARED, Cache, save
from modelwright.core.model.checkpoint import silence_transformers
from modelwright.tune.spans.whitespace import add_tokens, decode, write

LANGUAGES, ARMS = ("en", "de", "fr"), ("SCLM", "PTLM", "SCLM + PTLM")
NAMES = {"en": "English", "de": "German", "fr": "French"}


def lines(part: str, language: str) -> list[str]:
    return gzip.decompress((SHARED / "multi30k" / f"{part}.{language}.gz").read_bytes()).decode().splitlines()


def tokenizer_of(texts: list[str], vocab: int) -> Any:
    """Subwords over white space as SentencePiece has it, bytes for what is unknown, 100 sentinels."""
    words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    words.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()])
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<pad>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=special[:3], show_progress=False))
    words.add_special_tokens([AddedToken(f"<extra_id_{i}>", normalized=False) for i in reversed(range(100))])
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def t5(folder: Path, texts: list[str]) -> None:
    tokenizer = tokenizer_of(texts, 2000)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    config = T5Config(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **shape)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def task(folder: Path, a: str, b: str, n: int) -> str:
    file = folder / f"{a}-{b}.jsonl"
    both = zip(lines("test_2016_flickr", a)[:n], lines("test_2016_flickr", b)[:n], strict=True)
    head = f"translate {NAMES[a]} to {NAMES[b]}: \n"
    file.write_text("".join(json.dumps({"prompt": head + x, "completion": y}) + "\n" for x, y in both))
    return str(file)


def once(arm: str, seed: int, a: argparse.Namespace) -> dict[str, float]:
    """chrF of German to French, of which there is no pair, and of English to French."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        texts = {k: lines("train", k)[: 2 * a.n] for k in LANGUAGES}
        t5(folder / "base", [t for some in texts.values() for t in some])
        for k, some in texts.items():
            (folder / f"{k}.txt").write_text("\n".join(some[a.n :]) + "\n")  # other sentences than those of the pairs
            (folder / f"pairs.{k}.txt").write_text("\n".join(some[: a.n]) + "\n")
        given: dict[str, Any] = {}
        if "SCLM" in arm:
            given["mono"] = {k: str(folder / f"{k}.txt") for k in LANGUAGES}
        if "PTLM" in arm:
            given["pairs"] = {f"en-{k}": str(folder / "pairs.{lang}.txt") for k in ("de", "fr")}
        done = modelwright.run(
            "tune.ernie_code",
            base=folder / "base",
            to=folder / "out",
            seed=seed,
            train={"tokens": a.tokens, "lr": a.lr, "batch": 32, "context": 40, "record": False, "eval_every": 10**6},
            tasks={"de to fr": task(folder, "de", "fr", 64), "en to fr": task(folder, "en", "fr", 64)},
            beams=1,
            save={"certificate": "structure"},
            **given,
        )
        facts = done.steps[0]["facts"]["ernie_code"]
        return {name: facts[name]["chrf"] for name in ("de to fr", "en to fr")}


def whole_files(most: int) -> dict[str, int]:
    """Files of the standard library that come back whole from the tokenizer under each rule for spaces."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:most]
    texts = [t for f in files if (t := f.read_bytes().decode("utf-8", "replace")).isascii() and not set(t) & set("\r\f\v\0")]
    tokenizer = tokenizer_of(texts[:20], 1000)
    add_tokens(tokenizer)
    found = {"files": len(texts)}
    for rule in ("none", "indent", "all"):
        found[rule] = sum(decode(tokenizer, tokenizer(write(t, rule))["input_ids"]) == t for t in texts)  # type: ignore[arg-type]
    return found


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--n", type=int, default=8000)
    args.add_argument("--tokens", type=int, default=120_000)
    args.add_argument("--lr", type=float, default=4e-3)
    args.add_argument("--seeds", type=int, default=3)
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    cache = Cache("ernie_code")
    found = {arm: [cache([arm, s, a.n, a.tokens, a.lr], lambda arm=arm, s=s: once(arm, s, a)) for s in range(a.seeds)] for arm in ARMS}
    mean = {arm: {t: statistics.mean(f[t] for f in found[arm]) for t in found[arm][0]} for arm in ARMS}
    files = whole_files(60)
    zero, trained = ({arm: mean[arm][t] for arm in ARMS} for t in ("de to fr", "en to fr"))
    said = [", ".join(f"{arm} {v:.1f}" for arm, v in of.items()) for of in (zero, trained)]
    save(
        "ernie_code",
        claim="Pairs with English alone teach German to French; span corruption beside them does not harm (after 2212.06742)",
        outcome=f"chrF of German to French without a pair: {said[0]}. English to French, which has pairs: {said[1]}.",
        columns=["arm", "de to fr, chrF", "by seed", "en to fr, chrF"],
        rows=[
            [
                arm,
                f"{zero[arm]:.1f} ± {statistics.stdev(f['de to fr'] for f in found[arm]):.1f}",
                ", ".join(f"{f['de to fr']:.1f}" for f in found[arm]),
                f"{trained[arm]:.1f}",
            ]
            for arm in ARMS
        ],
        seeds=list(range(a.seeds)),
        notes=[
            f"an untrained T5 of width 64 reads {a.tokens:,} tokens in each arm; pairs: {a.n:,} en-de and en-fr, texts: {a.n:,} other "
            "sentences a language; 64 test sentences, greedy",
            f"white space: of {files['files']} ASCII files of the standard library {files['none']} come back whole without tokens for it, "
            f"{files['indent']} with the paper's rule (indentation), {files['all']} with spaces: all",
        ],
    )


if __name__ == "__main__":
    main()
