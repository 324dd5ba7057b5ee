"""Growing keeps the function where it promises to, copies bit for bit where it copies, and what comes out is a stock model."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import modelwright
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.certificate import logits_of
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import write_tensors
from modelwright.reshape.grow import Knobs, grow

Tiny = Callable[..., Path]
WIDE = ["llama", "qwen2", "qwen3", "phi3", "gpt2"]
DEEP = ["llama", "qwen3", "gpt2", "gpt_neox", "opt", "gemma2", "mixtral"]
IDS = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))


def plan(base: Path, seed: int = 0, **knobs: Any) -> dict[str, Tensor]:
    """Every tensor of the result, from the stream (nothing is written)."""
    made, _ = grow(Checkpoint(base), Knobs(**knobs), seed)
    return dict(made.stream())


def write(base: Path, to: Path, seed: int = 0, **knobs: Any) -> tuple[Path, str]:
    """The result on disk, and its promise."""
    made, promise = grow(Checkpoint(base), Knobs(**knobs), seed)
    to.mkdir()
    write_tensors(made, to, 10**9)
    return to, promise


def tensors(base: Path) -> dict[str, Tensor]:
    source = Checkpoint(base)
    return {n: source.get(n) for n in source.table}


def difference(a: Path, b: Path) -> float:
    return float((logits_of(Checkpoint(a).model(torch.float32), IDS) - logits_of(Checkpoint(b).model(torch.float32), IDS)).abs().max())


# ---- depth -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gemma3", "mixtral"])
def test_stack_repeats_the_blocks_bit_for_bit_and_keeps_the_rest(kind: str, tiny: Tiny) -> None:
    from modelwright.reshape.growth.depth import block_of, rename

    base = tiny(kind)
    old, new = tensors(base), plan(base, depth=3)
    assert {rename(n, block_of(n) % 2) if block_of(n) is not None else n for n in new} == set(old)
    for name, tensor in new.items():
        block = block_of(name)
        source = old[name if block is None else rename(name, block % 2)]
        assert tensor.dtype == source.dtype and torch.equal(tensor, source), name


def test_interpolate_keeps_the_copies_of_a_block_together(tiny: Tiny) -> None:
    old, new = tensors(tiny("llama")), plan(tiny("llama"), operator="interpolate", depth=2)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert all(torch.equal(new[name.format(i)], old[name.format(i // 2)]) for i in range(4))


@pytest.mark.parametrize(
    ("kind", "operator"), [*((k, "zero") for k in DEEP), ("llama", "net2net"), ("gpt2", "net2net"), ("mixtral", "net2net")]
)
def test_silent_blocks_keep_the_logits_to_the_last_bit(kind: str, operator: str, tiny: Tiny, tmp_path: Path) -> None:
    to, promise = write(tiny(kind), tmp_path / "out", operator=operator, depth=2)
    assert promise == "same function"
    assert difference(tiny(kind), to) == 0.0


def test_silent_blocks_keep_the_gradients_of_the_old_weights(tiny: Tiny, tmp_path: Path) -> None:
    to, _ = write(tiny("qwen3"), tmp_path / "out", operator="zero", depth=2)
    small, large = Checkpoint(tiny("qwen3")).model(), Checkpoint(to).model()
    for model in (small, large):
        model(IDS, labels=IDS).loss.backward()
    for i in range(2):
        for (name, p), q in zip(small.model.layers[i].named_parameters(), large.model.layers[2 * i].parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name
    assert large.model.layers[1].mlp.down_proj.weight.grad.abs().sum() > 0, "a silent block learns from the first step on"


def test_identity_blocks_of_net2net_are_new_and_those_of_zero_are_copies(tiny: Tiny) -> None:
    name = "model.layers.{}.self_attn.q_proj.weight"
    zero, fresh = (plan(tiny("llama"), operator=o, depth=2) for o in ("zero", "net2net"))
    assert torch.equal(zero[name.format(1)], zero[name.format(0)])
    assert not torch.equal(fresh[name.format(1)], fresh[name.format(0)])
    assert not torch.equal(fresh[name.format(1)], fresh[name.format(3)])


def test_number_of_parameters_is_that_of_the_blocks_times_the_factor(tiny: Tiny, tmp_path: Path) -> None:
    to, _ = write(tiny("qwen2"), tmp_path / "out", depth=3)
    small, large = (Anatomy(Checkpoint(f).skeleton) for f in (tiny("qwen2"), to))
    in_blocks = sum(p.size for p in small if p.layer is not None)
    assert large.total() == small.total() + 2 * in_blocks


def test_layer_types_go_along_with_their_block(tiny: Tiny) -> None:
    types = ["sliding_attention", "full_attention", "full_attention"]
    base = tiny("gemma2", num_hidden_layers=3, layer_types=types, sliding_window=4)
    stacked, _ = grow(Checkpoint(base), Knobs(depth=2))
    silent, _ = grow(Checkpoint(base), Knobs(operator="zero", depth=2))
    assert stacked.config["layer_types"] == types * 2
    assert silent.config["layer_types"] == [t for t in types for _ in range(2)]


def test_silent_blocks_keep_the_function_where_windows_slide(tiny: Tiny, tmp_path: Path) -> None:
    base = tiny("gemma2", num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "full_attention"], sliding_window=4)
    assert difference(base, write(base, tmp_path / "out", operator="zero", depth=2)[0]) == 0.0


# ---- width -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "operator"),
    [*((k, o) for k in WIDE for o in ("net2net", "zero")), ("llama", "stack"), ("qwen2", "interpolate"), ("gpt2", "interpolate")],
)
def test_width_keeps_the_logits(kind: str, operator: str, tiny: Tiny, tmp_path: Path) -> None:
    to, promise = write(tiny(kind), tmp_path / "out", operator=operator, depth=1, hidden=96)
    assert promise == "same function"
    assert difference(tiny(kind), to) < 1e-5
    c = Checkpoint(to).hf_config
    assert (c.hidden_size, c.num_attention_heads) == (96, 12)


@pytest.mark.parametrize("operator", ["net2net", "zero"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_width_and_depth_keep_the_logits_whether_or_not_the_head_is_tied(
    kind: str, tied: bool, operator: str, tiny: Tiny, tmp_path: Path
) -> None:
    base = tiny(kind, tie_word_embeddings=tied)
    to, promise = write(base, tmp_path / "out", operator=operator, depth=2, hidden=64)
    assert promise == "same function" and difference(base, to) < 1e-5
    model = Checkpoint(to).model()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("operator", ["net2net", "interpolate", "zero"])
@pytest.mark.parametrize("kind", ["qwen2", "phi3"])
def test_heads_and_neurons_grow_alone(kind: str, operator: str, tiny: Tiny, tmp_path: Path) -> None:
    """70 neurons from 48: some have two copies and some have one. Heads keep their width of 8."""
    to, _ = write(tiny(kind), tmp_path / "out", operator=operator, depth=1, heads=8, ffn=70)
    assert difference(tiny(kind), to) < 1e-5
    c = Checkpoint(to).hf_config
    assert (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.intermediate_size, c.head_dim) == (32, 8, 4, 70, 8)


def test_zero_width_of_any_size_keeps_the_logits(tiny: Tiny, tmp_path: Path) -> None:
    assert difference(tiny("llama"), write(tiny("llama"), tmp_path / "out", operator="zero", depth=1, hidden=48)[0]) < 1e-5


def test_zero_width_keeps_the_logits_where_the_epsilon_matters(tiny: Tiny, tmp_path: Path) -> None:
    base = tiny("llama", rms_norm_eps=1e-2)
    to, _ = write(base, tmp_path / "out", operator="zero", depth=1, hidden=64)
    assert difference(base, to) < 1e-5
    assert Checkpoint(to).hf_config.rms_norm_eps == pytest.approx(5e-3)


@pytest.mark.parametrize(("operator", "hidden"), [("net2net", 64), ("net2net", 128), ("zero", 128)])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_sixteen_bit_weights_keep_the_logits_where_factors_are_powers_of_two(
    kind: str, operator: str, hidden: int, tiny: Tiny, tmp_path: Path
) -> None:
    base = tiny(kind, dtype="bfloat16")
    to, promise = write(base, tmp_path / "out", operator=operator, depth=2, hidden=hidden)
    assert promise == "same function" and difference(base, to) < 1e-5
    assert {Checkpoint(to).dtype(n) for n in Checkpoint(to).table} == {torch.bfloat16}


@pytest.mark.parametrize(("operator", "hidden"), [("net2net", 96), ("zero", 64)])
def test_sixteen_bit_weights_promise_nothing_where_factors_are_rounded(operator: str, hidden: int, tiny: Tiny) -> None:
    made, promise = grow(Checkpoint(tiny("llama", dtype="bfloat16")), Knobs(operator=operator, depth=1, hidden=hidden))
    assert promise == "changed function" and "rounding" in made.facts["note"]


def test_copies_are_told_apart_by_noise_and_only_by_it(tiny: Tiny, tmp_path: Path) -> None:
    """Without noise two copies of a neuron have the same gradient, so training would never part them."""
    gradient = {}
    for noise in (0.0, 0.01):
        to, _ = write(tiny("llama"), tmp_path / f"{noise}", operator="net2net", depth=1, hidden=64, noise=noise)
        model = Checkpoint(to).model()
        model(IDS, labels=IDS).loss.backward()
        one, two = model.model.layers[0].mlp.gate_proj.weight.grad.split(48)
        gradient[noise] = float((one - two).norm() / one.norm())
    assert gradient[0.0] < 1e-4 < 1e-3 < gradient[0.01]


def test_bytes_do_not_depend_on_the_shards_of_the_source(tiny: Tiny, tmp_path: Path) -> None:
    whole, cut = (write(tiny("qwen2", shard=s), tmp_path / s, operator="net2net", depth=2, hidden=64)[0] for s in ("5GB", "20KB"))
    assert len(list(tiny("qwen2", shard="20KB").glob("*.safetensors"))) > 2
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()


def test_checkpoint_saved_without_the_prefix_of_its_body_grows_too(tiny: Tiny, tmp_path: Path) -> None:
    """As GPT-2's are on the hub."""
    model = Checkpoint(tiny("gpt2")).model()
    model.transformer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert "h.0.ln_1.weight" in Checkpoint(tmp_path / "base")
    to, _ = write(tmp_path / "base", tmp_path / "out", operator="zero", depth=2, hidden=64)
    assert difference(tiny("gpt2"), to) < 1e-5


