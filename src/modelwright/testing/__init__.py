"""Test a method as this package tests its own: run it small, load what it saves, look at its certificate, once more in bf16.

For packages that add methods, and for tests/test_matrix.py:

    from modelwright.testing import check_method

    def test_it_trains_and_saves(tmp_path):
        check_method("tune.my_method", {"train": SHORT}, tmp_path, make="text")

The base is the embedded seedling unless another folder is given. Nothing is downloaded; a run takes a few seconds.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modelwright import registry
from modelwright.core.errors import UserError, did_you_mean
from modelwright.testing.built import BUILT
from modelwright.testing.rows import ROWS, write_jsonl

__all__ = ["MADE", "SHORT", "check_method", "in_bf16", "made", "write_jsonl"]

SHORT = {"tokens": 64, "batch": 2, "context": 16, "lr": 1e-2, "save_every": 100, "warmup": 0.0}  # a training run of four rows


def check_method(
    name: str,
    knobs: dict[str, Any],
    folder: Path,
    *,
    base: str | Path | None = "seedling",
    make: str = "",
    bf16: bool = False,
    loads_in: str = "",
    seed: int = 0,
) -> Any:
    """Run one method into `folder`/out and check what it left; returns the result. AssertionError says what does not hold.

    `make` names data to make first (see MADE); its settings are added to the knobs. A knob with the value BASE gets the base.
    With `bf16` the base is converted first, and what is saved must be bf16 again. `loads_in` names the stock class expected.
    """
    from modelwright.runner.run import run

    entry = registry.entry(name)
    if "checkpoint" not in (*entry.takes, *entry.may_take):
        base = None
    if bf16 and base:
        base = in_bf16(base, folder / "base")
    given = dict(knobs) | (made(make, folder) if make else {})
    given = {k: str(base) if v == "BASE" else v for k, v in given.items()}
    result = run(name, base=base, to=folder / "out", seed=seed, **given)
    assert result.to == folder / "out", f"the result is at {result.to}"
    left = [p.name for p in folder.glob("out.*")]
    assert not left, f"working folders were left behind: {left}"
    assert (result.to / "report.html").stat().st_size > 2000, "the report is empty"
    if result.certificate:
        _check_model(result, loads_in, bf16)
    return result


def _check_model(result: Any, loads_in: str, bf16: bool) -> None:
    """A stock class loads the folder; sizes and types are as the certificate and the base say."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    certificate = result.certificate
    assert certificate["passed"] in (True, None), f"the certificate failed: {certificate}"
    is_reward = certificate["loads_in"].endswith(("ForSequenceClassification", "RewardModel"))  # ToolRewardModel too
    model = (AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM).from_pretrained(result.to)
    expected = loads_in or certificate["loads_in"]
    assert type(model).__name__ == certificate["loads_in"] == expected, f"loads in {type(model).__name__}, not in {expected}"
    count = sum(p.numel() for p in model.parameters())
    assert count == certificate["params_total"], f"{count} parameters, and the certificate says {certificate['params_total']}"
    odd = [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    assert not odd, f"not finite: {odd[:3]}"
    if bf16:
        kinds = {_dtype(result.to, n) for n in _names(result.to)}
        assert kinds <= {"BF16", "I64", "I32", "BOOL"}, f"a bf16 base was saved as {kinds}"


def _names(folder: Path) -> Iterable[str]:
    from modelwright.core.model.checkpoint import Checkpoint

    return Checkpoint(folder).table


def _dtype(folder: Path, name: str) -> str:
    from modelwright.core.model.checkpoint import Checkpoint

    return str(Checkpoint(folder).table[name]["dtype"])


def in_bf16(base: str | Path, folder: Path) -> Path:
    """The same checkpoint with its weights in bf16, tokenizer and all."""
    import torch

    from modelwright.core.model.checkpoint import Checkpoint

    source = Checkpoint(base)
    source.model(torch.bfloat16).save_pretrained(folder)
    for file in source.folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not (folder / file.name).exists() and not file.name.endswith("index.json"):
            shutil.copyfile(file, folder / file.name)
    return folder


MADE = ROWS | BUILT


def made(kind: str, folder: Path) -> dict[str, Any]:
    """Write made data of a kind into `folder`; returns the settings that point to it."""
    if kind not in MADE:
        raise UserError(f"no made data is called '{kind}'", how=did_you_mean(kind, MADE))
    folder.mkdir(parents=True, exist_ok=True)
    return MADE[kind](folder)
