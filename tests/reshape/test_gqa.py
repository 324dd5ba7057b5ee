"""Fewer key and value heads: heads that are alike merge without loss, also when they were turned, and the result is a stock model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modelwright
from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.model.certificate import logits_of
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import write_tensors
from modelwright.reshape.gqa import Knobs, gqa
from modelwright.reshape.growth.align import turn_pairs

IDS = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
D = 8  # width of a head


def write(base: Path, to: Path, **knobs: Any) -> Path:
    made, promise = gqa(Checkpoint(base), Knobs(**knobs))
    assert promise == "changed function"
    to.mkdir()
    write_tensors(made, to, 10**9)
    return to


def logits(base: Path) -> torch.Tensor:
    return logits_of(Checkpoint(base).model(torch.float32), IDS)


def difference(a: Path, b: Path) -> float:
    return float((logits(a) - logits(b)).abs().max())


@torch.no_grad()
def planted(kind: str, to: Path, turned: bool) -> Path:
    """A model of 4 key and value heads of which 0 and 1, and 2 and 3, are one head; turned: in another gauge each."""
    model = model_of(kind, num_key_value_heads=4)
    g = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        a = layer.self_attn
        for one, two in ((0, 1), (2, 3)):
            angle = torch.rand(D // 2, generator=g) * 6 if turned else torch.zeros(D // 2)
            r = torch.linalg.qr(torch.randn(D, D, generator=g))[0] if turned else torch.eye(D)
            first, second = slice(one * D, one * D + D), slice(two * D, two * D + D)
            for name in ("weight", "bias"):
                if getattr(a.k_proj, name, None) is None:
                    continue
                k, v, q = (getattr(p, name) for p in (a.k_proj, a.v_proj, a.q_proj))
                k[second] = turn_pairs(k[first], angle) if turned else k[first]
                v[second] = r.T @ v[first] if turned else v[first]
                q[second] = turn_pairs(q[second], angle) if turned else q[second]
            if turned:
                a.o_proj.weight[:, second] = a.o_proj.weight[:, second] @ r
    model.save_pretrained(to)
    return to


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("method", ["mean", "first"])
def test_heads_that_are_equal_merge_exactly(kind: str, method: str, tmp_path: Path) -> None:
    base = planted(kind, tmp_path / "base", turned=False)
    assert difference(base, write(base, tmp_path / "out", kv_heads=2, method=method)) < 2e-6


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "mixtral"])
def test_heads_that_are_equal_but_turned_merge_exactly_when_aligned_and_not_otherwise(kind: str, tmp_path: Path) -> None:
    """The turned model computes what the plain one does; only alignment sees it. Biases turn too."""
    base, plain = planted(kind, tmp_path / "base", turned=True), planted(kind, tmp_path / "plain", turned=False)
    assert difference(base, plain) < 2e-5
    assert difference(base, write(base, tmp_path / "aligned", kv_heads=2, method="aligned")) < 2e-5
    assert difference(base, write(base, tmp_path / "mean", kv_heads=2, method="mean")) > 1e-2


def test_values_are_turned_and_keys_are_not_where_a_norm_stands_between(tiny: Callable[..., Path]) -> None:
    made, _ = gqa(Checkpoint(tiny("qwen3")), Knobs(kv_heads=1))
    assert "norm" in made.facts["note"]
    assert made.facts["agreement of keys turned"] == made.facts["agreement of keys"]
    assert made.facts["agreement of values turned"] > made.facts["agreement of values"]


def test_first_keeps_the_first_head_of_each_group_and_mean_their_mean(tiny: Callable[..., Path]) -> None:
    base = Checkpoint(tiny("llama", num_key_value_heads=4))
    name = "model.layers.0.self_attn.k_proj.weight"
    heads = base.get(name).view(4, D, -1)
    by = {m: dict(gqa(base, Knobs(kv_heads=2, method=m))[0].stream()) for m in ("first", "mean")}
    assert torch.equal(by["first"][name].view(2, D, -1), heads[::2])
    assert torch.equal(by["mean"][name].view(2, D, -1), heads.view(2, 2, D, -1).mean(1))
    for other in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"):
        n = f"model.layers.1.{other}.weight"
        assert torch.equal(by["mean"][n], base.get(n))


def test_cache_shrinks_by_the_factor_and_generate_is_step_by_step_decoding(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny("qwen2", eos_token_id=None)
    result = modelwright.run("reshape.gqa", base=base, to=tmp_path / "out", kv_heads=1)
    c = result.certificate
    assert c["kv_bytes_per_token"] * 2 == c["before"]["kv_bytes_per_token"] and c["loads_in"] == "Qwen2ForCausalLM"
    model = Checkpoint(result.to).model().eval()
    ids = IDS[:, :8]
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(IDS[:, :8], max_new_tokens=6, do_sample=False), ids)


def test_aligned_loses_far_less_than_the_mean_on_text_it_has_not_seen(stories: Path, tmp_path: Path) -> None:
    """A trained model of 4 key and value heads; turned by a made-up story, measured on the probe text. Rise of the loss, nats."""
    (tmp_path / "a.txt").write_text("Once upon a time there was a little cat. The cat was sad. One day the cat saw a big red ball. " * 30)
    rise = {}
    for method, data in (("mean", {}), ("aligned", {"data": str(tmp_path / "a.txt")})):
        c = modelwright.run("reshape.gqa", base=stories, to=tmp_path / method, kv_heads=2, method=method, **data).certificate
        rise[method] = c["loss_after"] - c["loss_before"]
    assert rise["aligned"] < rise["mean"] / 2


@pytest.mark.parametrize(
    ("kind", "knobs", "words"),
    [
        ("llama", {"kv_heads": 2}, ["kv_heads=2", "give 1"]),
        ("llama", {"kv_heads": 0}, ["kv_heads=0"]),
        ("gpt2", {"kv_heads": 1}, ["one matrix"]),
        ("phi3", {"kv_heads": 1}, ["one matrix"]),
        ("opt", {"kv_heads": 1}, ["no number of key heads"]),
        ("olmoe", {"kv_heads": 1}, ["norms all key heads together"]),
        ("t5", {"kv_heads": 1}, ["no number of key heads"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_heads_that_cannot_be_merged_are_refused(
    kind: str, knobs: dict, words: list[str], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        modelwright.run("reshape.gqa", base=tiny(kind), to=tmp_path / "out", **knobs)
    assert all(w in str(caught.value) for w in words), caught.value
    assert not list(tmp_path.iterdir())


def test_number_that_does_not_divide_is_refused_with_those_that_do(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="give 1 or 2"):
        gqa(Checkpoint(tiny("llama", num_key_value_heads=4)), Knobs(kv_heads=3))
