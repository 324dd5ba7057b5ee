"""The cache itself, whatever the method: stock results without eviction, exact continuation with it, nothing left behind."""

import copy
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from families import model_of
from modelwright.cache.engine.evict import evict
from modelwright.cache.engine.layer import EvictLayer
from modelwright.cache.engine.measure import nbytes
from modelwright.cache.engine.method import Method
from modelwright.cache.evictors.baselines import H2O, TOVA, KeyNorm, PyramidKV, Random, SnapKV, StreamingLLM
from modelwright.cache.evictors.nacl import NACL
from modelwright.core.errors import UserError

ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "gpt2",
    "opt",
    "gpt_neox",
    "deepseek_v3",
)
ALL = (NACL, SnapKV, H2O, StreamingLLM, TOVA, PyramidKV, KeyNorm, Random)


def method_of(kind: type[Method], **more: Any) -> Method:
    return kind(**more, **({"observe": 4} if issubclass(kind, SnapKV) else {}))


def build(kind: str = "llama") -> Any:
    if kind == "deepseek_v3":  # queries and keys are 12 wide, values 6; the cache holds a latent, 16 and 4 wide, of all heads
        torch.manual_seed(0)
        config = T.DeepseekV3Config(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=6,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            n_shared_experts=1,
            initializer_range=0.3,
        )
        return T.AutoModelForCausalLM.from_config(config).eval()
    more = {"num_hidden_layers": 6, "sliding_window": 8} if kind == "gemma3" else {"sliding_window": 8} if kind == "gemma2" else {}
    return model_of(kind, **more, **{"n_positions" if kind == "gpt2" else "max_position_embeddings": 128})


def ids_of(rows: int = 2, length: int = 40) -> Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))


def write(model: Any, ids: Tensor, n: int = 6, **how: Any) -> Any:
    config = T.GenerationConfig(
        max_new_tokens=n, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, **{"do_sample": False, **how}
    )
    return model.generate(ids, generation_config=config)


def padded(ids: Tensor, pads: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0
    return ids * mask, mask


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_keeping_all_is_stock_generate_token_for_token(kind: str) -> None:
    model, ids = build(kind), ids_of()
    for how in ({}, {"num_beams": 3}, {"do_sample": True, "temperature": 2.0}):
        torch.manual_seed(5)
        stock = write(model, ids, **how).sequences
        torch.manual_seed(5)
        with evict(model, NACL(keep=1.0)):
            ours = write(model, ids, **how).sequences
        assert torch.equal(stock, ours), how


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "mixtral"])
def test_keeping_all_of_padded_rows_is_stock_generate(kind: str) -> None:
    model = build(kind)
    ids, mask = padded(ids_of(), 7)
    config = T.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    stock = model.generate(ids, attention_mask=mask, generation_config=config)
    with evict(model, H2O(keep=1.0)):
        assert torch.equal(stock, model.generate(ids, attention_mask=mask, generation_config=config))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"])
@pytest.mark.parametrize("cls", [NACL, PyramidKV])
def test_continuation_equals_step_by_step_decoding_with_the_same_kept_set(kind: str, cls: type[Method]) -> None:
    model, ids = build(kind), ids_of(length=40)
    with evict(model, method_of(cls, keep=0.5)):
        cache = model(ids[:, :30]).past_key_values
        again = copy.deepcopy(cache)
        together = model(ids[:, 30:], past_key_values=cache).logits
        steps = torch.cat([model(ids[:, t : t + 1], past_key_values=again).logits for t in range(30, 40)], 1)
    assert (together - steps).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("pads", [0, 9])
