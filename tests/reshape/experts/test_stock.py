"""The stock class chosen for a dense model computes the same logits, and what no class holds is refused with its reason."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification, LlamaModel

import modelwright
from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import write_tensors
from modelwright.reshape.upcycle import Knobs, upcycle

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
LONGROPE = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG}, "original_max_position_embeddings": 32}
WINDOW = {"sliding_window": 8}
MIXED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}  # layer 0 sees all, layer 1 the window
NARROW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
MIXTRAL, QWEN2, QWEN3 = "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"
GRANITE, SHARED = "GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"

# name -> family, config changes, target, class of the result
EXACT: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama": ("llama", {}, "auto", MIXTRAL),
    "llama theta 5e5": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "auto", MIXTRAL),
    "llama llama3 rope": ("llama", {"rope_parameters": LLAMA3}, "auto", MIXTRAL),
    "llama yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}},
        "auto",
        MIXTRAL,
    ),
    "llama dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "auto", MIXTRAL),
    "llama tied": ("llama", {"tie_word_embeddings": True}, "auto", MIXTRAL),
    "llama one key head": ("llama", {"num_key_value_heads": 1}, "auto", MIXTRAL),
    "llama all key heads": ("llama", {"num_key_value_heads": 4}, "auto", MIXTRAL),
    "llama wide heads": ("llama", {"head_dim": 16}, "auto", MIXTRAL),
    "llama gelu": ("llama", {"hidden_act": "gelu"}, "auto", MIXTRAL),
    "llama large epsilon": ("llama", {"rms_norm_eps": 1e-2}, "auto", MIXTRAL),
    "llama to qwen2_moe": ("llama", {}, "qwen2_moe", QWEN2),
    "llama tied to qwen2_moe": ("llama", {"tie_word_embeddings": True}, "qwen2_moe", QWEN2),
    "llama to granitemoe": ("llama", {}, "granitemoe", GRANITE),
    "llama to granitemoeshared": ("llama", {}, "granitemoeshared", SHARED),
    "llama wide heads to qwen2_moe": ("llama", {"head_dim": 16}, "qwen2_moe", QWEN2),
    "llama wide heads to granitemoe": ("llama", {"head_dim": 16}, "granitemoe", GRANITE),
    "llama wide heads to granitemoeshared": ("llama", {"head_dim": 16, "rope_parameters": LLAMA3}, "granitemoeshared", SHARED),
    "llama biases": ("llama", {"attention_bias": True}, "auto", GRANITE),
    "llama biases, all key heads": ("llama", {"attention_bias": True, "num_key_value_heads": 4}, "auto", GRANITE),
    "llama biases to granitemoeshared": ("llama", {"attention_bias": True}, "granitemoeshared", SHARED),
    "mistral": ("mistral", {}, "auto", MIXTRAL),
    "mistral window": ("mistral", WINDOW, "auto", MIXTRAL),
    "mistral window to qwen2_moe": ("mistral", WINDOW, "qwen2_moe", QWEN2),
    "mistral to qwen2_moe": ("mistral", {}, "qwen2_moe", QWEN2),
    "qwen2": ("qwen2", {}, "auto", QWEN2),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}, "auto", QWEN2),
    "qwen2 all key heads": ("qwen2", {"num_key_value_heads": 4}, "auto", QWEN2),
    "qwen2 window in one layer": ("qwen2", MIXED, "auto", QWEN2),
    "qwen2 window in every layer": ("qwen2", NARROW, "auto", QWEN2),
    "qwen2 window not used": ("qwen2", {"use_sliding_window": False, "sliding_window": 8}, "auto", QWEN2),
    "qwen3": ("qwen3", {}, "auto", QWEN3),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}, "auto", QWEN3),
    "qwen3 biases": ("qwen3", {"attention_bias": True}, "auto", QWEN3),
    "qwen3 window in every layer": ("qwen3", NARROW, "auto", QWEN3),
    "granite": ("granite", {}, "auto", GRANITE),
    "granite tied": ("granite", {"tie_word_embeddings": True}, "auto", GRANITE),
    "granite biases": ("granite", {"attention_bias": True}, "auto", GRANITE),
    "granite to granitemoeshared": ("granite", {}, "granitemoeshared", SHARED),
    "phi3": ("phi3", {}, "auto", MIXTRAL),
    "phi3 tied": ("phi3", {"tie_word_embeddings": True}, "auto", MIXTRAL),
    "phi3 all key heads": ("phi3", {"num_key_value_heads": 4}, "auto", MIXTRAL),
    "phi3 window": ("phi3", WINDOW, "auto", MIXTRAL),
    "phi3 longrope": ("phi3", LONGROPE, "auto", MIXTRAL),
    "phi3 to qwen2_moe": ("phi3", {}, "qwen2_moe", QWEN2),
}
# a setting of the result -> what it would be if it were lost: the probe must see each
LOST: dict[str, tuple[str, dict[str, Any]]] = {
    "theta": ("llama theta 5e5", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "rope scaling": ("llama llama3 rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "activation": ("llama gelu", {"hidden_act": "silu"}),
    "epsilon": ("llama large epsilon", {"rms_norm_eps": 1e-6}),
    "mistral's window": ("mistral window", {"sliding_window": None}),
    "qwen2's layer pattern": ("qwen2 window in one layer", {"layer_types": ["full_attention", "full_attention"]}),
    "qwen2's renormalised weights": ("qwen2", {"norm_topk_prob": False}),
    "qwen3's renormalised weights": ("qwen3", {"norm_topk_prob": False}),
    "phi3's long factors": ("phi3 longrope", {"rope_parameters": LONGROPE["rope_parameters"] | {"long_factor": LONG["short_factor"]}}),
    **{
        f"granite's {m}": ("granite", {m: 1.0})
        for m in ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
    },
}


def converted(base: Path, to: Path, **knobs: Any) -> Path:
    """The upcycled checkpoint, written without the runner: a wrong result reaches the test instead of a failed certificate."""
    made, _ = upcycle(Checkpoint(base), Knobs(**{"experts": 4, "top_k": 2, **knobs}))
    to.mkdir()
    write_tensors(made, to, 10**9)
    return to


def loaded(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


@torch.no_grad()
def difference(a: Any, b: Any) -> float:
    """The largest logit difference on a short sequence and on one beyond every window and original context."""
    worst = 0.0
    for length in (20, 96):
        ids = torch.randint(0, a.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(length))
        worst = max(worst, float((a(ids).logits - b(ids).logits).abs().max()))
    return worst


@pytest.mark.parametrize("case", EXACT)
def test_stock_class_keeps_the_logits(case: str, tiny, tmp_path: Path) -> None:
    family, changes, target, name = EXACT[case]
    base = tiny(family, **changes)
    model = loaded(converted(base, tmp_path / "out", target=target))
    assert type(model).__name__ == name
    assert difference(loaded(base), model) <= 1e-4


@pytest.mark.parametrize("lost", LOST)
def test_probe_sees_a_lost_setting(lost: str, tiny, tmp_path: Path) -> None:
    case, values = LOST[lost]
    family, changes, _, _ = EXACT[case]
    folder = converted(tiny(family, **changes), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    old_spelling = {"rope_theta", "rope_scaling"} if "rope_parameters" in values else set()  # transformers reads it first
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in old_spelling} | values))
    assert difference(loaded(tiny(family, **changes)), loaded(folder)) > 1e-3


@pytest.mark.parametrize(
    ("family", "changes", "gone", "old"),
    [
        (
            "llama",
            {},
            ["dtype", "head_dim"],
            {"rope_theta": 5e5, "torch_dtype": "float32", "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        ),
        ("mistral", {}, ["dtype", "head_dim"], {"rope_theta": 1e5, "sliding_window": 8}),
        ("qwen2", {}, ["layer_types"], {"rope_theta": 1e5, **MIXED}),
        ("phi3", {}, ["dtype"], {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 32}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_config_of_an_older_transformers_is_understood(family: str, changes: dict, gone: list, old: dict, tiny, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny(family, **changes), base)
    config = {k: v for k, v in json.loads((base / "config.json").read_text()).items() if k not in ["rope_parameters", *gone]}
    (base / "config.json").write_text(json.dumps(config | old))
    assert difference(loaded(base), loaded(tiny(family, **changes))) > 1e-3  # the old keys matter
    assert difference(loaded(base), loaded(converted(base, tmp_path / "out"))) <= 1e-4


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (3, 3), (8, 2)])
@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "granitemoe"])
def test_any_number_of_experts_keeps_the_logits(experts: int, top_k: int, target: str, tiny, tmp_path: Path) -> None:
    model = loaded(converted(tiny("llama"), tmp_path / "out", target=target, experts=experts, top_k=top_k, router_std=1.0))
    assert model.config.num_experts_per_tok == top_k
    assert {p.shape[0] for n, p in model.named_parameters() if ".experts." in n or "block_sparse_moe" in n and p.dim() == 3} == {experts}
    assert difference(loaded(tiny("llama")), model) <= 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "granite", "phi3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_copied_byte_for_byte(family: str, dtype: str, tiny, tmp_path: Path) -> None:
    base = tiny(family, dtype=dtype)
    folder = converted(base, tmp_path / "out")
    old, new = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {t.dtype for t in new.values()} == {getattr(torch, dtype)}
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    for name, tensor in old.items():
        layer = name.rpartition(".self_attn.")[0] or name.rpartition(".mlp.")[0]
        if "qkv_proj" in name:
            copies = [torch.cat([new[f"{layer}.self_attn.{p}_proj.weight"] for p in "qkv"])]
        elif ".mlp." not in name:
            copies = [new[name]]
        else:
            copies = [_expert(new, layer, e)[name.split(".")[-2]] for e in range(4)]
        for copy in copies:
            assert torch.equal(copy.contiguous().view(torch.int16), tensor.view(torch.int16)), name


def _expert(new: dict[str, torch.Tensor], layer: str, e: int) -> dict[str, torch.Tensor]:
    if (fused := new.get(f"{layer}.block_sparse_moe.input_linear.weight")) is not None:
        gate, up, down = *fused[e].chunk(2), new[f"{layer}.block_sparse_moe.output_linear.weight"][e]
    else:
        mixtral = f"{layer}.block_sparse_moe.gate.weight" in new
        at, names = ("block_sparse_moe", ("w1", "w3", "w2")) if mixtral else ("mlp", ("gate_proj", "up_proj", "down_proj"))
        gate, up, down = (new[f"{layer}.{at}.experts.{e}.{n}.weight"] for n in names)
    return {"gate_proj": gate, "up_proj": up, "down_proj": down, "gate_up_proj": torch.cat([gate, up])}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_the_logits(dtype: str, tiny, tmp_path: Path) -> None:
    base = tiny("llama", dtype=dtype)
    assert difference(loaded(base), loaded(converted(base, tmp_path / "out"))) <= 1e-4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
def test_tying_and_special_tokens_are_kept(tied: bool, family: str, tiny, tmp_path: Path) -> None:
    base = tiny(family, tie_word_embeddings=tied, bos_token_id=5, eos_token_id=[6, 7], pad_token_id=8)
    folder = converted(base, tmp_path / "out")
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    model = loaded(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (5, [6, 7], 8)


def test_stored_copy_of_a_tied_head_and_leftover_buffers_do_no_harm(tiny, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny("llama", tie_word_embeddings=True), base)
    tensors = load_file(base / "model.safetensors")
    tensors |= {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    folder = converted(base, tmp_path / "out")
    assert difference(loaded(tiny("llama", tie_word_embeddings=True)), loaded(folder)) <= 1e-4


PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}


@pytest.mark.parametrize(
    ("family", "changes", "knobs", "reason"),
    [
        ("gpt2", {}, {}, "because its feed-forward part has no gate and its experts would need biases"),
        ("opt", {}, {}, "because its feed-forward part has no gate"),
        ("gpt_neox", {}, {}, "because its feed-forward part has no gate"),
        ("bert", {}, {}, "has an encoder, because no stock"),
        ("t5", {}, {}, "has an encoder, because no stock"),
        ("t5_v1_1", {}, {}, "has an encoder, because no stock"),
        ("gemma2", {}, {}, "because it norms what attention or the feed-forward part gives"),
        ("gemma3", {}, {}, "because it norms what attention or the feed-forward part gives"),
        ("llama", {"mlp_bias": True}, {}, "because its feed-forward part has biases"),
        *[
            (f, {}, {}, "is a mixture of experts already")
            for f in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared")
        ],
        ("qwen3", MIXED, {}, "because it uses a sliding window together with q and k norms"),
        ("llama", PARTIAL, {}, "because it rotates only a share of 0.5 of each head"),
        ("phi3", {"partial_rotary_factor": 0.5}, {}, "because it rotates only a share of 0.5 of each head"),
        ("qwen2", {}, {"target": "mixtral"}, "does not hold this qwen2 model exactly, because exact are: qwen2_moe"),
        ("qwen3", {}, {"target": "qwen2_moe"}, "does not hold this qwen3 model exactly, because exact are: qwen3_moe"),
        ("granite", {}, {"target": "mixtral"}, "does not hold this granite model exactly, because exact are: granitemoe, granitemoeshared"),
        ("llama", {}, {"target": "qwen3_moe"}, "does not hold this llama model exactly"),
        (
            "llama",
            {"attention_bias": True},
            {"target": "qwen2_moe"},
            "does not hold this llama model exactly, because exact are: granitemoe",
        ),
        ("mistral", WINDOW, {"target": "granitemoe"}, "does not hold this mistral model exactly"),
        ("llama", {}, {"experts": 2, "top_k": 3}, "top_k=3 but there are 2 experts"),
        ("llama", {}, {"experts": 1, "top_k": 1}, "must be at least 2"),
    ],
    ids=lambda v: v if isinstance(v, str) and " " not in v else " ".join(v) if isinstance(v, dict) else "",
)
def test_refusal_says_why_and_leaves_nothing(family: str, changes: dict, knobs: dict, reason: str, tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        modelwright.run("reshape.upcycle", base=tiny(family, **changes), to=tmp_path / "out", **{"experts": 4, **knobs})
    assert reason in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model_class", [LlamaModel, LlamaForSequenceClassification])
def test_model_without_a_language_model_head_is_refused(model_class: Any, tiny, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(tiny("llama"))
    model_class(config).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="head"):
        upcycle(Checkpoint(tmp_path / "base"), Knobs(experts=4))


@pytest.mark.parametrize("certificate", ["auto", "structure"])
def test_quantised_checkpoint_is_refused(certificate: str, tiny, tmp_path: Path) -> None:
    """The scales lie in tensors of their own that no role covers: copying the quantised values alone would be another model."""
    base = tmp_path / "base"
    shutil.copytree(tiny("llama"), base)
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        tensors[name] = tensor
        if "proj" in name:
            scale = tensor.abs().max() / 448
            tensors |= {name: (tensor / scale).to(torch.float8_e4m3fn), name + "_scale_inv": scale.view(1, 1)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quanti"):
        modelwright.run("reshape.upcycle", base=base, to=tmp_path / "out", experts=4, save={"certificate": certificate})


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
def test_qwen2_moe_has_zero_biases_where_the_source_has_none(family: str, tiny, tmp_path: Path) -> None:
    """vLLM's class always has them, and what the folder lacks stays unset there without a word."""
    folder = converted(tiny(family, dtype="bfloat16"), tmp_path / "out", target="qwen2_moe")
    saved = load_file(folder / "model.safetensors")
    for layer in range(2):
        for name in "qkv":
            at = f"model.layers.{layer}.self_attn.{name}_proj"
            assert saved[f"{at}.bias"].shape == saved[f"{at}.weight"].shape[:1] and not saved[f"{at}.bias"].any()
            assert saved[f"{at}.bias"].dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["qkv_bias"] is True
