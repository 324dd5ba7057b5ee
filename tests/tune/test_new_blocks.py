"""tune.new_blocks: the blocks that growing added move, and nothing else; before the first step the model is the old one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import modelwright
from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.tune.new_blocks import Knobs, NewBlocks
from small import go, moved, weights

TRAIN = {"tokens": 64, "batch": 2, "context": 16, "lr": 1e-2, "warmup": 0.0}


def data(folder: Path) -> str:
    (folder / "x.jsonl").write_text("".join(json.dumps({"input_ids": [(7 * i + j) % 90 + 3 for j in range(20)]}) + "\n" for i in range(12)))
    return str(folder / "x.jsonl")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_only_the_named_blocks_move(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    before = weights(model)
    go(NewBlocks(Knobs(blocks=[1])), model, tmp_path)
    assert moved(model, before) and all(".1." in n.partition("mlp")[0] for n in moved(model, before))


def test_grown_model_keeps_every_old_weight_bit_for_bit(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny("qwen2", num_hidden_layers=4)
    grown = modelwright.run("reshape.grow", base=base, to=tmp_path / "grown", preset="llama_pro").to
    result = modelwright.run("tune.new_blocks", base=grown, to=tmp_path / "out", data=data(tmp_path), train=TRAIN)
    old, new = Checkpoint(base), Checkpoint(result.to)
    assert new.config["grown_blocks"] == [4], "a second run trains the same blocks"
    for name in old.table:
        assert torch.equal(old.get(name), new.get(name)), name
    assert bool(new.get("model.layers.4.mlp.down_proj.weight").any()), "the silent block has learnt"


@pytest.mark.parametrize(("knobs", "word"), [({}, "no new blocks"), ({"blocks": [2]}, "blocks 0 to 1")])
def test_model_without_such_blocks_is_refused(knobs: dict, word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=word):
        go(NewBlocks(Knobs(**knobs)), model_of("llama"), tmp_path)
