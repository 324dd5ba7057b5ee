"""What recording the training dynamics costs: the same run with and without, interleaved, in CPU time of one thread."""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from common import SHARED, save
from modelwright.core.data.make import tokenize
from modelwright.core.data.read import read
from modelwright.core.knobs import Data, Train
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.core.train.loop import fit
from modelwright.tune.full import Full, Knobs


def main() -> None:
    torch.set_num_threads(1)
    silence_transformers()
    rows_out, worst = [], 0.0
    for name, base, column in (("stories260K", str(SHARED / "stories260K" / "hf"), None), ("seedling", "seedling", None)):
        checkpoint = Checkpoint(base)
        tokenizer = checkpoint.tokenizer()
        rows = tokenize(read(Data(path=str(SHARED / "tinyshakespeare"), column=column)), tokenizer, len(tokenizer), 128)
        times: dict[bool, list[float]] = {True: [], False: []}
        for i in range(7):
            for record in (True, False) if i % 2 else (False, True):
                with tempfile.TemporaryDirectory() as tmp:
                    model = checkpoint.model()
                    began = time.process_time()
                    fit(
                        model,
                        rows,
                        Train(tokens=80_000, batch=8, context=128, eval_every=10**6, save_every=10**6, record=record),
                        techniques=[Full(Knobs())],
                        evals={},
                        folder=Path(tmp),
                        seed=0,
                    )
                    times[record].append(time.process_time() - began)
        ratios = [a / b for a, b in zip(times[True][1:], times[False][1:], strict=True)]
        worst = max(worst, statistics.median(ratios))
        rows_out.append(
            [
                name,
                f"{statistics.median(times[False][1:]):.2f}",
                f"{statistics.median(times[True][1:]):.2f}",
                f"{statistics.median(ratios):.4f} ({min(ratios):.3f} to {max(ratios):.3f})",
            ]
        )
    save(
        "recorder_cost",
        claim="Recording the training dynamics costs at most 2 % of a run",
        outcome=f"{'Met' if worst <= 1.02 else 'Missed'}: median ratio {worst:.4f} on the worse of two models.",
        columns=["model", "without, CPU s", "with, CPU s", "ratio, median (min to max)"],
        rows=rows_out,
        notes=[
            "80,000 tokens, batch 8 x 128, 6 interleaved pairs after one warm-up pair; every example of every step is recorded; "
            "the recorder's own functions take 0.1 % of the run, the rest is noise and memory traffic"
        ],
    )


if __name__ == "__main__":
    main()
