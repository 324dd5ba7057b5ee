"""The role map: complete over all families, its views equal to what the models compute, its sizes equal to hand counts."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from families import FAMILIES, model_of
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.hooks import capture, patch

KINDS = list(FAMILIES)
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared"]
DENSE = [k for k in KINDS if k not in MIXTURES]
GATED = ["llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "gemma2", "gemma3", "phi3", "t5_v1_1"]
FUSED = {
    "phi3": "model.layers.0.self_attn.qkv_proj",
    "gpt2": "transformer.h.0.attn.c_attn",
    "gpt_neox": "gpt_neox.layers.0.attention.query_key_value",
}
ENCODERS = ("t5", "t5_v1_1", "bert")


def getter(model: nn.Module) -> Any:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return lambda name: parameters[name].detach()


def inputs(kind: str, rows: int, tokens: int) -> dict[str, Any]:
    ids = torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids} if kind.startswith("t5") else {} if kind == "bert" else {"use_cache": False}
    return {"input_ids": ids, **more}


# ---- roles -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [None, True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_exactly_one_role(kind: str, tied: bool | None) -> None:
    model = model_of(kind, device="meta", **({} if tied is None else {"tie_word_embeddings": tied}))
    anatomy = Anatomy(model)
    named = [n for p in anatomy for n in (p.name, *p.tied)]
    assert sorted(named) == sorted(n for n, _ in model.named_parameters(remove_duplicate=False))
    assert {p.name: p.shape for p in anatomy} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert all(p.role and p.name == name for name, p in anatomy.parts.items())


@pytest.mark.parametrize("tied", [None, True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_add_up_to_the_model_s_with_tied_ones_once(kind: str, tied: bool | None) -> None:
    model = model_of(kind, device="meta", **({} if tied is None else {"tie_word_embeddings": tied}))
    anatomy = Anatomy(model)
    assert sum(p.size for p in anatomy) == anatomy.total() == model.num_parameters()
    if tied is not None and not kind.startswith("t5"):  # T5's config ties whatever it is told
        assert any(p.role == "head" and p.kind == "weight" and len(p.shape) == 2 and p.shape[0] == 96 for p in anatomy) is not tied


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_parts_of_a_block_share_a_role(kind: str) -> None:
    anatomy = Anatomy(model_of(kind, device="meta"))
    within = {p.name for b in anatomy.blocks for p in b.parts.values()}
    assert within == {p.name for p in anatomy if p.layer is not None}
    assert sum(len(b.parts) for b in anatomy.blocks) == len(within)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_stand_in_their_stack_and_order(kind: str) -> None:
    anatomy = Anatomy(model_of(kind, device="meta"))
    stacks = [s for s in ("encoder", "decoder") if any(b.stack == s for b in anatomy.blocks)]
    assert stacks == (["encoder", "decoder"] if kind.startswith("t5") else ["encoder"] if kind == "bert" else ["decoder"])
    assert [(b.stack, b.index) for b in anatomy.blocks] == [(s, i) for s in stacks for i in range(2)]
    for b in anatomy.blocks:
        assert anatomy.block(b.index, b.stack) is b
        assert all(p.name.startswith(b.path + ".") for p in b.parts.values())


def test_layer_ten_is_not_layer_one() -> None:
    anatomy = Anatomy(model_of("llama", device="meta", num_hidden_layers=12))
    assert [b.index for b in anatomy.blocks] == list(range(12))
    assert anatomy.ffn(11).down.name == "model.layers.11.mlp.down_proj.weight"


def test_missing_block_is_refused() -> None:
    with pytest.raises(UserError, match="no block 2 in its decoder.*2 blocks"):
        Anatomy(model_of("llama", device="meta")).block(2)


@pytest.mark.parametrize(
    "kind, path, role",
    [
        ("llama", "model.layers.0.post_attention_layernorm", "norm.ffn"),
        ("gemma2", "model.layers.0.pre_feedforward_layernorm", "norm.ffn"),
        ("gemma2", "model.layers.0.post_attention_layernorm", "norm.attn_post"),
        ("gemma3", "model.layers.0.post_feedforward_layernorm", "norm.ffn_post"),
        ("opt", "model.decoder.layers.0.final_layer_norm", "norm.ffn"),
        ("opt", "model.decoder.final_layer_norm", "norm.final"),
        ("opt", "model.decoder.layers.0.self_attn_layer_norm", "norm.attn"),
        ("gpt_neox", "gpt_neox.final_layer_norm", "norm.final"),
        ("t5", "decoder.block.1.layer.1.layer_norm", "norm.cross"),
        ("t5", "decoder.block.1.layer.2.layer_norm", "norm.ffn"),
        ("t5", "encoder.block.1.layer.1.layer_norm", "norm.ffn"),
        ("t5", "encoder.final_layer_norm", "norm.final"),
        ("bert", "bert.encoder.layer.0.output.LayerNorm", "norm.ffn_post"),
        ("bert", "bert.encoder.layer.0.attention.output.LayerNorm", "norm.attn_post"),
        ("bert", "bert.encoder.layer.0.attention.output.dense", "attn.o"),
        ("bert", "bert.encoder.layer.0.output.dense", "ffn.down"),
        ("gpt2", "transformer.h.0.attn.c_proj", "attn.o"),
        ("gpt2", "transformer.h.0.mlp.c_proj", "ffn.down"),
        ("gpt2", "transformer.wpe", "position"),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.k", "cross.k"),
        ("opt", "model.decoder.project_in", "embed.in"),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate", "shared.router"),
        ("qwen2_moe", "model.layers.0.mlp.gate", "router"),
        ("granitemoe", "model.layers.0.block_sparse_moe.router", "router"),
        ("granitemoeshared", "model.layers.0.shared_mlp.input_linear", "shared.gate_up"),
    ],
)
def test_names_that_mean_different_things_in_different_families_are_told_apart(kind: str, path: str, role: str) -> None:
    assert Anatomy(model_of(kind, device="meta")).parts[path + ".weight"].role == role


# ---- feed-forward views ----------------------------------------------------------------------------------------------
def activation(kind: str, config: Any) -> Any:
    field = {
        "gemma2": "hidden_activation",
        "gemma3": "hidden_activation",
        "gpt2": "activation_function",
        "opt": "activation_function",
        "t5": "dense_act_fn",
        "t5_v1_1": "dense_act_fn",
    }.get(kind, "hidden_act")
    return ACT2FN[getattr(config, field)]


def real_ffn(kind: str, block: Any) -> Any:
    """The block's feed-forward computation by the model's own modules."""
    m = block.module
    if kind == "opt":
        return lambda x: m.fc2(m.activation_fn(m.fc1(x)))
    if kind == "bert":
        return lambda x: m.output.dense(m.intermediate(x))
    return block.feed_forward


@pytest.mark.parametrize("kind", DENSE)
def test_ffn_views_reproduce_the_block_s_own_feed_forward(kind: str) -> None:
    model = model_of(kind)
    anatomy, get, act = Anatomy(model), getter(model), activation(kind, model.config)
    width = 4 * 32 if kind == "gpt2" else 48
    x = torch.randn(2, 5, 32)
    for b in anatomy.blocks:
        ffn = anatomy.ffn(b)
        up, down = ffn.up.read(get), ffn.down.read(get)
        assert up.shape == (width, 32) and down.shape == (32, width)
        bias = {n: v.read(get) if (v := getattr(ffn, n)) else None for n in ("up_bias", "gate_bias", "down_bias")}
        if ffn.gate:
            assert ffn.gate.read(get).shape == (width, 32)
            inner = act(F.linear(x, ffn.gate.read(get), bias["gate_bias"])) * F.linear(x, up, bias["up_bias"])
        else:
            inner = act(F.linear(x, up, bias["up_bias"]))
        with torch.no_grad():
            torch.testing.assert_close(F.linear(inner, down, bias["down_bias"]), real_ffn(kind, b)(x))


@pytest.mark.parametrize("kind", DENSE)
def test_gates_and_biases_are_found_exactly_where_they_are(kind: str) -> None:
    anatomy = Anatomy(model_of(kind, device="meta"))
    biased = kind in ("gpt2", "gpt_neox", "opt", "bert")
    for b in anatomy.blocks:
        ffn = anatomy.ffn(b)
        assert (ffn.gate is not None) == (kind in GATED)
        assert [v is not None for v in (ffn.up_bias, ffn.gate_bias, ffn.down_bias)] == [biased, False, biased]


def test_biases_of_a_gated_ffn_belong_to_their_own_matrix() -> None:
    ffn = Anatomy(model_of("llama", device="meta", mlp_bias=True)).ffn(0)
    assert [v and v.name.split(".")[-2] for v in (ffn.up_bias, ffn.gate_bias, ffn.down_bias)] == ["up_proj", "gate_proj", "down_proj"]


def test_views_share_memory_with_the_weight_where_they_can() -> None:
    model = model_of("phi3")
    view = Anatomy(model).ffn(0).up
    assert view.read(getter(model)).untyped_storage().data_ptr() == dict(model.named_parameters())[view.name].untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixture_has_no_dense_ffn_to_view(kind: str) -> None:
    anatomy = Anatomy(model_of(kind, device="meta"))
    with pytest.raises(UserError, match="mixture of experts already"):
        anatomy.ffn(0)
    assert (anatomy.experts, anatomy.top_k) == (4, 2)
    assert anatomy.block(0).parts["expert.down"].orientation == "experts"


def test_dense_layers_of_a_mixture_are_viewed_as_dense() -> None:
    anatomy = Anatomy(model_of("qwen2_moe", device="meta", mlp_only_layers=[0]))
    assert anatomy.ffn(0).up.name == "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(UserError, match=r"model\.layers\.1"):
        anatomy.ffn(1)


# ---- attention views -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_attention_views_give_what_the_model_attends_with(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token at position 0, where rotation is the identity: the q, k and v that reach the attention are the views' products."""
    model = model_of(kind)
    model.set_attn_implementation("eager")
    source = sys.modules[type(model).__module__]
    seen: dict[nn.Module, tuple[Tensor, ...]] = {}
    eager = source.eager_attention_forward

    def spy(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = eager(module, q, k, v, *args, **kwargs)
        seen[module] = (*(t.transpose(1, 2).flatten(2) for t in (q, k, v)), out.flatten(2))  # (B, 1, heads * head_dim)
        return out, weights

    monkeypatch.setattr(source, "eager_attention_forward", spy)
    anatomy, get = Anatomy(model), getter(model)
    modules = {b.attention: b for b in anatomy.blocks}
    came: dict[nn.Module, Tensor] = {}
    went: dict[nn.Module, Tensor] = {}
    with torch.no_grad(), capture(modules, came.__setitem__, "input"), capture(modules, went.__setitem__):
        model(**inputs(kind, 3, 1))
    assert len(modules) == len(anatomy.blocks) == len(came)
    for module, b in modules.items():
        views = anatomy.attention(b)
        q, k, v, out = next(values for m, values in seen.items() if m in set(module.modules()))
        for name, tensor in {"q": q / (8**-0.5 if kind == "opt" else 1), "k": k, "v": v}.items():  # OPT scales q beforehand
            if name == "v" or "norm.q" not in b.parts:
                bias = views[name + ".bias"].read(get) if name + ".bias" in views else None
                torch.testing.assert_close(F.linear(came[module], views[name].read(get), bias), tensor, msg=f"{b.path} {name}")
        if kind != "bert":  # whose module goes on with a residual and a norm
            bias = views["o.bias"].read(get) if "o.bias" in views else None
            torch.testing.assert_close(F.linear(out, views["o"].read(get), bias), went[module])


@pytest.mark.parametrize("kind", FUSED)
def test_fused_projections_are_split_as_the_model_reshapes_them(kind: str) -> None:
    changes = {"num_key_value_heads": 1} if kind == "phi3" else {}
    model = model_of(kind, **changes)
    fused = model.get_submodule(FUSED[kind])
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        qkv = fused(x)
    if kind == "phi3":  # q of all heads, then k, then v of the groups
        parts = qkv[..., :32], qkv[..., 32:40], qkv[..., 40:]
    elif kind == "gpt2":  # thirds
        parts = qkv.split(32, dim=2)
    else:  # q, k and v of head 0, then of head 1 ...
        parts = tuple(p.transpose(1, 2).flatten(2) for p in qkv.view(2, 5, 4, 3 * 8).transpose(1, 2).chunk(3, dim=-1))
    views, get = Anatomy(model).attention(0), getter(model)
    for name, expected in zip("qkv", parts, strict=True):
        bias = views[name + ".bias"].read(get) if name + ".bias" in views else None
        torch.testing.assert_close(F.linear(x, views[name].read(get), bias), expected)


@pytest.mark.parametrize("kind", FUSED)
def test_fused_rows_cover_the_weight_once(kind: str) -> None:
    part = Anatomy(model_of(kind, device="meta")).block(0).parts["attn.qkv"]
    taken = [i for slices in part.rows.values() for s in slices for i in range(s.start, s.stop)]
    assert sorted(taken) == list(range(part.shape[1] if kind == "gpt2" else part.shape[0]))


@pytest.mark.parametrize("multi_query", [True, False])
def test_fused_attention_of_another_layout_is_read_right_or_refused(multi_query: bool) -> None:
    """GPT-BigCode names its projection as GPT-2 does and lays it out differently."""
    config = transformers.GPTBigCodeConfig(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64, multi_query=multi_query)
    model = transformers.GPTBigCodeForCausalLM(config)
    try:
        views = Anatomy(model).attention(0)
    except UserError:
        return
    fused = model.transformer.h[0].attn.c_attn.weight.detach()
    if multi_query:
        q, k, v = fused.split((32, 8, 8))
    else:
        q, k, v = (p.flatten(0, 1) for p in fused.view(4, 24, 32).split(8, dim=1))
    for name, expected in zip("qkv", (q, k, v), strict=True):
        assert torch.equal(views[name].read(getter(model)), expected)


# ---- sizes -----------------------------------------------------------------------------------------------------------
V, D, LAYERS, HEADS, GROUPS, HEAD = 96, 32, 2, 4, 2, 8
ATTENTION = 2 * D * HEADS * HEAD + 2 * D * GROUPS * HEAD  # q, o and k, v


@pytest.mark.parametrize("experts, top_k", [(4, 2), (5, 3), (8, 1)])
def test_mixtral_total_and_active_by_hand(experts: int, top_k: int) -> None:
    anatomy = Anatomy(model_of("mixtral", device="meta", num_local_experts=experts, num_experts_per_tok=top_k))
    expert, norms = 3 * D * 48, 2 * D
    outside = 2 * V * D + D + LAYERS * (ATTENTION + norms + experts * D)  # embeddings, head, last norm; router
    assert anatomy.total() == outside + LAYERS * experts * expert
    assert anatomy.active() == outside + LAYERS * top_k * expert


@pytest.mark.parametrize("dense_layers", [[], [0]])
def test_qwen2_moe_total_and_active_by_hand(dense_layers: list[int]) -> None:
    anatomy = Anatomy(model_of("qwen2_moe", device="meta", num_experts=6, num_experts_per_tok=4, mlp_only_layers=dense_layers))
    biases = (HEADS + 2 * GROUPS) * HEAD
    outside = 2 * V * D + D + LAYERS * (ATTENTION + biases + 2 * D) + len(dense_layers) * 3 * D * 48
    sparse = LAYERS - len(dense_layers)
    common = 6 * D + 3 * D * 16 + D  # router, shared expert, its gate
    assert anatomy.total() == outside + sparse * (common + 6 * 3 * D * 24)
    assert anatomy.active() == outside + sparse * (common + 4 * 3 * D * 24)


@pytest.mark.parametrize("kind", DENSE)
def test_dense_model_is_active_as_a_whole(kind: str) -> None:
    anatomy = Anatomy(model_of(kind, device="meta"))
    assert anatomy.active() == anatomy.total() and anatomy.experts == anatomy.top_k == 0


@pytest.mark.parametrize("context", [1, 64])
@pytest.mark.parametrize("tied", [True, False])
def test_llama_flops_per_token_by_hand(context: int, tied: bool) -> None:
    anatomy = Anatomy(model_of("llama", device="meta", tie_word_embeddings=tied))
    assert anatomy.flops_per_token(context) == 2 * (V * D + LAYERS * (ATTENTION + 3 * D * 48)) + LAYERS * 4 * context * HEADS * HEAD


def test_mixtral_flops_per_token_by_hand() -> None:
    anatomy = Anatomy(model_of("mixtral", device="meta", num_local_experts=5, num_experts_per_tok=3))
    assert anatomy.flops_per_token(10) == 2 * (V * D + LAYERS * (ATTENTION + 5 * D + 3 * 3 * D * 48)) + LAYERS * 4 * 10 * HEADS * HEAD


@pytest.mark.parametrize("kind", KINDS)
def test_flops_per_token_are_what_torch_counts(kind: str) -> None:
    """All `context` tokens at once, none masked away from the product: torch counts `context` times one token's FLOPs."""
    model = model_of(kind)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs(kind, 1, 6))
    assert 6 * Anatomy(model).flops_per_token(6) == counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_tying_the_embeddings_does_not_change_the_flops(kind: str) -> None:
    tied, untied = (Anatomy(model_of(kind, device="meta", tie_word_embeddings=t)).flops_per_token(8) for t in (True, False))
    assert tied == untied


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("groups, size", [(1, 2), (2, 2), (4, 4)])
def test_kv_bytes_per_token_by_hand(kind: str, groups: int, size: int) -> None:
    anatomy = Anatomy(model_of(kind, device="meta", num_key_value_heads=groups))
    assert anatomy.kv_bytes_per_token(size) == LAYERS * 2 * groups * HEAD * size


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ENCODERS])
def test_kv_bytes_per_token_are_what_the_cache_holds(kind: str) -> None:
    model = model_of(kind)
    with torch.no_grad():
        cache = model(**inputs(kind, 1, 5) | {"use_cache": True}).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert 5 * Anatomy(model).kv_bytes_per_token(4) == held


