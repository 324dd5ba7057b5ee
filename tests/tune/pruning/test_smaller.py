"""Gates and the smaller model that they leave: the same function, whatever the family; and the rules that choose units once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.tune.pruning.scores import scores
from modelwright.tune.pruning.smaller import KINDS, Shape, require_fit, smaller
from modelwright.tune.shear import Knobs, Shear
from small import rows

IDS = torch.arange(3, 43).view(2, 20) % 96
SIZES = {"layers": 2, "heads": 2, "ffn": 20, "hidden": 24}  # of 3 blocks, 4 query heads on 2 keys, 48 neurons, width 32


def gated(kind: str, asked: dict[str, int], **changes: Any) -> tuple[Any, dict[str, Tensor], Tensor]:
    """A model, random gates for a shape, and the logits of the model with these gates on."""
    model = model_of(kind, num_hidden_layers=3, **changes)
    technique = Shear(Knobs(**asked))
    technique.attach(model, Anatomy(model))
    g = torch.Generator().manual_seed(4)
    for gates in model.constraint.parts.values():
        with torch.no_grad():
            gates.log_alpha.copy_(torch.randn(gates.log_alpha.shape, generator=g))
    technique.terms()
    with torch.no_grad():
        logits = model.eval()(IDS).logits  # no step is asked for, so that this pass is the last one
    z = technique.settle(model.constraint.parts, final=True)
    for h in technique._handles:
        h.remove()
    del model.constraint
    return model, z, logits


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) < 2e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 16}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("granite", {"tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_the_smaller_model_gives_what_the_gated_one_gives(kind: str, changes: dict[str, Any]) -> None:
    model, z, logits = gated(kind, SIZES, **changes)
    assert all(0 < float(v[v > 0].min()) < 1 for v in z.values())  # gates that stay are not all 1
    made = smaller(model, z)
    assert type(made) is type(model)
    c = made.config
    assert (c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.intermediate_size, c.hidden_size) == (2, 2, 1, 20, 24)
    with torch.no_grad():
        assert close(made(IDS).logits, logits)


@pytest.mark.parametrize("asked", [{"layers": 1}, {"heads": 2}, {"ffn": 24}], ids=str)
@pytest.mark.parametrize("kind", ["gemma", "llama"])
def test_one_kind_of_unit_alone(kind: str, asked: dict[str, int]) -> None:
    model, z, logits = gated(kind, asked)
    assert z.keys() == asked.keys()
    with torch.no_grad():
        assert close(smaller(model, z)(IDS).logits, logits)


def test_gains_that_count_from_1_are_known() -> None:
    from modelwright.tune.pruning.smaller import _gain

    for kind, offset in (("gemma", 1.0), ("llama", 0.0), ("qwen3", 0.0)):
        model = model_of(kind)
        before = model.model.norm.weight.clone()
        part = next(p for p in Anatomy(model) if p.role == "norm.final")
        assert _gain(model, part) == offset and torch.equal(model.model.norm.weight, before)


def test_open_gates_leave_the_model_as_it_is() -> None:
    model = model_of("llama")
    with torch.no_grad():
        assert torch.equal(smaller(model, {})(IDS).logits, model(IDS).logits)


def test_the_smaller_model_generates_as_it_computes() -> None:
    model, z, _ = gated("qwen3", SIZES)
    made = smaller(model, z)
    out = made.generate(IDS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)
    ids = IDS[:1]
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, made(ids).logits[:, -1].argmax(-1)[:, None]], 1)
    assert torch.equal(out, ids)


@pytest.mark.parametrize("how", ["magnitude", "activation", "random", "uniform"])
def test_scores_have_the_shape_of_the_gates(how: str) -> None:
    model = model_of("llama")
    found = scores(how, model, Anatomy(model), rows(4), {"layers": 1, "ffn": 12}, 0)
    shape = Shape.of(model.config)
    assert {k: tuple(v.shape) for k, v in found.items()} == {k: shape.gates(k) for k in KINDS}


@pytest.mark.parametrize("how", ["magnitude", "activation"])
def test_what_does_nothing_scores_lowest(how: str) -> None:
    model = model_of("llama")
    with torch.no_grad():
        block = model.model.layers[1]
        block.mlp.down_proj.weight[:, 7] = 0
        block.self_attn.o_proj.weight[:, 16:] = 0  # the queries of the second key-value head
        model.model.embed_tokens.weight[:, 3] = 0
        model.model.layers[0].self_attn.o_proj.weight.mul_(1e-4)
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-4)
    found = scores(how, model, Anatomy(model), rows(4), {}, 0)
    assert int(found["ffn"][1].argmin()) == 7 and int(found["heads"][1].argmin()) == 1 and int(found["layers"].argmin()) == 0
    if how == "magnitude":
        assert int(found["hidden"].argmin()) == 3


def test_uniform_scores_keep_the_ends() -> None:
    model = model_of("llama", num_hidden_layers=5)
    found = scores("uniform", model, Anatomy(model), rows(2), {"layers": 3}, 0)
    assert found["layers"].tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("kind", "asked", "said"),
    [
        ("gpt2", {"ffn"}, "cannot be made smaller"),
        ("phi3", {"ffn"}, "cannot be made smaller"),
        ("gemma2", {"ffn"}, "cannot be made smaller"),
        ("mixtral", {"ffn"}, "is a mixture of experts"),
        ("gemma", {"hidden"}, "scales its embeddings"),
        ("bert", {"ffn"}, "cannot be made smaller"),
    ],
)
def test_what_cannot_be_cut_is_refused(kind: str, asked: set[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        require_fit(Anatomy(model_of(kind, device="meta")), asked)
