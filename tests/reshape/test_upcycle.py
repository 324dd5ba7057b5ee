"""Upcycling keeps the function where it promises to, and changes exactly the neurons that it says where it does not."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import modelwright
from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import write_tensors
from modelwright.reshape.upcycle import Knobs, upcycle

ROUTER = "block_sparse_moe.gate.weight"


def plan(base: Path, seed: int = 0, **knobs: Any) -> dict[str, Tensor]:
    """Every tensor of the result, from the stream (nothing is written)."""
    made, _ = upcycle(Checkpoint(base), Knobs(**{"experts": 4, "top_k": 2, **{k: _text(v) for k, v in knobs.items()}}), seed)
    tensors = {piece[0]: piece[1].clone() for piece in made.stream() if len(piece) == 2}
    assert {n: t.dtype for n, t in tensors.items()} == made.dtypes
    return tensors


def _text(value: Any) -> Any:
    return [str(v) for v in value] if isinstance(value, list) and value and isinstance(value[0], Path) else value


def write(base: Path, to: Path, seed: int = 0, **knobs: Any) -> Path:
    made, _ = upcycle(Checkpoint(base), Knobs(**{"experts": 4, "top_k": 2, **knobs}), seed)
    to.mkdir()
    write_tensors(made, to, 10**9)
    return to


def expert(tensors: dict[str, Tensor], layer: int, e: int) -> list[Tensor]:
    """gate, up and transposed down of one expert: (F, d) each, a neuron a row."""
    at = f"model.layers.{layer}.block_sparse_moe.experts.{e}."
    return [tensors[at + "w1.weight"], tensors[at + "w3.weight"], tensors[at + "w2.weight"].T]


def dense(base: Path, layer: int) -> list[Tensor]:
    """gate, up and transposed down of the source: (F, d) each."""
    tensors, at = load_file(base / "model.safetensors"), f"model.layers.{layer}.mlp."
    if at + "gate_up_proj.weight" in tensors:
        return [*tensors[at + "gate_up_proj.weight"].chunk(2), tensors[at + "down_proj.weight"].T]
    return [tensors[at + "gate_proj.weight"], tensors[at + "up_proj.weight"], tensors[at + "down_proj.weight"].T]


def differing(a: Tensor, b: Tensor) -> list[int]:
    """Neurons (rows) in which any value differs."""
    return (a != b).any(1).nonzero().flatten().tolist()


def matches(new: Tensor, old: Tensor) -> Tensor:
    """Which new neuron is which old one, (F, F); six of its values tell a neuron."""
    return (new[:, None, :6] == old[None, :, :6]).all(-1)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def others(a: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in a.items() if "block_sparse_moe" not in n}


@torch.no_grad()
def difference(a: Path, b: Path, ids: Tensor | None = None) -> float:
    ids = torch.arange(96).view(2, 48) if ids is None else ids
    models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (a, b)]
    return float((models[0](ids).logits - models[1](ids).logits).abs().max())


@pytest.fixture(scope="module")
def wide(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 512 neurons. Each matrix has a mean and a spread of its own and each neuron an offset three times as large as the
    spread within it: a few neurons' statistics are neither the whole matrix's nor another matrix's."""
    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(tiny("llama", intermediate_size=512), folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    for name, mean, scale in (("gate_proj", 0.3, 1.0), ("up_proj", -0.2, 2.0), ("down_proj", 0.1, 0.5)):
        for n in [n for n in tensors if name in n]:
            offset = torch.randn(512, generator=torch.Generator().manual_seed(len(n))) * 0.45
            tensors[n] = (tensors[n] + (offset if name == "down_proj" else offset[:, None])) * scale + mean
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- the real checkpoint ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def grown(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return modelwright.run("reshape.upcycle", base=stories, to=tmp_path_factory.mktemp("grown") / "out", experts=4, top_k=2)


GREEDY = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.tensor([[tokenizer.bos_token_id]])
out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=200)
assert not any(m.split(".")[0] == "modelwright" for m in sys.modules)
sys.stdout.buffer.write(type(model).__name__.encode() + b"\\n" + tokenizer.decode(out[0], skip_special_tokens=True).encode())
"""


def greedy(folder: Path) -> str:
    """200 tokens from the begin token, without sampling."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("", return_tensors="pt")["input_ids"].long()
    assert ids.tolist() == [[1]]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=200)
    assert out.shape == (1, 201)
    return tokenizer.decode(out[0], skip_special_tokens=True)


