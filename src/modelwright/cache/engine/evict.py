"""Evict most of a prompt's keys and values once it is read, and go on with generate() in less memory.

    with evict(model, NACL(keep=0.2)):
        model.generate(ids, max_new_tokens=64)

Works on any decoder that transformers drives through its attention interface: queries and keys arrive after rotation and
norms, so there is no code per model. Inside the block the model's attention implementation is one of ours, under which an
attention function and a mask function are registered, and a forward hook puts our layers into every empty cache; no class is
touched, and afterwards, also after an error, the model is as it was. Attention of the prompt is computed in full, and once:
a method that scores by the attention of the last queries hands on what they attend to. Each layer then drops what its
method gives up, before the next layer starts, so at most one layer is ever whole. Kept tokens stay at their true positions
and new tokens go on at theirs. Where a cache holds one latent for all heads (DeepSeek), these are scored by the keys that
attention makes of it, and keep the same tokens.

Layers with a sliding window keep their window, which bounds them already; the others are evicted. Nothing is evicted while
answering: the cache grows by every token written. To ask a question after a compressed context, give the context first:

        cache = model(context, logits_to_keep=1).past_key_values      # copy.deepcopy(cache) to ask several
        model.generate(torch.cat([context, question], 1), past_key_values=cache)

A prompt read in chunks (`prefill_chunk_size`) needs `chunked=True`: then eviction waits for the first single token, or for
`finish(cache)`, because nothing else tells the last chunk from the one before. Until then every layer is whole. A last chunk
of one token cannot be told from an answer's first: it would be read after the eviction, so choose a size that leaves none over.

Refused, each with a sentence: encoders and encoder-decoders, flash and flex attention (they take no mask of ours), static,
quantised and offloaded caches, layers that share a cache, right padding, assisted decoding. Paged caches, as in vLLM, only
append and are out of reach.
"""

import sys
import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from modelwright.cache.engine.layer import EvictLayer
from modelwright.cache.engine.method import Method, Read
from modelwright.core.errors import UserError

_NAMES = {"sdpa": "modelwright_evict_sdpa", "eager": "modelwright_evict_eager"}
_now = threading.local()  # .step: the eviction and the cache of the forward pass under way


def evict(model: Any, method: Method, *, chunked: bool = False, record: bool = False) -> "Eviction":
    """The block `with evict(model, method) as e`. With `record`, `e.kept` lists per evicted layer the positions (B, G, n) that the
    last prompt kept, -1 in spare places. Raises UserError for a model or a budget that does not fit."""
    return Eviction(model, method, chunked, record)


