"""Decoupled heads as models: plain maps are the stock model bit for bit, the cache holds the heads that are there, decoding agrees."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from families import model_of
from modelwright.models.dha import CLASSES, packed

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
KEYS, VALUES = [[0, 1, 1, 0], [0, 0, 0, 0]], [[0, 0, 1, 2], [0, 1, 0, 1]]
KINDS = ("llama", "mistral", "qwen2", "qwen3")


def planted(kind: str) -> tuple[Any, Any]:
    """A stock model of four key and value heads some of which are equal, and the same with each kept once."""
    model = model_of(kind, num_key_value_heads=4, eos_token_id=None, hidden_size=32)
    fused = {}
    for layer, (keys, values) in enumerate(zip(KEYS, VALUES, strict=True)):
        attention = model.model.layers[layer].self_attn
        for name, heads in (("k_proj", keys), ("v_proj", values)):
            for last, p in getattr(attention, name).named_parameters():
                kept = p.detach().unflatten(0, (4, -1))[: max(heads) + 1]
                fused[f"model.layers.{layer}.self_attn.{name}.{last}"] = kept.flatten(0, 1).clone()
                p.data.copy_(kept[heads].flatten(0, 1))
    return model, packed(model, KEYS, VALUES, fused).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_maps_are_the_stock_model_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    config_class, model_class = CLASSES[kind]
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    ours = model_class(config_class(**settings)).eval()
    ours.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, model(IDS).logits)
    assert ours.config.dha_keys == [[0, 0, 1, 1]] * 2


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equal_heads_kept_once_compute_the_same_and_decode_the_same(kind: str, tmp_path: Path) -> None:
    """Also after saving and loading, in eager attention, with beams, and with a padded batch."""
    model, ours = planted(kind)
    assert float((ours(IDS).logits - model(IDS).logits).abs().max()) < 1e-6
    ours.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(again).__name__ == type(ours).__name__ and float((again(IDS).logits - ours(IDS).logits).abs().max()) < 1e-5
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    for how in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        theirs = model.generate(IDS, attention_mask=mask, max_new_tokens=6, **how)
        assert torch.equal(ours.generate(IDS, attention_mask=mask, max_new_tokens=6, **how), theirs)
        assert torch.equal(again.generate(IDS, attention_mask=mask, max_new_tokens=6, **how), theirs)


@torch.no_grad()
def test_the_cache_holds_the_heads_that_are_there_and_generate_is_step_by_step_decoding() -> None:
    _, ours = planted("llama")
    cache = DynamicCache(config=ours.config)
    ours(IDS, past_key_values=cache, use_cache=True)
    assert [layer.keys.shape[1] for layer in cache.layers] == [2, 1]
    assert [layer.values.shape[1] for layer in cache.layers] == [3, 2]
    ids = IDS
    for _ in range(5):
        ids = torch.cat([ids, ours(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ours.generate(IDS, max_new_tokens=5, do_sample=False), ids)


@pytest.mark.parametrize("bad", [[[0, 1, 1, 0]], [[0, 1, 1, 3]] * 2, [[0, 1]] * 2])
def test_maps_that_do_not_fit_are_an_error(bad: list[list[int]]) -> None:
    config_class, _ = CLASSES["llama"]
    with pytest.raises(ValueError, match="dha_keys needs a head"):
        config_class(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, dha_keys=bad)