@pytest.fixture(scope="module")
def expected(shared: Path) -> str:
    return (shared / "stories260K" / "expected_greedy_200_tokens.txt").read_text()


def test_source_tells_the_expected_story(stories: Path, expected: str) -> None:
    assert greedy(stories) == expected


def test_result_tells_the_expected_story(grown, expected: str) -> None:
    assert greedy(grown.to) == expected


def test_result_tells_the_story_where_modelwright_was_never_imported(grown, expected: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GREEDY, str(grown.to)],
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout.decode() == "MixtralForCausalLM\n" + expected


def test_result_keeps_the_real_logits(grown, stories: Path, expected: str) -> None:
    ids = torch.tensor([AutoTokenizer.from_pretrained(stories)(expected)["input_ids"]])
    assert ids.shape[1] >= 200
    assert difference(stories, grown.to, ids) <= 1e-4


def test_certificate_says_what_is_so(grown, stories: Path, expected: str) -> None:
    c = grown.certificate
    assert (c["promise"], c["passed"], c["loads_in"]) == ("same function", True, "MixtralForCausalLM")
    assert c["max_abs_dlogit"] <= 1e-4
    model = AutoModelForCausalLM.from_pretrained(grown.to)
    ffn, router = 3 * 64 * 172 * 5, 4 * 64 * 5
    assert c["before"]["params_total"] == 260_032
    assert c["params_total"] == 260_032 + 3 * ffn + router == sum(p.numel() for p in model.parameters())
    assert c["params_active"] == 260_032 + ffn + router


# ---- what the copies keep and change ---------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_sparse_experts_are_the_dense_matrices(family: str, tiny) -> None:
    result = plan(tiny(family))
    for layer in range(2):
        for e in range(4):
            assert all(torch.equal(a, b) for a, b in zip(expert(result, layer, e), dense(tiny(family), layer), strict=True))


