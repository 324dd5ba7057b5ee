"""Packing: no item lost or twice, no bin too full, and a packed row is to the model what its texts are alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import model_of
from modelwright.core.data.packing import Texts, first_fit, multipack, packed, padded
from modelwright.core.data.rows import IGNORE, Rows, collate, positions
from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train.evaluate import evaluate_rows
from modelwright.core.train.requirements import require_apart
from modelwright.core.train.technique import LossTerm, Technique
from modelwright.core.train.trainer import forward
from small import batches, far, go, passes, weights

APART = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "granite", "phi3", "gpt2", "gpt_neox", "mixtral"]


def texts(n: int = 12, longest: int = 20, seed: int = 0) -> Texts:
    """Random texts with random weights; some tokens are not learnt."""
    rng = np.random.default_rng(seed)
    found = Texts()
    for size in rng.integers(2, longest + 1, n):
        found.ids.append(rng.integers(3, 90, size).tolist())
        found.weights.append((rng.random(size) * (rng.random(size) < 0.7)).tolist()[:-1] + [0.5])
    return found


# ---- bins ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bins", [1, 2, 8])
@pytest.mark.parametrize("seed", range(6))
def test_every_item_is_in_one_bin_and_no_bin_is_too_full(bins: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 200))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 300))).tolist()
    made = multipack(lengths, capacity, bins, seed)
    assert sorted(i for b in made for i in b) == list(range(len(lengths)))
    assert all(b and sum(lengths[i] for i in b) <= capacity for b in made)
    assert len(made) <= 2 * -(-sum(lengths) // capacity) + bins  # first-fit is never worse than twice the room
    assert made == multipack(lengths, capacity, bins, seed)
    assert len(lengths) < 20 or made != multipack(lengths, capacity, bins, seed + 1)


@pytest.mark.parametrize(("lengths", "capacity", "want"), [([], 4, []), ([4, 4], 4, [[0], [1]]), ([2, 2], 4, [[0, 1]])])
def test_bins_of_few_items(lengths: list[int], capacity: int, want: list[list[int]]) -> None:
    assert sorted(sorted(b) for b in multipack(lengths, capacity, 1)) == want


def test_first_fit_takes_the_longest_first_and_says_when_it_cannot() -> None:
    assert first_fit([2, 5, 3, 4], 7, 2) == [[1, 0], [3, 2]] and first_fit([4, 4, 4], 7, 2) is None
    with pytest.raises(ValueError, match="does not fit into 4"):
        multipack([3, 5], 4, 2)


@pytest.mark.parametrize("base", ["seedling", "stories"])
def test_fill_on_real_texts_is_at_least_99_percent(base: str, shared: Path, request: Any) -> None:
    tokenizer = Checkpoint(base if base == "seedling" else request.getfixturevalue(base)).tokenizer()
    prompts = [json.loads(line)["prompt"] for f in sorted((shared / "trace_hhh").glob("*.json")) for line in f.open()]
    tasks = [json.loads((shared / "cl15" / f"{n}.json").read_text())["train"] for n in ("agnews", "boolqa", "imdb", "yelp")]
    for documents, capacity in ((prompts, 2048), ([r["sentence"] for t in tasks for r in t], 4096)):
        ids = tokenizer(documents, add_special_tokens=False)["input_ids"]
        rows = packed(Texts(ids, [[1.0] * len(i) for i in ids]), capacity, 1, 0)
        assert len(rows) > 20 and len(rows) <= -(-rows.tokens // capacity) * 1.01 + 0.5
        assert float(rows.lengths.sort().values[1:].double().mean()) / capacity >= 0.99  # but for the last bin


# ---- rows ------------------------------------------------------------------------------------------------------------
def test_rows_hold_each_text_whole_and_learn_no_first_token() -> None:
    of = texts()
    rows, seen = packed(of, 24, 2, 0), []
    for ids, labels, w, s, n in zip(rows.ids, rows.labels, rows.weights, rows.segments, rows.lengths, strict=True):
        assert bool((s[n:] == -1).all()) and not bool((w[n:] != 0).any()) and not bool((labels[n:] != IGNORE).any())
        for i in s[:n].unique().tolist():
            at = (s == i).nonzero().flatten()
            assert torch.equal(at, torch.arange(int(at[0]), int(at[-1]) + 1)) and ids[at].tolist() == of.ids[i]
            want = [0.0, *of.weights[i][1:]]
            assert w[at].tolist() == pytest.approx(want)
            assert labels[at].tolist() == [t if x > 0 else IGNORE for t, x in zip(of.ids[i], want, strict=True)]
            seen.append(i)
    assert sorted(seen) == list(range(12)) and rows.facts["fill"] == rows.tokens / rows.ids.numel()


def test_positions_begin_anew_with_each_text_and_in_the_padding() -> None:
    segments = torch.tensor([[4, 4, 4, 1, 7, 7, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0], [-1] * 8])
    assert positions(segments).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], list(range(8)), list(range(8))]


@pytest.mark.parametrize("make", [lambda t, c: packed(t, c, 2, 0), padded], ids=["packed", "padded"])
def test_a_text_longer_than_the_capacity_is_left_out_and_counted(make: Any) -> None:
    of = texts(20, 20)
    short = sum(len(ids) <= 9 for ids in of.ids)
    rows = make(of, 9)
    assert rows.facts["longer than the context, left out"] == 20 - short and rows.facts["documents"] == 20
    assert rows.tokens == sum(len(ids) for ids in of.ids if len(ids) <= 9)
    with pytest.raises(UserError, match="no text is at most 1 tokens"):
        make(of, 1)
    of.weights = [[1.0] + [0.0] * (len(w) - 1) for w in of.weights]
    with pytest.raises(UserError, match="no token .* is to be learnt"):
        make(of, 20)


# ---- what the model sees ---------------------------------------------------------------------------------------------
def variant(kind: str) -> Any:
    model = model_of(kind.split()[0], **({"sliding_window": 4} if "window" in kind else {}))
    if "eager" in kind:
        model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("kind", [*APART, "mistral, window", "llama, eager", "gpt2, eager"])
@torch.no_grad()
def test_logits_of_each_text_in_a_packed_row_are_those_of_the_text_alone(kind: str) -> None:
    model, of = variant(kind.replace(",", "")), texts()
    rows = packed(of, 30, 2, 0)
    batch = batches(rows, len(rows))[0]
    assert len(rows) > 2 and "attention_mask" not in batch
    logits = forward(model, batch).logits
    for i, ids in enumerate(of.ids):
        want = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        assert torch.allclose(logits[batch["segments"] == i], want, atol=1e-5 * float(want.abs().max() + 1))


@pytest.mark.parametrize("kind", APART)
def test_packed_loss_is_the_padded_loss(kind: str) -> None:
    model, of = model_of(kind), texts()
    a, b = (evaluate_rows(model, rows, 2) for rows in (packed(of, 30, 2, 0), padded(of, 30)))
    assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    losses = []
    for rows in (packed(of, 30, 2, 0), padded(of, 30)):
        batch, term = batches(rows, len(rows))[0], LossTerm()
        with torch.no_grad():
            losses.append(float(term.sums(batch, forward(model, batch)).sum() / term.count(batch)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0] != pytest.approx(a["loss"], abs=1e-3)  # weights matter


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_gradient_is_the_padded_gradient(kind: str) -> None:
    of, grads = texts(), []
    for rows in (packed(of, 30, 2, 0), padded(of, 30)):
        model = model_of(kind)
        passes(model, Technique(), batches(rows, 3))
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if not n.endswith("c_attn.bias")})
    assert far(*grads) <= 1e-5


def test_packed_rows_train_the_same_with_recomputed_activations(tmp_path: Path) -> None:
    rows = packed(texts(), 30, 2, 0)
    a, b = (go(Technique(), model_of("llama"), tmp_path / str(c), rows, batch=2, gradient_checkpointing=c) for c in (False, True))
    assert far(weights(a.model), weights(b.model)) <= 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", APART)
def test_a_model_that_keeps_texts_apart_is_let_through(kind: str, dtype: str) -> None:
    require_apart(model_of(kind, dtype=dtype))


def test_a_model_that_mixes_packed_texts_is_refused(tmp_path: Path) -> None:
    rows = packed(texts(), 30, 2, 0)
    with pytest.raises(UserError, match="OPTForCausalLM mixes the texts of a packed row"):
        go(Technique(), model_of("opt"), tmp_path, rows)
    deaf = model_of("llama")
    real = deaf.forward
    deaf.forward = lambda position_ids=None, **kwargs: real(**kwargs)
    with pytest.raises(UserError, match="mixes the texts"):
        require_apart(deaf)


def test_dynamics_are_recorded_by_text_not_by_row(tmp_path: Path) -> None:
    from pyarrow import parquet

    of = texts()
    out = go(Technique(), model_of("llama"), tmp_path, packed(of, 30, 2, 0), batch=2, epochs=1, record=True)
    table = parquet.read_table(out.dynamics, filters=[("kind", "=", "train")]).to_pydict()
    learnt = {i: sum(x > 0 for x in w[1:]) for i, w in enumerate(of.weights)}
    assert dict(zip(table["example"], table["tokens"], strict=True)) == learnt


def test_split_and_collate_keep_weights_and_segments() -> None:
    rows = packed(texts(), 30, 2, 0)
    parts = rows.split(1)
    assert [len(p) for p in parts] == [1, len(rows) - 1] and all(isinstance(p, Rows) and p.weights is not None for p in parts)
    batch = collate([parts[1][i] for i in range(len(parts[1]))])
    assert batch["segments"].shape == batch["weights"].shape == batch["input_ids"].shape == batch["position_ids"].shape
