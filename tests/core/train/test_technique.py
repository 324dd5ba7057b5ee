"""The contract of training methods: names, refusals, checksums that see one bit, and what moved."""

from typing import Any

import pytest
import torch
from torch import nn

from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.technique import Technique, changed_units, checksums, combine, environment, in_out, plain_name
from modelwright.tune import c_rlft, full, hft, key_value, lora, migu
from small import go, rows


def make(name: str, **knobs: Any) -> Technique:
    of = {
        "full": (full.Full, full.Knobs),
        "hft": (hft.Hft, hft.Knobs),
        "migu": (migu.Migu, migu.Knobs),
        "key_value": (key_value.KeyValue, key_value.Knobs),
        "c_rlft": (c_rlft.CRlft, c_rlft.Knobs),
        "lora": (lora.Lora, lora.Knobs),
    }[name]
    return of[0](of[1](**knobs))


# ---- names -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("module.model.norm.weight", "model.norm.weight"),
        ("module.module.model.norm.weight", "model.norm.weight"),
        ("_orig_mod.module.lm_head.weight", "lm_head.weight"),
        ("module._orig_mod.model.layers.1._checkpoint_wrapped_module.mlp.up_proj.bias", "model.layers.1.mlp.up_proj.bias"),
        ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("module.base_model.model.transformer.h.0.attn.c_attn.base_layer.weight", "transformer.h.0.attn.c_attn.weight"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight", "model.layers.0.mlp.up_proj.lora_A.default.weight"),
        ("model.modules_of_mine.weight", "model.modules_of_mine.weight"),
    ],
)
def test_plain_name_takes_wrappers_away_and_nothing_else(wrapped: str, plain: str) -> None:
    assert plain_name(wrapped) == plain == plain_name(plain)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "mixtral", "opt"])
def test_names_under_adapters_and_wrappers_are_those_of_the_plain_model(kind: str) -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.module = inner

    model = model_of(kind)
    names = [n for n, _ in model.named_parameters()]
    assert [plain_name(n) for n, _ in Outer(model).named_parameters()] == names
    tuned = make("lora").attach(model, Anatomy(model))
    found = [plain_name(n) for n, _ in Outer(tuned).named_parameters()]
    assert [n for n in found if ".lora_" not in n] == names and len(set(found)) == len(found)


# ---- marks and movement ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_one_flipped_bit_is_seen_in_its_unit_and_nowhere_else(kind: str, dtype: str) -> None:
    model, g = model_of(kind, dtype=dtype), torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        before = checksums(model)
        assert not any(m.any() for m in changed_units(model, before).values())
        flat = p.data.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]).view(-1)
        at, bit = (int(torch.randint(n, (), generator=g)) for n in (p.numel(), 8 * p.element_size() - 1))
        flat[at] ^= 1 << bit
        index = torch.unravel_index(torch.tensor(at), p.shape)
        unit = index[-1] if in_out(model, name) or p.dim() == 1 else index[0] if p.dim() == 2 else index[0] * p.shape[1] + index[1]
        changed = changed_units(model, before)
        assert {n for n, m in changed.items() if m.any()} == {name}
        assert changed[name].nonzero().flatten().tolist() == [int(unit)]
        flat[at] ^= 1 << bit


def test_marks_see_swapped_values_and_signs() -> None:
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, -1.0, 5.0]])
    before = checksums(layer)
    layer.weight.data[0, :2] = torch.tensor([2.0, 1.0])
    assert changed_units(layer, before)["weight"].tolist() == [True, False]
    before = checksums(layer)
    layer.weight.data[1, 1:3] = torch.tensor([-1.0, 1.0])
    assert changed_units(layer, before)["weight"].tolist() == [False, True]