def test_growing_again_names_the_blocks_of_the_last_time(tiny: Tiny, tmp_path: Path) -> None:
    to, _ = write(tiny("llama"), tmp_path / "one", operator="zero", depth=2)
    assert Checkpoint(to).config["grown_blocks"] == [1, 3]
    assert grow(Checkpoint(to), Knobs(operator="zero", order=[0, 1, 2, 3, 3]))[0].config["grown_blocks"] == [4]
    assert "grown_blocks" not in grow(Checkpoint(to), Knobs(depth=1, hidden=64))[0].config


# ---- what comes out --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "changes", "knobs"),
    [
        ("llama", {}, {"operator": "net2net", "hidden": 64}),
        ("gpt2", {}, {"operator": "zero", "hidden": 64}),
        ("gemma2", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}, {}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_generate_equals_step_by_step_decoding_after_growing(kind: str, changes: dict, knobs: dict, tiny: Tiny, tmp_path: Path) -> None:
    base = tiny(kind, **changes, eos_token_id=None, pad_token_id=0)
    model = Checkpoint(write(base, tmp_path / "out", depth=2, **knobs)[0]).model().eval()
    ids = IDS[:, :8]
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(IDS[:, :8], max_new_tokens=8, do_sample=False), ids)


def test_run_proves_the_function_and_lists_the_new_blocks(tiny: Tiny, tmp_path: Path) -> None:
    result = modelwright.run("reshape.grow", base=tiny("qwen3"), to=tmp_path / "out", operator="zero", depth=2)
    assert result.certificate["passed"] is True and result.certificate["max_abs_dlogit"] == 0.0
    assert result.steps[0]["facts"]["new blocks"] == [1, 3]
    assert type(AutoModelForCausalLM.from_pretrained(result.to)).__module__.startswith("transformers.")


