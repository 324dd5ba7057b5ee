"""Made data that needs a model, a recorder or a file format of its own."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelwright.testing.rows import ROWS, WORDS, write_jsonl


def _checkpoints(folder: Path) -> dict[str, Any]:
    """Two checkpoints that could be of one tuning run of the seedling, and its data."""
    import torch

    from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
    from modelwright.core.model.writer import copy_companions

    silence_transformers()
    source, told = Checkpoint("seedling"), []
    for i in (1, 2):
        model, g = source.model(torch.float32), torch.Generator().manual_seed(i)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".mlp." in name:
                    p.add_(torch.randn(p.shape, generator=g) * 0.1 * p.std())
        model.save_pretrained(folder / f"checkpoint-{i}", max_shard_size="5GB")
        copy_companions(source, folder / f"checkpoint-{i}")
        told.append(str(folder / f"checkpoint-{i}"))
    return {"checkpoints": told} | ROWS["text"](folder)


def _dynamics(folder: Path) -> dict[str, Any]:
    """Six recorded runs over eight examples: each example lowers the loss of a test, and the seventh raises it."""
    import random

    import torch

    from modelwright.core.train.recorder import Recorder

    for run in range(6):
        recorder = Recorder(folder / f"run-{run}" / "dynamics.parquet")
        rng, phi = random.Random(run), [2.0, 1.5, 1.8]  # noqa: S311 - made data
        order = [i for _ in range(3) for i in rng.sample(range(8), 8)]
        for step in range(13):
            for m, value in enumerate(phi):
                recorder.eval(step, f"t{m}", value, 6)
            if step < 12:
                seen = order[2 * step : 2 * step + 2]
                recorder.train(step + 1, 0.01, torch.tensor(seen), torch.tensor([6.0, 6.0]), torch.tensor([6, 6]))
                phi = [v * (1 - sum(0.01 * (i % 3 + 1 + m) for i in seen if i != 6)) + 0.05 * (6 in seen) for m, v in enumerate(phi)]
        recorder.close(12)
    examples = write_jsonl(folder / "examples.jsonl", ({"text": f"One {w}, two {w}s."} for w in WORDS[:8]))
    tests = write_jsonl(folder / "tests.jsonl", ({"name": f"t{m}", "text": f"Three {WORDS[m]}s."} for m in range(3)))
    return {"runs": [str(folder)], "examples": examples, "tests": tests}


def _translations(folder: Path) -> dict[str, Any]:
    """An untrained T5 with its own tokenizer, texts of two languages, pairs of them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    there = [{"en": f"The {w} is in the {p}.", "de": f"{w[::-1].title()} war im {p[::-1]}."} for w in WORDS for p in ("box", "hall")]
    words, special = Tokenizer(models.BPE()), ["<pad>", "</s>", "<unk>"]
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words.train_from_iterator([t for r in there for t in r.values()], trainers.BpeTrainer(special_tokens=special, show_progress=False))
    words.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(20))])
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder / "t5")
    torch.manual_seed(0)
    size: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=words.get_vocab_size(), pad_token_id=0, eos_token_id=1, **size)
    T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    pairs = write_jsonl(folder / "pairs.jsonl", there)
    return {"base": str(folder / "t5"), "mono": {k: {"path": pairs, "column": k} for k in ("en", "de")}, "pairs": {"en-de": pairs}}


def _tones(folder: Path) -> dict[str, Any]:
    """Short tones, high and low, as wav files with their texts."""
    import wave
    from array import array

    rows = []
    for i in range(16):
        high = i % 2 == 1
        pitch = (880 if high else 220) * (1 + (i // 2) / 40)
        samples = array("h", (round(9000 * math.sin(2 * math.pi * pitch * t / 8000)) for t in range(512)))
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(samples.tobytes())
        rows.append({"audio": f"{i}.wav", "text": "a high tone" if high else "a low tone"})
    return {"clips": write_jsonl(folder / "clips.jsonl", rows)}


BUILT: dict[str, Callable[[Path], dict[str, Any]]] = {
    "checkpoints": _checkpoints,
    "dynamics": _dynamics,
    "translations": _translations,
    "tones": _tones,
}
