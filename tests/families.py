"""Tiny random models of every family that the kernel understands."""

from typing import Any

import torch
import transformers as T

_WIDE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = {**_WIDE, "num_key_value_heads": 2}
_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (T.LlamaConfig, T.LlamaForCausalLM, _GQA),
    "mistral": (T.MistralConfig, T.MistralForCausalLM, {**_GQA, "sliding_window": None}),
    "qwen2": (T.Qwen2Config, T.Qwen2ForCausalLM, _GQA),
    "qwen3": (T.Qwen3Config, T.Qwen3ForCausalLM, {**_GQA, "head_dim": 8}),
    "granite": (
        T.GraniteConfig,
        T.GraniteForCausalLM,
        {**_GQA, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ),
    "gemma": (T.GemmaConfig, T.GemmaForCausalLM, {**_GQA, "head_dim": 8}),
    "gemma2": (T.Gemma2Config, T.Gemma2ForCausalLM, {**_GQA, "head_dim": 8}),
    "gemma3": (T.Gemma3TextConfig, T.Gemma3ForCausalLM, {**_GQA, "head_dim": 8}),
    "phi3": (T.Phi3Config, T.Phi3ForCausalLM, {**_GQA, "sliding_window": None}),
    "gpt2": (
        T.GPT2Config,
        T.GPT2LMHeadModel,
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": (T.GPTNeoXConfig, T.GPTNeoXForCausalLM, _WIDE),
    "opt": (
        T.OPTConfig,
        T.OPTForCausalLM,
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 64,
        },
    ),
    "t5": (T.T5Config, T.T5ForConditionalGeneration, _T5),
    "t5_v1_1": (T.T5Config, T.T5ForConditionalGeneration, {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bert": (T.BertConfig, T.BertForMaskedLM, _WIDE),
    "mixtral": (T.MixtralConfig, T.MixtralForCausalLM, {**_GQA, "num_local_experts": 4}),
    "qwen2_moe": (
        T.Qwen2MoeConfig,
        T.Qwen2MoeForCausalLM,
        {**_GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": (
        T.Qwen3MoeConfig,
        T.Qwen3MoeForCausalLM,
        {**_GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8, "norm_topk_prob": True},
    ),
    "olmoe": (T.OlmoeConfig, T.OlmoeForCausalLM, {**_GQA, "num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": (T.GraniteMoeConfig, T.GraniteMoeForCausalLM, {**_GQA, "num_local_experts": 4}),
    "granitemoeshared": (
        T.GraniteMoeSharedConfig,
        T.GraniteMoeSharedForCausalLM,
        {**_GQA, "num_local_experts": 4, "shared_intermediate_size": 16},
    ),
}


def model_of(kind: str, *, seed: int = 0, dtype: str = "float32", device: str | None = None, **changes: Any) -> Any:
    """A random model with weights large enough that a wrong one shows in the logits. `device='meta'` gives names and shapes only."""
    config_class, model_class, values = FAMILIES[kind]
    config = config_class(**{**values, **changes})
    if device == "meta":
        with torch.device("meta"):
            return model_class(config)
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.15 if p.dim() > 1 else 0.1) + (1.0 if "norm" in name.lower() or "ln_" in name else 0.0))
    return model.to(getattr(torch, dtype)).eval()


def sigmoid_moe() -> Any:
    """A GLM-4-MoE, whose routers score by a sigmoid and have a bias of the selection, initialised as transformers does."""
    torch.manual_seed(0)
    experts = {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 0}
    return T.Glm4MoeForCausalLM(T.Glm4MoeConfig(**{**_GQA, **experts, "head_dim": 8, "n_shared_experts": 1}))