def test_encoder_has_no_cache() -> None:
    assert Anatomy(model_of("bert", device="meta")).kv_bytes_per_token(2) == 0


# ---- what is not understood ------------------------------------------------------------------------------------------
def wobble(layer: Any, model: Any) -> None:
    layer.register_parameter("wobble", nn.Parameter(torch.zeros(3, 5, device="meta")))


def no_ffn(layer: Any, model: Any) -> None:
    del layer.mlp


def no_down(layer: Any, model: Any) -> None:
    del layer.mlp.down_proj


def no_attention(layer: Any, model: Any) -> None:
    del layer.self_attn


def no_values(layer: Any, model: Any) -> None:
    del layer.self_attn.v_proj


def misfit(layer: Any, model: Any) -> None:
    layer.mlp.down_proj = nn.Linear(47, 32, bias=False, device="meta")


def no_blocks(layer: Any, model: Any) -> None:
    del model.model.layers


@pytest.mark.parametrize(
    "change, words",
    [
        (wobble, (r"LlamaForCausalLM", r"model\.layers\.1\.wobble", r"\(3, 5\)")),
        (no_ffn, ("feed-forward", r"model\.layers\.1 was not found")),
        (no_down, ("feed-forward", r"model\.layers\.1 was not found")),
        (no_attention, ("attention", r"model\.layers\.1 was not found")),
        (no_values, ("attention", r"model\.layers\.1 was not found")),
        (misfit, (r"model\.layers\.1", "48", "47")),
        (no_blocks, ("LlamaForCausalLM", "no blocks")),
    ],
)
def test_unknown_architecture_names_what_was_not_found(change: Any, words: tuple[str, ...]) -> None:
    model = model_of("llama", device="meta")
    change(model.model.layers[1], model)
    with pytest.raises(UserError) as caught:
        Anatomy(model)
    for word in words:
        caught.match(word)


