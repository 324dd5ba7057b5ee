"""tune.key_value: keys and values in every family, their sizes, what moves, and what a change of one key does."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from families import FAMILIES, model_of
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.classes import skeleton
from modelwright.core.train.freeze import memory, size_of
from modelwright.tune.key_value import KeyValue, Knobs
from small import go, moved, weights

D, F = 32, 48
# per block: gate, up, down; with biases
SIZES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite", "gemma2", "gemma3", "phi3", "gemma"), (D * F, D * F, D * F)),
    "gpt2": (0, D * 4 * D + 4 * D, D * 4 * D + D),
    "gpt_neox": (0, D * F + F, D * F + D),
    "opt": (0, D * F + F, D * F + D),
    **dict.fromkeys(("mixtral", "olmoe", "granitemoe"), (4 * D * F, 4 * D * F, 4 * D * F)),
    "qwen3_moe": (4 * D * 24, 4 * D * 24, 4 * D * 24),
    "t5": (0, 2 * D * F, 2 * D * F),
    "t5_v1_1": (2 * D * F, 2 * D * F, 2 * D * F),  # encoder and decoder
}


@pytest.mark.parametrize("kind", SIZES)
def test_key_and_value_counts_are_the_formula(kind: str) -> None:
    of = Anatomy(model_of(kind, device="meta"))
    gate, up, down = (2 * n for n in SIZES[kind])
    assert size_of(of, memory(of, "up")) == up and size_of(of, memory(of, "values")) == down
    assert size_of(of, memory(of, "keys")) == gate + up
    if gate:
        assert size_of(of, memory(of, "gate")) == gate
    else:
        with pytest.raises(UserError, match="no gate"):
            memory(of, "gate")
    parts = [set(memory(of, p)) for p in ("keys", "values")]
    assert not parts[0] & parts[1] and set(memory(of, "up")) <= parts[0]


def test_every_family_with_a_dense_memory_is_counted_above() -> None:
    shared = {"bert", "qwen2_moe", "granitemoeshared"}  # an encoder; experts beside a shared one
    assert FAMILIES.keys() - SIZES.keys() == shared


# ---- what moves ------------------------------------------------------------------------------------------------------
CASES = [
    ("llama", "keys", {"gate_proj", "up_proj"}),
    ("llama", "gate", {"gate_proj"}),
    ("llama", "up", {"up_proj"}),
    ("llama", "values", {"down_proj"}),
    ("llama", "none", {"q_proj", "v_proj"}),
    ("qwen2", "none", {"q_proj", "v_proj"}),
    ("gpt2", "keys", {"c_fc"}),
    ("gpt2", "values", {"mlp.c_proj"}),
    ("gpt_neox", "values", {"dense_4h_to_h"}),
    ("phi3", "keys", {"gate_up_proj"}),
    ("phi3", "values", {"down_proj"}),
    ("mixtral", "keys", {"experts.gate_up_proj"}),
    ("mixtral", "values", {"experts.down_proj"}),
    ("phi3", "gate", {"gate_up_proj"}),
    ("mixtral", "up", {"experts.gate_up_proj"}),
    ("gpt2", "none", {"c_attn"}),
]


@pytest.mark.parametrize(("kind", "part", "names"), CASES)
def test_only_the_chosen_part_moves_with_its_biases(kind: str, part: str, names: set[str], tmp_path: Path) -> None:
    model = model_of(kind)
    before, of = weights(model), Anatomy(model)
    out = go(KeyValue(Knobs(part=part)), model, tmp_path, epochs=3, weight_decay=0.1)
    assert moved(out.model, before) == {n for n in before if any(m in n for m in names)}
    for p in of:
        if p.rows and p.kind == "weight" and part not in ("keys", "values"):
            new, old = ((x[p.name].mT if p.orientation == "in_out" else x[p.name]) for x in (weights(out.model), before))
            free = {"none": {"q", "v"}}.get(part, {part})
            for piece, spans in p.rows.items():
                for s in spans:
                    assert torch.equal(new[..., s, :], old[..., s, :]) == (piece not in free)


# ---- adapters --------------------------------------------------------------------------------------------------------
def trainable(config: Any, **knobs: Any) -> int:
    model = skeleton(config)
    tuned = KeyValue(Knobs(adapt="lora", **knobs)).attach(model, Anatomy(model))
    return sum(p.numel() for p in tuned.parameters() if p.requires_grad)


def test_rank_8_on_llama_2_7b_is_the_papers_count_and_the_three_matrices_cost_the_same() -> None:
    big = transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    assert trainable(big, part="none") == 4_194_304
    assert [trainable(big, part=p) for p in ("gate", "up", "values")] == [8_060_928] * 3
    assert trainable(big, part="keys") == 4_194_304 + 2 * 3_866_624


@pytest.mark.parametrize(
    ("kind", "part"),
    [("llama", "gate"), ("llama", "values"), ("gpt2", "keys"), ("phi3", "keys"), ("mixtral", "keys"), ("mixtral", "values")],
)
def test_adapters_train_and_merge_into_the_chosen_matrices(kind: str, part: str, tmp_path: Path) -> None:
    model = model_of(kind)
    before, technique = weights(model), KeyValue(Knobs(part=part, adapt="lora", dropout=0.0))
    of = Anatomy(model)
    out = go(technique, model, tmp_path, epochs=3)
    merged = technique.export(out.model, tmp_path)
    ffn = {"gate": {"ffn.gate"}, "values": {"ffn.down", "expert.down"}, "keys": {"ffn.up", "ffn.gate_up", "expert.gate_up"}}[part]
    assert moved(merged, before) == {p.name for p in of if p.kind == "weight" and p.role in {"attn.q", "attn.v", "attn.qkv"} | ffn}


@pytest.mark.parametrize(("kind", "part"), [("phi3", "gate"), ("phi3", "up"), ("gpt2", "gate"), ("mixtral", "values")])
def test_adapters_on_a_matrix_that_cannot_be_had_alone_are_refused(kind: str, part: str) -> None:
    model = model_of(kind)
    with pytest.raises(UserError):
        KeyValue(Knobs(part=part, adapt="lora")).attach(model, Anatomy(model))


# ---- FFN(h) = f(h K^T) V ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "gpt_neox"])
@torch.no_grad()
def test_changing_one_key_changes_the_output_along_its_value_alone(kind: str) -> None:
    model = model_of(kind).double()
    of, h, j = Anatomy(model), torch.randn(5, 7, D, dtype=torch.float64), 11
    ffn, module = of.ffn(0), of.blocks[0].feed_forward
    act = transformers.activations.ACT2FN[getattr(of.config, "hidden_act", None) or of.config.activation_function]

    def read(view: Any) -> torch.Tensor:
        return view.read(model.get_parameter) if view else torch.zeros(())

    def memories() -> torch.Tensor:
        up = h @ read(ffn.up).T + read(ffn.up_bias)
        return act(h @ read(ffn.gate).T) * up if ffn.gate else act(up)

    v = read(ffn.down)  # (d, F): value j is column j
    for key in [ffn.up] + ([ffn.gate] if ffn.gate else []):
        f, y = memories(), module(h)
        assert torch.allclose(y, f @ v.T + read(ffn.down_bias), atol=1e-10)
        matrix = read(key)
        matrix[j] += torch.randn(D, dtype=torch.float64)
        delta, expected = module(h) - y, (memories() - f) @ v.T
        assert delta.abs().max() > 1e-2 and torch.allclose(delta, expected, atol=1e-6)
        along = (delta @ v[:, j] / v[:, j].square().sum())[..., None] * v[:, j]
        assert torch.allclose(delta, along, atol=1e-6)


@torch.no_grad()
def test_without_an_activation_a_key_edit_and_a_value_edit_reach_the_same_output_on_one_prompt() -> None:
    g = torch.Generator().manual_seed(0)
    k, v, h = torch.randn(F, D, generator=g), torch.randn(F, D, generator=g), torch.randn(D, generator=g)
    m, target = k @ h, torch.randn(D, generator=g)
    delta = target - m @ v
    by_value = m @ (v + torch.outer(m, delta) / m.square().sum())
    steps = torch.linalg.lstsq(v.T, delta[:, None]).solution[:, 0]
    by_key = ((k + torch.outer(steps, h) / h.square().sum()) @ h) @ v
    assert torch.allclose(by_value, target, atol=1e-3) and torch.allclose(by_key, target, atol=1e-3)
