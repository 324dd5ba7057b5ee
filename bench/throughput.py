"""One step of training beside a bare PyTorch loop, transformers' Trainer and TRL's SFTTrainer: CPU time of one thread, interleaved.

What a step costs is the difference of a long and a short run, so that loading and set-up do not count.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from common import save
from modelwright.core.data.packing import Texts, packed
from modelwright.core.data.rows import Rows, collate
from modelwright.core.knobs import Train
from modelwright.core.model.checkpoint import silence_transformers
from modelwright.core.train.loop import fit
from modelwright.tune.full import Full, Knobs
from modelwright.tune.lora import Knobs as LoraKnobs
from modelwright.tune.lora import Lora

SHORT, LONG, ROUNDS, BATCH, CONTEXT = 4, 24, 5, 4, 128


def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=2048, max_position_embeddings=CONTEXT, **sizes))


def texts(n: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, 2048, (int(k),), generator=g).tolist() for k in torch.randint(CONTEXT // 2, CONTEXT + 1, (n,), generator=g)]


def padded(n: int) -> Rows:
    found = texts(n)
    lengths = torch.tensor([len(t) for t in found])
    ids = torch.zeros(n, CONTEXT, dtype=torch.int32)
    for row, t in zip(ids, found, strict=True):
        row[: len(t)] = torch.tensor(t)
    return Rows(ids, torch.where(torch.arange(CONTEXT) < lengths[:, None], ids, -100), lengths)


def in_bins(n: int) -> Rows:
    found = Texts()
    for t in texts(n):
        found.ids.append(t[: CONTEXT // 2])
        found.weights.append([1.0] * len(found.ids[-1]))
    return packed(found, CONTEXT, BATCH, seed=0)


def bare(rows: Rows, steps: int) -> None:
    """The loop that somebody would write by hand."""
    net = model().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        batch = collate([rows[(step * BATCH + i) % len(rows)] for i in range(BATCH)])
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
        logits = net(**inputs, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def ours(method: Callable[[], Any]) -> Callable[[Rows, int], None]:
    def run(rows: Rows, steps: int) -> None:
        knobs = Train(epochs=steps * BATCH / len(rows), batch=BATCH, context=CONTEXT, eval_every=10**6, save_every=10**6)
        with tempfile.TemporaryDirectory() as folder:
            fit(model(), rows, knobs, techniques=[method()], evals={}, folder=Path(folder), seed=0)

    return run


def _arguments(cls: Any, folder: str, steps: int, **more: Any) -> Any:
    return cls(
        folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **more,
    )


def hugging_face(rows: Rows, steps: int) -> None:
    def together(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(items)
        return {k: batch[k] for k in ("input_ids", "attention_mask", "labels", "position_ids") if k in batch}

    with tempfile.TemporaryDirectory() as folder:
        Trainer(model(), _arguments(TrainingArguments, folder, steps), train_dataset=rows, data_collator=together).train()


def trl_sft(rows: Rows, steps: int) -> None:
    items = [{"input_ids": rows[i]["input_ids"][: int(rows[i]["length"])].tolist()} for i in range(len(rows))]
    tokens = _Pad()
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(SFTConfig, folder, steps, max_length=CONTEXT, dataset_kwargs={"skip_prepare_dataset": True})
        SFTTrainer(model(), arguments, train_dataset=Dataset.from_list(items), processing_class=tokens.tokenizer).train()


class _Pad:
    """The embedded tokenizer lends its padding; nothing is tokenised."""

    def __init__(self) -> None:
        from modelwright.core.model.checkpoint import SEEDLING, Checkpoint

        self.tokenizer = Checkpoint(SEEDLING).tokenizer()


def main() -> None:
    torch.set_num_threads(1)
    silence_transformers()
    arms = {
        "bare loop": bare,
        "tune.full": ours(lambda: Full(Knobs())),
        "tune.lora": ours(lambda: Lora(LoraKnobs())),
        "transformers Trainer": hugging_face,
        "TRL SFTTrainer": trl_sft,
    }
    table = []
    for kind, rows in (("padded", padded(64)), ("packed", in_bins(128))):
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for round_ in range(ROUNDS + 1):
            for name, run in list(arms.items())[:: 1 if round_ % 2 else -1]:
                if kind == "packed" and name == "TRL SFTTrainer":
                    continue  # it packs texts itself, and not these rows
                spent = []
                for steps in (SHORT, LONG):
                    began = time.process_time()
                    run(rows, steps)
                    spent.append(time.process_time() - began)
                if round_:  # the first warms up
                    seconds[name].append((spent[1] - spent[0]) / (LONG - SHORT))
        for name, each in seconds.items():
            if each:
                ratios = [a / b for a, b in zip(each, seconds["bare loop"], strict=True)]
                table.append(
                    [
                        kind,
                        name,
                        f"{statistics.median(each):.4f}",
                        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
                    ]
                )
    full = [float(r[3].split()[0]) for r in table if r[1] == "tune.full"]
    save(
        "throughput",
        claim="A step of tune.full costs at most 1.01 of a bare PyTorch loop, and no more than transformers' Trainer or TRL's SFTTrainer",
        outcome=f"tune.full: {full[0]:.3f} padded, {full[1]:.3f} packed, of the bare loop's CPU time (goal 1.01).",
        columns=["rows", "loop", "CPU s a step, median", "of the bare loop, median (min to max)"],
        rows=table,
        notes=[
            f"Llama of width 256 and 4 blocks, batch {BATCH} x {CONTEXT}, fp32, one thread, {ROUNDS} interleaved rounds after one warm-up"
        ],
    )


if __name__ == "__main__":
    main()