def test_unknown_router_is_refused() -> None:
    model = model_of("mixtral", device="meta")
    del model.model.layers[0].mlp.gate
    with pytest.raises(UserError, match=r"feed-forward part of model\.layers\.0 was not found"):
        Anatomy(model)


# ---- hooks -----------------------------------------------------------------------------------------------------------
def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def llama() -> Any:
    return model_of("llama")


@pytest.mark.parametrize("side", ["input", "output"])
def test_capture_is_undone_and_sees_every_pass(llama: Any, side: Any) -> None:
    seen: list[Tensor] = []
    modules = [b.feed_forward for b in Anatomy(llama).blocks]
    with capture(modules, lambda m, t: seen.append(t), side):
        llama(**inputs("llama", 2, 5))
        assert [t.shape for t in seen] == [(2, 5, 32)] * 2 and not any(t.requires_grad for t in seen)
        llama(**inputs("llama", 2, 5))
    assert len(seen) == 4 and hooks(llama) == 0
    llama(**inputs("llama", 2, 5))
    assert len(seen) == 4


def test_capture_does_not_change_the_function(llama: Any) -> None:
    with torch.no_grad():
        plain = llama(**inputs("llama", 2, 5)).logits
        with capture([llama.model.layers[0]], lambda m, t: t.mul(2)):
            assert torch.equal(llama(**inputs("llama", 2, 5)).logits, plain)


