"""LoRA on a base in 4 bits: the base stays as it is, the adapters are merged into the unrounded weights, and the gap is said."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import modelwright
from modelwright.core.data.make import make_rows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train.evaluate import evaluate_rows
from modelwright.testing import in_bf16, made


@pytest.fixture(scope="module")
def bits() -> None:
    pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_on_four_bits_learn_and_are_merged_into_the_stored_weights(dtype: str, bits: None, tiny, tmp_path: Path) -> None:
    base = in_bf16(tiny("llama"), tmp_path / "base") if dtype == "bfloat16" else tiny("llama")
    knobs = {"r": 4, "quantize": "nf4", "train": {"epochs": 8, "batch": 4, "context": 16, "lr": 1e-2, "warmup": 0.0, "save_every": 1000}}
    data = made("tokens", tmp_path)
    result = modelwright.run("tune.lora", base=base, to=tmp_path / "out", evals={"same": data["data"]}, **knobs, **data)
    evals = result.steps[0]["evals"]
    assert evals[-1]["loss"] < evals[0]["loss"] - 0.1
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert old.keys() == new.keys() and {w.dtype for w in new.values()} == {getattr(torch, dtype)}
    moved = {n for n in old if not torch.equal(old[n], new[n])}
    assert moved and all("q_proj" in n or "v_proj" in n for n in moved), "what has no adapter is the stored weight, not a rounded one"
    gap = result.steps[0]["facts"]["lora"]["logit gap of merging into the unrounded weights"]
    assert gap > 0, "rounding to 4 bits shows"
    rows = make_rows(Data(path=data["data"]), None, 96, 16)
    merged = evaluate_rows(Checkpoint(tmp_path / "out").model(torch.float32), rows, 4)["loss"]
    assert abs(merged - evals[-1]["loss"]) < 0.2, "and does not undo what was learnt"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config


def test_without_bitsandbytes_the_extra_is_named(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"bitsandbytes.*modelwright\[quant\]"):
        modelwright.run("tune.lora", base=tiny("llama"), to=tmp_path / "out", quantize="nf4", **made("tokens", tmp_path))
    assert not list(tmp_path.glob("out*"))


def test_what_moves_the_base_is_refused_beside_four_bits(bits: None, tiny, tmp_path: Path) -> None:
    methods = [{"lora": {"quantize": "nf4"}}, "gw_moe"]
    with pytest.raises(UserError, match="4-bit weights"):
        modelwright.run(
            "tune.mix",
            base=tiny("mixtral"),
            to=tmp_path / "out",
            methods=methods,
            train={"context": 16},
            **made("tokens", tmp_path),
        )