@pytest.mark.parametrize(
    "knobs",
    [
        {"method": "drop", "ratio": 0.0},
        {"method": "noise", "ratio": 0.0},
        {"method": "noise", "std": 0.0},
        {"method": "drop", "ratio": 0.02},
    ],
    ids=["drop 0", "noise 0", "noise std 0", "drop less than a neuron"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_change_is_bit_equal_to_sparse(knobs: dict, dtype: str, tiny) -> None:
    base = tiny("llama", dtype=dtype)
    assert same(plan(base, **knobs), plan(base))


@pytest.mark.parametrize(
    ("knobs", "promise"),
    [
        ({}, "same function"),
        ({"method": "drop", "ratio": 0.0}, "same function"),
        ({"method": "noise", "ratio": 0.0}, "same function"),
        ({"method": "noise", "std": 0.0}, "same function"),
        ({"method": "drop", "ratio": 0.0, "compat": "official"}, "same function"),
        ({"method": "drop"}, "changed function"),
        ({"method": "drop", "ratio": 1.0}, "changed function"),
        ({"method": "noise", "ratio": 1.0, "std": 0.2}, "changed function"),
    ],
    ids=lambda v: " ".join(map(str, v.values())) if isinstance(v, dict) else "",
)
def test_promise_is_what_happens(knobs: dict, promise: str, tiny, tmp_path: Path) -> None:
    base = tiny("llama")
    assert upcycle(Checkpoint(base), Knobs(**{"experts": 4, **knobs}))[1] == promise
    change = difference(base, write(base, tmp_path / "out", **knobs))
    assert change <= 1e-4 if promise == "same function" else change > 1e-3


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ratio", [0.25, 0.34, 0.5, 1.0])
@pytest.mark.parametrize("method", ["drop", "noise"])
def test_the_asked_share_of_neurons_changes_in_all_three_matrices(method: str, ratio: float, dtype: str, family: str, tiny) -> None:
    base = tiny(family, dtype=dtype)
    result, sets = plan(base, method=method, ratio=ratio, std=0.5), []
    for layer in range(2):
        for e in range(4):
            neurons = [differing(a, b) for a, b in zip(expert(result, layer, e), dense(base, layer), strict=True)]
            assert len(neurons[0]) == int(48 * ratio)
            assert neurons[0] == neurons[1] == neurons[2]
            sets.append(tuple(neurons[0]))
    assert len(set(sets)) == (1 if ratio == 1.0 else 8)  # another set for each expert and layer
    assert same(others(result), others(plan(base)))


def test_neurons_are_drawn_evenly(wide: Path) -> None:
    result = plan(wide, method="drop", ratio=0.25, experts=32)
    times = torch.zeros(512)
    for layer in range(2):
        for e in range(32):
            times[differing(expert(result, layer, e)[0], dense(wide, layer)[0])] += 1
    assert times.sum() == 64 * 128
    # 64 draws at 1/4 each: mean 16, standard deviation 3.46; one index pattern used by all would give 0 or 64
    assert 3.0 < times.std() < 4.0 and times.min() >= 1 and times.max() <= 34


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("compat", "ratio"), [("ours", 0.05), ("ours", 0.5), ("official", 0.5)])
def test_dropped_neurons_have_the_statistics_of_the_replaced(compat: str, ratio: float, dtype: str, wide: Path, tmp_path: Path) -> None:
    base = wide
    if dtype == "bfloat16":
        base = tmp_path / "half"
        shutil.copytree(wide, base)
        half = {n: t.bfloat16() for n, t in load_file(wide / "model.safetensors").items()}
        save_file(half, base / "model.safetensors", metadata={"format": "pt"})
    result = plan(base, method="drop", ratio=ratio, compat=compat)
    for layer in range(2):
        for e in range(4):
            for new, old in zip(expert(result, layer, e), dense(base, layer), strict=True):
                kept = matches(new, old)
                drawn, replaced = new[~kept.any(1)].float(), old[~kept.any(0)].float()
                assert drawn.shape == replaced.shape == (int(512 * ratio), 32)
                scale, n = replaced.std(), replaced.numel()
                assert abs(drawn.mean() - replaced.mean()) < 5 * scale / n**0.5
                assert abs(drawn.std() / scale - 1) < 5 / (2 * n) ** 0.5
                z = (drawn - drawn.mean()) / drawn.std()
                assert abs((z.abs() < 1).float().mean() - 0.6827) < 5 * (0.2166 / n) ** 0.5  # normal; a uniform draw gives 0.577
                assert abs((z**4).mean() - 3) < 5 * (24 / n) ** 0.5  # and 1.8


def test_draws_of_experts_layers_and_matrices_are_unrelated(wide: Path) -> None:
    result = plan(wide, method="drop", ratio=1.0)
    draws = [(m - m.mean()).flatten() / m.std() for layer in range(2) for e in range(4) for m in expert(result, layer, e)]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 6 / 16384**0.5  # 24 draws of 512 * 32 values


@pytest.mark.parametrize(("compat", "std"), [("ours", 0.02), ("ours", 0.2), ("official", 0.02)])
def test_noise_has_its_standard_deviation(compat: str, std: float, wide: Path) -> None:
    result = plan(wide, method="noise", ratio=0.5, std=std, compat=compat)
    for new, old in zip(expert(result, 1, 2), dense(wide, 1), strict=True):
        distance = torch.cdist(new, old) if compat == "official" else None  # official permutes: the nearest old neuron is its own
        change = new - (old if distance is None else old[distance.argmin(1)])
        moved = change[(change != 0).any(1)]
        assert moved.shape == (256, 32)
        assert abs(moved.mean()) < 5 * std / 8192**0.5
        assert abs(moved.std() / std - 1) < 5 / 16384**0.5


def test_official_compat_replaces_other_neurons_in_each_matrix(wide: Path) -> None:
    result = plan(wide, method="drop", ratio=0.5, compat="official")
    for e in range(4):
        sets, orders = [], []
        for new, old in zip(expert(result, 0, e), dense(wide, 0), strict=True):
            kept = matches(new, old)
            assert int(kept.sum()) == 256 and int(kept.any(0).sum()) == 256
            sets.append(tuple((~kept.any(0)).nonzero().flatten().tolist()))
            orders.append(torch.where(kept.any(1), kept.int().argmax(1), -1))
        assert len(set(sets)) == 3
        for a, b in ((0, 1), (0, 2), (1, 2)):  # one permutation for the three all the same
            both = (orders[a] >= 0) & (orders[b] >= 0)
            assert both.sum() > 64 and torch.equal(orders[a][both], orders[b][both])


@pytest.mark.parametrize("method", ["drop", "noise"])
def test_official_permutation_does_not_change_the_function(method: str, tiny, tmp_path: Path) -> None:
    base = tiny("llama")
    result, seen = plan(base, method=method, ratio=0.0, compat="official"), set()
    for e in range(4):
        orders = [matches(new, old) for new, old in zip(expert(result, 0, e), dense(base, 0), strict=True)]
        assert all(torch.equal(o, orders[0]) for o in orders)
        assert torch.equal(orders[0].sum(0), torch.ones(48, dtype=torch.long))
        assert not torch.equal(orders[0], torch.eye(48, dtype=torch.bool))
        seen.add(tuple(orders[0].int().argmax(1).tolist()))
    assert len(seen) == 4
    assert difference(base, write(base, tmp_path / "out", method=method, ratio=0.0, compat="official")) <= 1e-4


def test_official_router_is_uniform(tiny) -> None:
    rows = torch.cat([t for n, t in plan(tiny("llama"), compat="official", method="drop", experts=64).items() if n.endswith(ROUTER)])
    assert rows.min() >= 0 and rows.max() < 1 and abs(rows.mean() - 0.5) < 0.02


# ---- Branch-Train-MiX ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_mixing_a_checkpoint_with_itself_is_plain_upcycling(copies: int, dtype: str, tiny) -> None:
    base = tiny("llama", dtype=dtype)
    assert same(plan(base, method="btx", others=[base] * copies), plan(base))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize(
    ("experts", "seeds", "owners"),
    [
        (4, (0, 1), (0, 0, 1, 1)),
        (2, (0, 1), (0, 1)),
        (3, (0, 1), (0, 0, 1)),
        (8, (0, 1, 2), (0, 0, 0, 1, 1, 1, 2, 2)),
        (8, (0, 1, 2, 3), (0, 0, 1, 1, 2, 2, 3, 3)),
    ],
)
def test_mix_averages_what_is_shared_and_deals_out_the_experts(experts: int, seeds: tuple, owners: tuple, family: str, tiny) -> None:
    bases = [tiny(family, seed=s) for s in seeds]
    result, each = plan(bases[0], method="btx", others=bases[1:], experts=experts), [others(plan(b)) for b in bases]
    assert others(result).keys() == each[0].keys()
    for name, tensor in others(result).items():
        assert torch.equal(tensor, (sum(t[name].double() for t in each) / len(each)).float()), name
        assert not torch.equal(tensor, each[0][name])
    for e, owner in enumerate(owners):
        for layer in range(2):
            assert all(torch.equal(a, b) for a, b in zip(expert(result, layer, e), dense(bases[owner], layer), strict=True))


def test_mix_is_stored_in_the_base_s_type(tiny) -> None:
    result = plan(tiny("llama"), method="btx", others=[tiny("llama", seed=1, dtype="bfloat16")])
    for a, b in zip(expert(result, 1, 3), dense(tiny("llama", seed=1, dtype="bfloat16"), 1), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


UNLIKE = {
    "vocabulary": {"vocab_size": 112},
    "width": {"hidden_size": 64, "head_dim": 8},
    "neurons": {"intermediate_size": 64},
    "key heads": {"num_key_value_heads": 4},
    "fewer layers": {"num_hidden_layers": 1},
    "more layers": {"num_hidden_layers": 3},
    "tied head": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "heads of another width": {"num_attention_heads": 2, "num_key_value_heads": 1},  # the same shapes, cut otherwise
    "activation": {"hidden_act": "gelu"},
    "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}


@pytest.mark.parametrize("unlike", UNLIKE)
def test_mix_refuses_an_unlike_checkpoint(unlike: str, tiny) -> None:
    with pytest.raises(UserError, match="vocabulary" if unlike == "vocabulary" else "mix"):
        plan(tiny("llama"), method="btx", others=[tiny("llama", seed=1, **UNLIKE[unlike])])


def test_mix_refuses_a_head_that_the_base_has_not(tiny) -> None:
    with pytest.raises(UserError, match="mix"):
        plan(tiny("llama", tie_word_embeddings=True), method="btx", others=[tiny("llama", seed=1)])


def test_mix_refuses_a_mixture(tiny) -> None:
    with pytest.raises(UserError, match="mix"):
        plan(tiny("llama"), method="btx", others=[tiny("mixtral")])


def test_mix_refuses_other_words_under_the_same_ids(stories: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(stories, other)
    other.chmod(0o755)
    tokenizer = json.loads((stories / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    a, b = list(words)[400:402]
    words[a], words[b] = words[b], words[a]
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="another vocabulary"):
        plan(stories, method="btx", others=[other])


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"method": "btx"}, "needs 'others'"),
        ({"others": ["BASE"]}, "'others' is for method=btx"),
        ({"method": "btx", "others": ["BASE"] * 2, "experts": 2}, "3 checkpoints do not fit into 2 experts"),
        ({"method": "btx", "others": ["/no/such/folder"]}, "no folder at /no/such/folder"),
    ],
)
def test_mix_refuses_what_makes_no_mixture(knobs: dict, reason: str, tiny) -> None:
    knobs = knobs | {"others": [o.replace("BASE", str(tiny("llama"))) for o in knobs.get("others", [])]}
    with pytest.raises(UserError) as caught:
        plan(tiny("llama"), **knobs)
    assert reason in str(caught.value)


# ---- determinism -----------------------------------------------------------------------------------------------------
def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes() + (folder / "config.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("method", ["sparse", "noise", "drop"])
def test_same_seed_gives_the_same_bytes_whatever_ran_before_and_however_the_source_is_sharded(method: str, tiny, tmp_path: Path) -> None:
    first = digest(write(tiny("llama"), tmp_path / "a", seed=3, method=method))
    torch.manual_seed(99)
    torch.randn(7)
    assert digest(write(tiny("llama"), tmp_path / "b", seed=3, method=method)) == first
    sharded = tiny("llama", shard="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert digest(write(sharded, tmp_path / "c", seed=3, method=method)) == first
    assert digest(write(tiny("llama"), tmp_path / "d", seed=4, method=method)) != first


@pytest.mark.parametrize(
    "knobs",
    [{}, {"method": "drop"}, {"method": "drop", "ratio": 1.0}, {"method": "noise", "ratio": 1.0}],
    ids=["sparse", "drop", "drop all", "noise all"],
)
def test_another_seed_draws_anew_and_copies_alike(knobs: dict, tiny) -> None:
    a, b = (plan(tiny("llama"), seed=s, **knobs) for s in (0, 1))
    assert same(others(a), others(b))
    for layer in range(2):
        assert not torch.equal(a[f"model.layers.{layer}.{ROUTER}"], b[f"model.layers.{layer}.{ROUTER}"])
        for e in range(4):
            for one, two in zip(expert(a, layer, e), expert(b, layer, e), strict=True):
                changed = float((one != two).float().mean())
                assert changed == 0 if not knobs else changed > (0.99 if knobs.get("ratio") == 1.0 else 0.4)


def test_run_writes_the_same_weights_twice(tiny, tmp_path: Path) -> None:
    made = [modelwright.run("reshape.upcycle", base=tiny("llama"), to=tmp_path / n, method="drop", experts=4, seed=5).to for n in "ab"]
    assert digest(made[0]) == digest(made[1]) == digest(write(tiny("llama"), tmp_path / "c", seed=5, method="drop"))