def test_patch_changes_the_output_and_is_undone(llama: Any) -> None:
    attention = llama.model.layers[0].self_attn  # gives a tuple
    with torch.no_grad():
        before = llama(**inputs("llama", 2, 5)).logits
        with patch(attention, lambda t: t * 0):
            silent = llama(**inputs("llama", 2, 5)).logits
            attention.o_proj.weight.mul_(3)  # of no effect while the output is replaced
            assert torch.equal(llama(**inputs("llama", 2, 5)).logits, silent)
            attention.o_proj.weight.div_(3)
        assert not torch.allclose(silent, before)
        torch.testing.assert_close(llama(**inputs("llama", 2, 5)).logits, before)
    assert hooks(llama) == 0


class Stop(Exception):
    pass


def stop(*args: Any) -> Any:
    raise Stop


@pytest.mark.parametrize("where", ["visit", "block", "change"])
def test_hooks_are_undone_after_an_exception(llama: Any, where: str) -> None:
    layers = list(llama.model.layers)
    with pytest.raises(Stop):  # noqa: SIM117
        with capture(layers, stop if where == "visit" else lambda m, t: None), patch(layers[1], stop if where == "change" else lambda t: t):
            assert hooks(llama) == 3
            if where != "block":
                llama(**inputs("llama", 1, 3))
            raise Stop
    assert hooks(llama) == 0


def test_hooks_are_undone_when_capture_itself_fails(llama: Any) -> None:
    with pytest.raises(AttributeError), capture([llama.lm_head, None], lambda m, t: None):  # type: ignore[list-item]
        pass
    assert hooks(llama) == 0


def test_gpt_j_is_understood() -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    model = GPTJForCausalLM(GPTJConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4))
    anatomy = Anatomy(model)
    assert [anatomy.ffn(1).up.name, anatomy.ffn(1).down.name] == [f"transformer.h.1.mlp.fc_{end}.weight" for end in ("in", "out")]
    assert anatomy.attention(0).keys() == set("qkvo") and anatomy.total() == sum(p.numel() for p in model.parameters())
