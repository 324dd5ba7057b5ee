"""Attention with decoupled heads (DHA, arXiv 2406.06567) as transformers models: "dha_llama", _mistral, _qwen2, _qwen3.

    import modelwright.models                          # registers the classes

Each layer has its own number of key heads and of value heads. config.json holds, for each layer, which key head (`dha_keys`) and which
value head (`dha_values`) each query head reads:

    head h: softmax(q_h . k[keys[h]] / sqrt(d)) v[values[h]]

Everything else is the stock class: names of the weights, rotary embeddings, norms of queries and keys, masks. The cache holds the heads
that are there, so it shrinks by what was fused; each head is repeated for its queries only when attention is computed. Any attention of
transformers works (sdpa, eager, flash), and so do DynamicCache, beams and sampling. vLLM assumes one number of heads for all layers and
cannot serve it: export with `export: gqa` for that.
"""

from importlib import import_module
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_SETTINGS = {"dha_keys": list[list[int]] | None, "dha_values": list[list[int]] | None}
CLASSES: dict[str, tuple[Any, Any]] = {}  # base model_type -> config class, model class


class _Heads:
    """Turns a stock attention into one whose key and value heads are mapped to query heads."""

    def __init__(self: Any, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.keys, self.values = config.dha_keys[layer_idx], config.dha_values[layer_idx]
        self.num_key_value_groups = 1  # each query head is given its own
        for name, heads in (("k_proj", self.keys), ("v_proj", self.values)):
            old = getattr(self, name)
            setattr(self, name, nn.Linear(old.in_features, (max(heads) + 1) * self.head_dim, bias=old.bias is not None))
        self._index: dict[tuple[str, torch.device], Tensor] = {}

    def _for_queries(self: Any, states: Tensor, which: str) -> Tensor:
        """Heads (B, K, T, d) repeated for their queries: (B, H, T, d)."""
        heads = getattr(self, which)
        if heads == list(range(states.shape[1])):
            return states
        key = (which, states.device)
        if key not in self._index:
            self._index[key] = torch.tensor(heads, device=states.device)
        return states.index_select(1, self._index[key])

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        stock = import_module(type(self).__mro__[2].__module__)
        shape = hidden_states.shape[:-1]
        q, k, v = (p(hidden_states).view(*shape, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, d)
        q, k = stock.apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, stock.eager_attention_forward)
        window = self.sliding_window if hasattr(self, "sliding_window") else getattr(self.config, "sliding_window", None)
        out, weights = attend(
            self,
            q,
            self._for_queries(k, "keys"),
            self._for_queries(v, "values"),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=window,
            **kwargs,
        )
        return self.o_proj(out.reshape(*shape, -1).contiguous()), weights


class _Dha:
    def __init__(self: Any, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        for i, layer in enumerate(self.model.layers):
            layer.self_attn = _attention(type(layer.self_attn))(config, i)


def _attention(stock: Any) -> Any:
    name = f"Dha{stock.__name__}"
    if name not in globals():
        globals()[name] = type(name, (_Heads, stock), {"__module__": __name__})
    return globals()[name]


class _Checked:
    """A config with a map for every layer; without one it is the stock model's."""

    def __post_init__(self: Any, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        heads, kv = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        for name in ("dha_keys", "dha_values"):
            plain = [[h * kv // heads for h in range(heads)] for _ in range(self.num_hidden_layers)]
            maps = getattr(self, name) or plain
            if len(maps) != self.num_hidden_layers or any(len(m) != heads or set(m) != set(range(max(m) + 1)) for m in maps):
                raise ValueError(f"{name} needs a head for each of {heads} query heads in each of {self.num_hidden_layers} layers")
            setattr(self, name, [list(m) for m in maps])


def _register(base: str) -> None:
    old: Any = getattr(transformers, base + "Config")
    kind = f"dha_{old.model_type}"
    body = {"model_type": kind, "__annotations__": dict(_SETTINGS), "__module__": __name__, "dha_keys": None, "dha_values": None}
    config = type(f"Dha{base}Config", (_Checked, old), body)
    name = f"Dha{base}ForCausalLM"
    stock: Any = getattr(transformers, base + "ForCausalLM")
    model: Any = type(name, (_Dha, stock), {"__annotations__": {"config": config}, "config_class": config, "__module__": __name__})
    globals().update({config.__name__: config, name: model})
    AutoConfig.register(kind, config)
    AutoModelForCausalLM.register(config, model)
    CLASSES[old.model_type] = config, model


for _base in ("Llama", "Mistral", "Qwen2", "Qwen3"):
    _register(_base)


def packed(model: Any, keys: list[list[int]], values: list[list[int]], fused: dict[str, Tensor]) -> Any:
    """A stock model as the class with these maps; `fused` holds the weights of its keys and values by name."""
    config_class, model_class = CLASSES[model.config.model_type]
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    settings |= {"dha_keys": keys, "dha_values": values}
    return _filled(model, model_class, config_class(**settings, architectures=[model_class.__name__]), fused)


def narrowed(model: Any, kv_heads: int, changed: dict[str, Tensor]) -> Any:
    """A stock model with fewer key and value heads; `changed` holds the weights of its attention by name."""
    settings = {k: v for k, v in model.config.to_dict().items() if k != "model_type"} | {"num_key_value_heads": kv_heads}
    return _filled(model, type(model), type(model.config)(**settings), changed)


def _filled(model: Any, model_class: Any, config: Any, changed: dict[str, Tensor]) -> Any:
    with torch.device("meta"):
        new = model_class(config)
    new.load_state_dict(model.state_dict() | changed, assign=True)
    new.tie_weights()
    for name, buffer in model.named_buffers():  # those that are not saved, such as rotary frequencies
        owner, _, last = name.rpartition(".")
        setattr(new.get_submodule(owner), last, buffer)
    new.generation_config = model.generation_config
    return new.train(model.training)