@pytest.mark.parametrize(
    "method",
    [NACL(keep=0.3), StreamingLLM(keep=[0.2, 1.0]), KeyNorm(keep=[[0.1, 0.6], [0.5, 0.2]]), H2O(tokens=[6, 11])],
    ids=["nacl", "uneven layers", "uneven heads", "tokens"],
)
def test_evicting_equals_hiding_the_evicted_tokens_from_a_full_cache(method: Method, pads: int) -> None:
    """An attention function of the test's own hides them, in eager arithmetic, on a stock cache."""
    model, (ids, mask) = build(), padded(ids_of(length=44), pads)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with evict(model, method, record=True) as e:
        cache = model(ids[:, :32], attention_mask=mask[:, :32], position_ids=position[:, :32]).past_key_values
        ours = model(ids[:, 32:], attention_mask=mask, position_ids=position[:, 32:], past_key_values=cache).logits

    def oracle(module: Any, q: Tensor, k: Tensor, v: Tensor, given: Tensor, scaling: float, **kwargs: Any) -> tuple[Tensor, None]:
        groups = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scaling + given
        if k.shape[2] > q.shape[2]:  # the continuation
            hidden = torch.ones(*k.shape[:2], 33, dtype=torch.bool)
            hidden.scatter_(2, e.kept[module.layer_idx] % 33, False)  # a spare place, -1, is column 32
            scores[..., :32].masked_fill_(hidden[..., :32].repeat_interleave(groups, 1)[:, :, None], -1e30)
        return (scores.softmax(-1) @ v.repeat_interleave(groups, 1)).transpose(1, 2), None

    AttentionInterface.register("oracle", oracle)
    AttentionMaskInterface.register("oracle", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation("oracle")
    cache = model(ids[:, :32], attention_mask=mask[:, :32], position_ids=position[:, :32]).past_key_values
    theirs = model(ids[:, 32:], attention_mask=mask, position_ids=position[:, 32:], past_key_values=cache).logits
    assert (ours - theirs).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("cls", ALL)
def test_a_row_keeps_the_same_tokens_alone_and_padded_in_a_batch(cls: type[Method]) -> None:
    model, method = build(), method_of(cls, keep=0.4)
    ids, mask = padded(ids_of(), 11)
    with evict(model, method, record=True) as e:
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        batch = e.kept
        for row, pads in ((0, 11), (1, 0)):
            model(ids[row : row + 1, pads:])
            for together, alone in zip(batch, e.kept, strict=True):
                found = together[row]
                assert torch.equal(found[found >= 0].view(alone[0].shape) - pads, alone[0])


@torch.no_grad()
@pytest.mark.parametrize("method", [NACL(keep=0.3), H2O(), SnapKV(observe=7), StreamingLLM()], ids=lambda m: m.name)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral", "gpt2"])
def test_the_prompt_itself_is_attended_to_in_full(kind: str, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, asked = build(kind), ids_of(), []
    with torch.no_grad():
        stock = model(ids).logits
        attention = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(
            torch.nn.functional, "scaled_dot_product_attention", lambda q, *a, **k: asked.append(q.shape[2]) or attention(q, *a, **k)
        )
        with evict(model, method):
            assert (model(ids).logits - stock).abs().max() < 1e-5
    scored = {"nacl": len(ids[0]) - method.window(len(ids[0])), "h2o": None, "snapkv": len(ids[0]) - 7, "streaming_llm": len(ids[0])}
    wanted = scored[method.name]
    assert asked == ([] if wanted is None else [wanted] * model.config.num_hidden_layers)  # no query is attended for twice


@torch.no_grad()
@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_of_latents_is_evicted_for_all_heads_at_once(attention: str, cls: type[Method]) -> None:
    model, ids = build("deepseek_v3"), ids_of()
    model.set_attn_implementation(attention)
    stock, written, (padding, mask) = model(ids).logits, write(model, ids).sequences, padded(ids, 7)
    with evict(model, method_of(cls, keep=0.5)):
        out = model(ids)
        assert (out.logits - stock).abs().max() < 1e-5
        if cls is not PyramidKV:
            assert [(x.keys.shape, x.values.shape) for x in out.past_key_values.layers] == [((2, 1, 20, 16), (2, 1, 20, 4))] * 2
        assert torch.equal(write(model, ids).sequences[:, 40], written[:, 40])
        whole = write(model, padding, attention_mask=mask, num_beams=2).sequences
    with evict(model, method_of(cls, keep=0.5), chunked=True):
        assert torch.equal(whole, write(model, padding, attention_mask=mask, num_beams=2, prefill_chunk_size=6).sequences)
    with evict(model, method_of(cls, keep=1.0)):
        assert torch.equal(write(model, ids).sequences, written)


@torch.no_grad()
def test_a_cache_of_latents_is_scored_by_what_each_head_attends_to() -> None:
    model, ids = build("deepseek_v3"), ids_of(length=24)
    model.set_attn_implementation("eager")
    attention = model(ids, output_attentions=True).attentions
    for method, votes in (
        (TOVA(tokens=9), [a[:, :, -1].mean(1).index_fill(1, torch.tensor([23]), 9) for a in attention]),
        (H2O(tokens=9, recent=0), [a.sum((1, 2)) for a in attention]),
    ):
        with evict(model, method, record=True) as e:
            model(ids)
        for kept, vote in zip(e.kept, votes, strict=True):
            assert torch.equal(kept[:, 0], vote.topk(9).indices.sort().values)
    words = "the budget differs between heads, because the cache holds all heads as one"
    with pytest.raises(UserError, match=words), evict(model, KeyNorm(keep=[[0.1, 0.2, 0.3, 0.4]] * 2)):
        model(ids)


def test_gradients_of_the_prompt_are_those_of_the_stock_model() -> None:
    model, ids = build(), ids_of()
    stock = torch.autograd.grad(model(ids).logits.square().mean(), list(model.parameters()))
    with evict(model, H2O()):
        ours = torch.autograd.grad(model(ids).logits.square().mean(), list(model.parameters()))
    assert max((a - b).abs().max() for a, b in zip(stock, ours, strict=True)) < 1e-6


def test_the_tensors_are_really_smaller() -> None:
    model, ids = build(), ids_of(length=100)
    full = nbytes(model(ids).past_key_values)
    with evict(model, NACL(keep=0.2)):
        cache = model(ids).past_key_values
    assert [tuple(x.keys.shape) for x in cache.layers] == [(2, 2, 20, 8)] * 2
    assert nbytes(cache) * 5 == full
    assert all(x.keys.untyped_storage().nbytes() == x.keys.numel() * 4 for x in cache.layers)
    with evict(model, KeyNorm(keep=[[0.1, 0.5], [0.2, 0.2]])):  # of 2 x 100: 10 + 50 and 20 + 20 per row
        cache = model(ids).past_key_values
        assert [x.packed and x.packed[0].shape[0] for x in cache.layers] == [120, None]
        assert nbytes(cache) - full * 0.25 == 2 * 2 * 50  # the one byte per slot that tells heads apart
        model(ids[:, :3], past_key_values=cache)
    assert [tuple(x.keys.shape) for x in cache.layers] == [(2, 2, 3, 8), (2, 2, 23, 8)]
    assert cache.get_seq_length() == 103


@torch.no_grad()
def test_no_two_layers_are_whole_at_once() -> None:
    model, ids, held = build(), ids_of(length=100), []
    layer_of = {}

    def look(module: Any, args: Any, kwargs: Any) -> None:
        cache = kwargs["past_key_values"]
        layer_of[module.layer_idx] = [0 if x.keys is None else x.keys.shape[2] for x in cache.layers]
        held.append(layer_of[module.layer_idx])

    hooks = [b.self_attn.register_forward_pre_hook(look, with_kwargs=True) for b in model.model.layers]
    with evict(model, NACL(keep=0.2)):
        model(ids)
    for h in hooks:
        h.remove()
    assert held == [[0, 0], [20, 0]]


@torch.no_grad()
@pytest.mark.parametrize("method", [NACL(keep=0.3), KeyNorm(keep=[[0.1, 0.6], [0.5, 0.2]])], ids=["even", "uneven"])
def test_beams_and_batches_reorder_rows(method: Method) -> None:
    model, ids = build(), ids_of(rows=3)
    new = ids_of(rows=3, length=4)
    order = torch.tensor([2, 0, 2])
    with evict(model, method):
        cache = model(ids).past_key_values
        picked, doubled, chosen = copy.deepcopy(cache), copy.deepcopy(cache), copy.deepcopy(cache)
        base = model(new, past_key_values=cache).logits
        picked.reorder_cache(order)
        doubled.batch_repeat_interleave(2)
        chosen.batch_select_indices(torch.tensor([1]))
        assert (model(new[order], past_key_values=picked).logits - base[order]).abs().max() < 1e-5
        assert (model(new.repeat_interleave(2, 0), past_key_values=doubled).logits - base.repeat_interleave(2, 0)).abs().max() < 1e-5
        assert (model(new[1:2], past_key_values=chosen).logits - base[1:2]).abs().max() < 1e-5
        assert write(model, ids, num_beams=4, num_return_sequences=2).sequences.shape == (6, 46)


@torch.no_grad()
@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("pads", [0, 5])
def test_a_prompt_in_chunks_keeps_what_the_whole_one_keeps(cls: type[Method], pads: int) -> None:
    model, method = build(), method_of(cls, keep=0.4)
    ids, mask = padded(ids_of(length=38), pads)
    config = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "attention_mask": mask}
    with evict(model, method, record=True) as e:
        whole, kept = model.generate(ids, **config), e.kept
    with evict(model, method, chunked=True, record=True) as e:
        assert torch.equal(whole, model.generate(ids, prefill_chunk_size=16, **config))
        assert all(torch.equal(a, b) for a, b in zip(kept, e.kept, strict=True))
        if not pads:  # a question after the chunks
            cache = None
            for piece in ids.split(16, 1):
                cache = model(piece, past_key_values=cache).past_key_values
            e.finish(cache)
            assert cache.layers[0].kept == round(0.4 * 38) or cls is PyramidKV
            e.finish(cache)  # again is nothing
            assert cache.get_seq_length() == 38


@torch.no_grad()
@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("beams", [1, 3])
def test_chunks_may_be_smaller_than_the_padding(cls: type[Method], beams: int) -> None:
    model, method = build(), method_of(cls, keep=0.5)
    ids, mask = padded(ids_of(length=24), 7)
    ids[1, :6], mask[1, :6] = 0, 0  # the first chunks hold no token at all
    config = {"do_sample": False, "num_beams": beams, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "attention_mask": mask}
    with evict(model, method, record=True) as e:
        whole, kept = model.generate(ids, **config), e.kept
    for chunk in (2, 3, 5, 6, 7):
        with evict(model, method, chunked=True, record=True) as e:
            assert torch.equal(whole, model.generate(ids, prefill_chunk_size=chunk, **config))
            assert all(torch.equal(a, b) for a, b in zip(kept, e.kept, strict=True))


@torch.no_grad()
def test_padding_alone_is_refused_once_the_prompt_is_whole() -> None:
    model, ids, mask = build(), ids_of(length=12), torch.ones(2, 12)
    mask[0] = 0
    with evict(model, NACL()), pytest.raises(UserError, match="nothing but padding"):
        model(ids, attention_mask=mask)
    with evict(model, NACL(), chunked=True) as e:
        cache = model(ids, attention_mask=mask).past_key_values
        with pytest.raises(UserError, match="nothing but padding"):
            e.finish(cache)
        right = torch.ones(2, 12)
        right[0, -3:] = 0
        with pytest.raises(UserError, match="padded on the right"):
            model(ids, attention_mask=right)


def state_of(model: Any) -> Any:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
    classes = [sorted(vars(type(m))) for m in model.modules()]
    return model.config.to_dict(), model.config._attn_implementation, hooks, classes, {k: v.clone() for k, v in model.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    return a[:4] == b[:4] and all(torch.equal(a[4][k], b[4][k]) for k in a[4])


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_model_is_as_before_also_after_an_exception(kind: str) -> None:
    model, ids = build(kind), ids_of()
    stock = write(model, ids).sequences
    before = state_of(model)
    with evict(model, NACL(keep=0.2)):
        assert model.config._attn_implementation.startswith("modelwright_evict_")
        write(model, ids)
    assert same(before, state_of(model))
    with pytest.raises(RuntimeError, match="midway"), evict(model, NACL(keep=0.2)):
        hook = model.lm_head.register_forward_hook(lambda *a: (_ for _ in ()).throw(RuntimeError("midway")))
        try:
            write(model, ids)
        finally:
            hook.remove()
    assert same(before, state_of(model))
    assert torch.equal(stock, write(model, ids).sequences)


@pytest.mark.parametrize("same_block", [True, False])
def test_a_block_inside_a_block_is_refused_and_leaves_the_outer_one_whole(same_block: bool) -> None:
    model, ids = build(), ids_of()
    before = state_of(model)
    outer = evict(model, NACL(keep=0.2))
    inner = outer if same_block else evict(model, H2O(keep=0.5))
    with outer:
        with pytest.raises(UserError, match="is in an evict block already"), inner:
            pass
        assert write(model, ids).past_key_values.layers[0].kept == 8
    assert same(before, state_of(model))
    with inner:  # one after the other is no nesting
        write(model, ids)
    assert same(before, state_of(model))


@torch.no_grad()
def test_nothing_leaks_between_calls() -> None:
    model, ids, other = build(), ids_of(), ids_of(rows=1, length=25)
    generator = torch.get_rng_state()
    with evict(model, NACL(keep=0.3)):
        first = write(model, ids).sequences
        write(model, other)
        assert torch.equal(first, write(model, ids).sequences)
        assert model(ids, use_cache=False).past_key_values is None
    assert torch.equal(generator, torch.get_rng_state())
    second = build("qwen2")
    with evict(model, NACL(keep=0.3)), evict(second, TOVA(keep=0.5)):  # two models at a time
        assert torch.equal(first, write(model, ids).sequences)
        assert write(second, ids).past_key_values.layers[0].kept == 20


def test_layers_with_a_window_keep_it_and_the_others_are_evicted() -> None:
    out = write(build("gemma3"), ids_of())
    model = build("gemma3")
    with evict(model, NACL(keep=0.5)):
        ours = write(model, ids_of())
    kinds = [isinstance(x, EvictLayer) for x in ours.past_key_values.layers]
    assert kinds == [False] * 5 + [True]
    assert [x.keys.shape[2] for x in ours.past_key_values.layers] == [7] * 5 + [20 + 5]
    assert [x.keys.shape[2] for x in out.past_key_values.layers] == [7] * 5 + [45]


def refused(words: str, model: Any, method: Method = NACL(), **more: Any) -> None:  # noqa: B008
    with pytest.raises(UserError, match=words), evict(model, method):
        write(model, more.pop("ids", ids_of()), **more)


def test_what_cannot_be_evicted_is_refused_with_a_sentence() -> None:
    refused("BertForMaskedLM has no decoder cache to evict from, because it writes no text", model_of("bert"))
    refused("T5ForConditionalGeneration has no decoder cache", model_of("t5"))
    refused("all its layers have a sliding window", model_of("mistral", sliding_window=8))
    refused("a StaticCache cannot be evicted from", build(), cache_implementation="static")
    flash = build()
    flash.config._attn_implementation_internal = "flash_attention_2"
    refused(r"the attention of LlamaForCausalLM \(flash_attention_2\) cannot be driven", flash)
    model = build()
    with evict(model, NACL()):
        refused("is in an evict block already", model)
        cache = model(ids_of()).past_key_values
        with pytest.raises(UserError, match="cannot be rolled back"):
            cache.crop(-1)
        right = torch.ones(2, 40)
        right[0, -3:] = 0
        with pytest.raises(UserError, match="padded on the right"):
            model(ids_of(), attention_mask=right)
    with pytest.raises(UserError, match="made in an evict block that has ended"):
        model(ids_of(length=2), past_key_values=cache)
    filled = model(ids_of()).past_key_values
    with pytest.raises(UserError, match="filled outside"), evict(model, NACL()):
        model(ids_of(length=2), past_key_values=filled)


@pytest.mark.parametrize("kind", [NACL, Random])
@pytest.mark.parametrize(
    "budget", [{"keep": 0}, {"keep": 1.01}, {"keep": [0.5, 0]}, {"tokens": 0}, {"keep": "half"}, {"keep": [[0.1], [0.2, 0.3]]}]
)
def test_a_budget_that_is_none_is_refused(kind: type[Method], budget: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="out of range|no budget"):
        kind(**budget)


def test_a_budget_that_does_not_fit_is_refused() -> None:
    refused("the budget of streaming_llm is 2 tokens and it protects 4, because the prompt has 40 tokens", build(), StreamingLLM(keep=0.05))
    refused("the budget of snapkv is 20 tokens and it protects 32", build(), SnapKV(keep=0.5))
    refused("the model has 2 layers to evict from and 2 key-value heads", build(), TOVA(keep=[0.5, 0.5, 0.5]))
    refused("keep has shape 2 x 3", build(), TOVA(keep=[[0.5] * 3] * 2))