@pytest.mark.slow
def test_result_loads_where_modelwright_is_not_installed(tiny: Tiny, tmp_path: Path) -> None:
    to, _ = write(tiny("qwen2"), tmp_path / "out", operator="net2net", depth=2, hidden=64)
    code = (
        "import sys; sys.path = [p for p in sys.path if 'modelwright' not in p]\n"
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(to)!r})\n"
        "assert m.config.num_hidden_layers == 4 and 'modelwright' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "knobs", "words"),
    [
        ("llama", {"depth": 1}, ["nothing would grow"]),
        ("llama", {"depth": 0}, ["depth=0", "at least 1"]),
        ("llama", {"depth": 1, "hidden": 48}, ["hidden=48", "norms", "32 and 64", "operator=zero"]),
        ("llama", {"depth": 1, "operator": "zero", "hidden": 40}, ["hidden=40", "heads", "32 and 48"]),
        ("llama", {"depth": 1, "hidden": 16}, ["hidden=16 is smaller"]),
        ("llama", {"depth": 1, "heads": 7}, ["heads=7", "multiples of 2"]),
        ("llama", {"depth": 1, "ffn": 40}, ["ffn=40 is smaller"]),
        ("llama", {"order": [0, 1, 2]}, ["block 2", "0 to 1"]),
        ("llama", {"preset": "llama_pro"}, ["nothing would grow", "four blocks", "has 2"]),
        ("llama", {"preset": "solar"}, ["nothing would grow", "four blocks", "has 2"]),
        ("llama", {"preset": "solar", "order": [0, 1]}, ["preset=solar and order"]),
        ("gpt2", {"depth": 1, "heads": 8}, ["heads=8", "hidden=64"]),
        ("gemma2", {"depth": 1, "hidden": 64}, ["Gemma2", "wider"]),
        ("t5", {"depth": 2}, ["more than one stack"]),
        ("bert", {"operator": "zero", "depth": 2}, ["after the sum", "operator=stack"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_growth_that_cannot_be_is_refused_in_one_sentence(kind: str, knobs: dict, words: list[str], tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        modelwright.run("reshape.grow", base=tiny(kind), to=tmp_path / "out", **knobs)
    assert all(w in str(caught.value) for w in words), caught.value
    assert not list(tmp_path.iterdir())


def test_depth_that_breaks_a_pattern_of_blocks_is_refused(tiny: Tiny) -> None:
    """Every second block of this class is sparse, so three blocks twice would need a sparse block where it has a dense one."""
    base = tiny("qwen2_moe", num_hidden_layers=3, decoder_sparse_step=2)
    with pytest.raises(UserError, match="repeats the pattern"):
        grow(Checkpoint(base), Knobs(depth=2))