class Eviction:
    def __init__(self, model: Any, method: Method, chunked: bool = False, record: bool = False):
        self.method, self.chunked, self.record = method, chunked, record
        self.active = False
        self.wanted = 1  # queries that the method wants of the prompt under way
        self.kept: list[Tensor] = []
        self.kind = kind = type(model).__name__
        if model.config.is_encoder_decoder or not model.can_generate():
            why = "it is an encoder-decoder" if model.config.is_encoder_decoder else "it writes no text"
            raise UserError(f"{kind} has no decoder cache to evict from", why, "give a causal language model")
        self.model = model.get_decoder()
        self._stock()
        self.layers = [i for i, layer in enumerate(self._fresh().layers) if isinstance(layer, EvictLayer)]
        heads = getattr(self.model.config, "num_key_value_heads", None) or self.model.config.num_attention_heads
        if not self.layers:
            raise UserError(f"{kind} has no layer to evict from", "all its layers have a sliding window, which bounds their cache")
        method.fits(len(self.layers), heads)

    def __deepcopy__(self, memo: dict) -> "Eviction":
        return self  # a copied cache belongs to the same block

    def _stock(self) -> str:
        """The attention that the model has now. Raises UserError where it cannot be driven, or is ours already."""
        now = self.model.config._attn_implementation
        if now in _NAMES.values():
            raise UserError(f"{self.kind} is in an evict block already", "one method at a time", "leave that block first")
        if now not in _NAMES or not self.model._can_set_attn_implementation():
            raise UserError(
                f"the attention of {self.kind} ({now}) cannot be driven",
                "eviction needs an attention function that takes a mask",
                "load the model with attn_implementation='sdpa' or 'eager'",
            )
        return now

    def __enter__(self) -> "Eviction":
        self.before = self._stock()  # another block may have been entered since this one was made
        self.model.set_attn_implementation(_NAMES[self.before])
        self.hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end, always_call=True),
        ]
        self.active = True
        return self

    def __exit__(self, *error: object) -> None:
        self.active = False
        for hook in self.hooks:
            hook.remove()
        self.model.set_attn_implementation(self.before)

    # ---- the cache ---------------------------------------------------------------------------------------------------
    def _fresh(self) -> DynamicCache:
        """An empty cache: our layers where attention is full, the stock ones where a window slides."""
        cache = DynamicCache(config=self.model.config)
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                cache.layers[i] = EvictLayer(self)
            elif not isinstance(layer, DynamicSlidingWindowLayer):
                raise UserError(
                    f"layer {i} of {type(self.model).__name__} cannot be evicted from",
                    f"its cache is a {type(layer).__name__}",
                    "give a model whose layers attend to keys and values of their own",
                )
        return cache

    def _ours(self, cache: Cache) -> bool:
        return any(isinstance(layer, EvictLayer) for layer in cache.layers)

    def _evicted(self, cache: Cache) -> list[EvictLayer]:
        """The layers of a cache of this block that are evicted."""
        return cast(list[EvictLayer], [cache.layers[i] for i in self.layers])

    def _begin(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        cache, use = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if cache is None and (self.model.config.use_cache if use is None else use) and not module.training:
            cache = kwargs["past_key_values"] = self._fresh()
        if cache is None:
            return args, kwargs
        if type(cache) is not DynamicCache or cache.offloading:
            what = "an offloaded cache" if getattr(cache, "offloading", False) else f"a {type(cache).__name__}"
            raise UserError(f"{what} cannot be evicted from", "its tensors have a place of their own", "leave cache_implementation out")
        if not self._ours(cache):
            if cache.layers and cache.get_seq_length():
                raise UserError("this cache was filled outside of the evict block", "its prompt is read already", "read it inside")
            cache.layers, cache.layer_class_to_replicate = self._fresh().layers, None
        ids = args[0] if args else kwargs.get("input_ids")
        ids = kwargs["inputs_embeds"] if ids is None else ids
        layers = self._evicted(cache)
        if not layers[0].read:
            if layers[0].seen and ids.shape[1] == 1:
                self.finish(cache)
            else:
                total = layers[0].seen + ids.shape[1]
                lengths = _lengths(kwargs.get("attention_mask"), total)
                if not self.chunked:
                    _no_empty(lengths)
                self.wanted = min(max(map(self.method.window, set(lengths or [total]) - {0}), default=1), total)  # 0: padding so far
                for layer in layers:
                    layer.lengths = lengths
        _now.step = (self, cache)
        return args, kwargs

    def _end(self, module: Any, args: tuple, output: Any) -> None:
        _now.step = None

    def finish(self, cache: Cache) -> None:
        """Evict now, in all layers: the prompt that was read in chunks is complete."""
        layers = self._evicted(cache)
        _no_empty(layers[0].lengths)
        for i, layer in zip(self.layers, layers, strict=True):
            if layer.queries is not None:
                self._evict(layer, i, layer.queries, *(layer.states or (layer.keys, layer.values)), *layer.manner)

    def _read(
        self,
        layer: EvictLayer,
        index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        manner: tuple[float, float | None],
        attend: bool = False,
    ) -> Tensor | None:
        """Evict, or keep what is needed for it; `manner` is scale and soft cap. Where `attend`, gives what the last queries attend to
        (B, H, n, d), if that was in hand."""
        if not self.chunked:
            return self._evict(layer, index, query[:, :, -self.wanted :], key, value, *manner, attend)
        whole = query if layer.queries is None else torch.cat([layer.queries, query], 2)
        layer.queries, layer.manner = whole[:, :, -self.wanted :].clone(), manner
        layer.states = None if key is layer.keys else (key, value)
        return None

    @torch.no_grad()
    def _evict(
        self, layer: EvictLayer, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, attend: bool = False
    ) -> Tensor | None:
        at, held = self.layers.index(index), layer.keys.shape[1]
        read = Read(q, k, v, scale, at, len(self.layers), layer.lengths, softcap, held=held, attend=attend)
        keep = self.method.choose(read)
        if self.record:
            self._note(at, *keep, layer.keys)
        layer.keep(*keep)
        return None if read.attended is None else read.attended.flatten(1, 2)

    def _note(self, at: int, index: Tensor | None, slots: Tensor | None, keys: Tensor) -> None:
        if index is None:
            index = torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[:3])
        self.kept = self.kept[:at] + [index if slots is None else index.masked_fill(~slots, -1)]