# ---- what does not go together ---------------------------------------------------------------------------------------
def deepspeed(stage: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    return environment(nn.Linear(1, 1), Train())


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_deepspeed_is_refused_to_what_edits_gradients_and_open_to_pure_selectors(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    around = deepspeed(stage, monkeypatch)
    assert f"zero{stage}" in around and not {"ddp", "fsdp2"} & around
    with pytest.raises(UserError, match=f"migu does not work with DeepSpeed ZeRO stage {stage}, because DeepSpeed .*; use torchrun"):
        combine([make("migu")], around)
    for name in ("full", "hft", "key_value", "c_rlft", "lora"):
        combine([make(name)], around)
    for kind, fused in (("llama", False), ("phi3", True)):
        model, technique = model_of(kind), make("hft")
        technique.select(model, Anatomy(model), 0)
        if fused:  # rows of a fused tensor are frozen by editing its gradient
            with pytest.raises(UserError, match="hft does not work with DeepSpeed"):
                combine([technique], around)
        else:
            combine([technique], around)


def test_deepspeed_stage_0_is_not_refused_to_plain_training(monkeypatch: pytest.MonkeyPatch) -> None:
    combine([make("full")], deepspeed("0", monkeypatch))


def test_deepspeed_is_refused_within_a_run_before_anything_is_trained(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed("2", monkeypatch)
    model = model_of("gpt2")
    for name in ("migu", "hft"):
        with pytest.raises(UserError, match=f"{name} does not work with DeepSpeed ZeRO stage 2"):
            go(make(name), model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("processes", [1, 2])
def test_surroundings_name_the_strategy_only_with_several_processes(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    around = environment(nn.Linear(1, 1), Train(strategy="fsdp2", gradient_checkpointing=True))
    assert around == {"fused", "gradient_checkpointing"} | ({"fsdp2"} if processes > 1 else set())


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["hft", "lora"], "hft does not work with adapters, because adapters freeze every base weight already; leave one of the two out"),
        (["lora", "hft"], "hft does not work with adapters"),
        (["lora", "lora"], "lora does not work with adapters"),
        (["key_value", "lora"], "key_value does not work with adapters"),
        (["c_rlft", "c_rlft"], "c_rlft and c_rlft do not combine, because each makes the rows its own way; choose one of them"),
    ],
    ids=str,
)
def test_a_pair_that_does_not_go_together_is_refused_with_a_sentence(names: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        combine([make(n) for n in names], set())


@pytest.mark.parametrize(
    "names",
    [["hft", "migu"], ["hft", "c_rlft"], ["migu", "lora"], ["c_rlft", "lora"], ["migu", "c_rlft", "hft"], ["hft", "key_value"]],
    ids=str,
)
def test_pairs_that_go_together_are_let_through(names: list[str]) -> None:
    combine([make(n) for n in names], {"ddp", "fused", "gradient_checkpointing"})


def test_adapters_of_key_value_count_as_adapters() -> None:
    with pytest.raises(UserError, match="hft does not work with adapters"):
        combine([make("hft"), make("key_value", adapt="lora")], set())
    combine([make("migu"), make("key_value", adapt="lora")], set())


def test_what_a_technique_does_not_support_is_refused_with_the_reason() -> None:
    class Picky(Technique):
        name, supports = "picky", Technique.supports - {"fsdp2", "gradient_checkpointing"}

    for need, match in (
        ("fsdp2", "picky does not work with fsdp2, because it has no rule for sharded weights"),
        ("gradient_checkpointing", "picky does not work with gradient checkpointing, .*; set train.gradient_checkpointing to false"),
        ("4bit", "picky does not work with 4-bit weights"),
    ):
        with pytest.raises(UserError, match=match):
            combine([Picky()], {need})


# ---- liveness --------------------------------------------------------------------------------------------------------
def test_each_technique_of_a_run_says_what_it_did_in_the_first_step(tmp_path: Any) -> None:
    out = go([make("hft"), make("migu", guard="update")], model_of("llama"), tmp_path, rows())
    assert [line.split(":")[0] for line in out.liveness] == ["hft", "migu"] and set(out.facts) == {"hft", "migu"}


def test_nothing_left_to_train_is_refused(tmp_path: Any) -> None:
    class Frozen(Technique):
        name = "ice"

        def select(self, model: Any, anatomy: Any, seed: int) -> None:
            model.requires_grad_(False)

    with pytest.raises(UserError, match="ice leave nothing to train"):
        go(Frozen(), model_of("llama"), tmp_path)