def _lengths(mask: Any, total: int) -> list[int] | None:
    """Real tokens of each row from the 2-D padding mask, None where nothing is padded."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UserError("the attention mask is no (batch, tokens) mask", "eviction has to know which tokens are padding", "give that one")
    mask = mask[:, :total].bool()
    if mask.all():
        return None
    if (mask[:, 1:] < mask[:, :-1]).any():
        raise UserError("a prompt is padded on the right or inside", "answers follow the prompt's last token", "pad on the left")
    return mask.sum(1).tolist()


def _no_empty(lengths: list[int] | None) -> None:
    if 0 in (lengths or ()):
        raise UserError("a prompt of the batch is nothing but padding", "there is nothing to evict or to answer", "leave that row out")


def _function(base: str) -> Callable[..., Any]:
    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        stock = ALL_ATTENTION_FUNCTIONS[base] if base == "sdpa" else _eager_of(module)
        step: tuple[Eviction, Cache] | None = getattr(_now, "step", None)
        layer = step[1].layers[module.layer_idx] if step else None
        if step is None or not isinstance(layer, EvictLayer):
            return stock(module, query, key, value, attention_mask, *args, **kwargs)
        if layer.read:
            return stock(module, query, key, value, layer.mask(query, attention_mask, base == "eager"), *args, **kwargs)
        owner, scale = step[0], kwargs.get("scaling")
        manner = query.shape[-1] ** -0.5 if scale is None else scale, kwargs.get("softcap")
        whole = base == "sdpa" and attention_mask is None and query.shape[2] == layer.seen and not query.requires_grad
        if not whole or owner.chunked:
            out = stock(module, query, key, value, attention_mask, *args, **kwargs)
            owner._read(layer, module.layer_idx, query, key, value, manner)
            return out
        last = owner._read(layer, module.layer_idx, query, key, value, manner, attend=True)
        if last is None:
            return stock(module, query, key, value, None, *args, **kwargs)
        if not (n := query.shape[2] - last.shape[2]):
            return last.transpose(1, 2), None
        first, weights = stock(module, query[:, :, :n], key[:, :, :n], value[:, :, :n], None, *args, **kwargs)
        return torch.cat([first, last.transpose(1, 2)], 1), weights

    return attend


def _eager_of(module: Any) -> Callable[..., Any]:
    """The eager attention of the file that the module's class comes from."""
    for cls in type(module).__mro__:
        if found := getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None):
            return found
    raise UserError(f"{type(module).__name__} has no eager attention", how="load the model with attn_implementation='sdpa'")


for _base, _name in _NAMES.items():
    AttentionInterface.register(_name, _function(_base))
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_base])
