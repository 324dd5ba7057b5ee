"""LoRAMoE: the base at step 0, one expert is PEFT's LoRA, fused equals looped, and where the constraint's minimum lies."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

import modelwright
from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train.loop import fit
from modelwright.moe.lora import LoraMoeLinear, localized, mass, merged, trainable, wrap
from modelwright.tune.lora_moe import Knobs, LoraMoe

KINDS = ["llama", "mistral", "qwen2", "qwen3"]


def _layer(N: int = 6, r: int = 2, dtype=torch.float64) -> LoraMoeLinear:
    layer = LoraMoeLinear(10, 7, True, experts=N, r=r, alpha=8.0, dtype=dtype)
    torch.nn.init.normal_(layer.lora_B)
    return layer


def _loop(layer: LoraMoeLinear, x: torch.Tensor) -> torch.Tensor:
    """The official form: one small adapter after another."""
    w, r, out = (x @ layer.lora_route.T).softmax(-1), layer.r, F.linear(x, layer.weight, layer.bias)
    for n in range(layer.experts):
        a, b = layer.lora_A[n * r : (n + 1) * r], layer.lora_B[:, n * r : (n + 1) * r]
        out = out + w[..., n : n + 1] * (x @ a.T @ b.T) * layer.scale
    return out


def test_fused_form_is_the_loop_with_all_gradients() -> None:
    layer, x = _layer(), torch.randn(3, 5, 10, dtype=torch.float64, requires_grad=True)
    leaves, g = [x, layer.lora_A, layer.lora_B, layer.lora_route], torch.randn(3, 5, 7, dtype=torch.float64)
    ours, theirs = layer(x), _loop(layer, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(theirs, leaves, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_one_expert_is_peft_s_lora() -> None:
    from peft import LoraConfig, get_peft_model

    base = torch.nn.Sequential(torch.nn.Linear(10, 7))
    peft = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False))
    lora = peft.base_model.model[0]
    (ours,) = wrap(base, ["0"], experts=1, r=3, alpha=6)
    ours.load_state_dict({"lora_A": lora.lora_A.default.weight, "lora_B": lora.lora_B.default.weight}, strict=False)
    x = torch.randn(5, 10)
    torch.testing.assert_close(base(x), peft(x))
    base(x).square().sum().backward()
    peft(x).square().sum().backward()
    torch.testing.assert_close(ours.lora_A.grad, lora.lora_A.default.weight.grad)
    torch.testing.assert_close(ours.lora_B.grad, lora.lora_B.default.weight.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_step_0_is_the_base_bit_for_bit_and_the_count_is_the_formula(kind: str) -> None:
    model, ids = model_of(kind), torch.randint(3, 96, (2, 9))
    want = model(ids).logits
    t = LoraMoe(Knobs(experts=6, r=4))
    t.attach(model, Anatomy(model))
    assert torch.equal(model(ids).logits, want)
    free = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert free == trainable([(32, 48), (32, 48), (48, 32)] * 2, 6, 4) == t.facts()["trainable"]


@pytest.mark.parametrize(("convention", "match"), [("paper", 0.15), ("prefer_match", 0.18333)])
def test_minimum_of_the_constraint_gives_matching_experts_less_weight_as_printed(convention: str, match: float) -> None:
    logits, types = torch.zeros(8, 6, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1] * 4)
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(800):
        optimizer.zero_grad()
        loss = localized(logits.softmax(-1), types, delta=0.1, convention=convention)
        loss.backward()
        optimizer.step()
    q = logits.softmax(-1)[types == 1].detach()
    assert loss < 1e-8
    torch.testing.assert_close(q[:, :3], torch.full_like(q[:, :3], match), atol=1e-4, rtol=0)


def test_constraint_values_and_the_factor_between_the_two_forms() -> None:
    q = torch.tensor([[0.1, 0.9], [0.4, 0.6]], dtype=torch.float64)
    z = torch.tensor([0.11, 0.81, 0.36, 0.66], dtype=torch.float64)
    found = [float(localized(q, torch.tensor([1, 0]), convention="paper", form=f)) for f in ("paper", "official")]
    assert found[0] == pytest.approx(float(z.var() / z.mean())) and found[0] / found[1] == pytest.approx(float(z.mean()), rel=1e-6)
    assert float(localized(torch.full((4, 6), 1 / 6), None)) == 0


def test_mass_is_a_mean_over_real_tokens() -> None:
    w, real = torch.rand(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    torch.testing.assert_close(mass(w, real)[0], w[0, :3].mean(0))
    torch.testing.assert_close(mass(w, real, "sum")[0], w[0, :3].sum(0))


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_the_constraint_of_a_batch_knows_no_padding_and_no_empty_row(kind: str) -> None:
    t = LoraMoe(Knobs(mass=kind, types="kind", delta=0.3))
    t.types = torch.tensor([0, 1, 1, 0])
    (term,) = t.terms()
    real = torch.arange(5) < torch.tensor([3, 5, 0, 1])[:, None]
    batch = {"real": real, "example_id": torch.tensor([2, 0, 3, 1])}
    gates = [torch.rand(4, 5, 6).softmax(-1) for _ in range(2)]
    found = []
    for noise in (0.0, 7.0):
        t.sink[:] = [torch.where(real[..., None], w, w + noise * torch.rand_like(w)) for w in gates]
        found.append(term.sums(batch, None))
    assert torch.equal(*found)
    q = [torch.stack([w[b][real[b]].sum(0) / (int(real[b].sum()) if kind == "mean" else 1) for b in (0, 1, 3)]) for w in gates]
    want = sum(localized(each, torch.tensor([1, 0, 1]), delta=0.3) for each in q)
    torch.testing.assert_close(found[0], want[None])


def test_merged_is_the_layer_with_its_gate_fixed() -> None:
    layer, x = _layer(), torch.randn(5, 10, dtype=torch.float64)
    torch.nn.init.zeros_(layer.lora_route)  # a uniform gate
    torch.testing.assert_close(F.linear(x, merged(layer), layer.bias), layer(x), rtol=1e-12, atol=1e-12)
    gate = torch.rand(6, dtype=torch.float64)
    want = _loop(layer, x) - F.linear(x, layer.weight, layer.bias)
    parts = torch.stack([layer.scale * x @ layer.lora_A[2 * n : 2 * n + 2].T @ layer.lora_B[:, 2 * n : 2 * n + 2].T for n in range(6)])
    torch.testing.assert_close(parts.mean(0), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(F.linear(x, merged(layer, gate) - layer.weight), (gate[:, None, None] * parts).sum(0))


def _table(folder):
    rows = [{"input_ids": [(7 * i + j) % 90 + 3 for j in range(14)], "kind": i % 2} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder / "rows.jsonl")


_TRAIN = Train(tokens=400, batch=4, context=16, lr=2e-2, warmup=0.0, save_every=100)


def _run(folder, **changes):
    knobs = Knobs(**{"beta": 1.0, "types": "kind", "dropout": 0.0, **changes})
    t, model = LoraMoe(knobs), model_of("llama").train()
    data = Data(_table(folder), "input_ids")
    rows = t.rows(data, None, 96, _TRAIN, 0)
    return t, fit(model, rows, _TRAIN, techniques=[t], evals={}, folder=folder / "run", seed=0)


def _group_gap(t: LoraMoe, model, rows_of_type) -> float:
    """Mean share that type-1 samples give to the first half of the experts, minus what type-0 samples give."""
    found = []
    for kind in (1, 0):
        t.sink.clear()
        for layer in t.layers:
            layer.sink = t.sink
        model.train()
        with torch.no_grad():
            model(input_ids=rows_of_type(kind), use_cache=False)
        found.append(torch.stack([w[..., : t.knobs.experts // 2].sum(-1).mean() for w in t.sink]).mean())
    return float(found[0] - found[1])


def test_the_base_does_not_move_and_groups_part_only_under_the_constraint(tmp_path) -> None:
    gaps = []
    for beta in (0.0, 5.0):
        (tmp_path / str(beta)).mkdir()
        t, outcome = _run(tmp_path / str(beta), beta=beta, delta=0.5)
        base = dict(model_of("llama").named_parameters())
        assert all(torch.equal(p, base[n]) for n, p in outcome.model.named_parameters() if n in base)
        assert "others" in outcome.liveness[0]
        of = lambda kind: torch.tensor([[(7 * i + j) % 90 + 3 for j in range(14)] for i in range(kind, 16, 2)])  # noqa: E731
        gaps.append(_group_gap(t, outcome.model, of))
    assert gaps[1] > gaps[0] + 0.02


def test_constraint_is_the_same_when_activations_are_recomputed(tmp_path) -> None:
    found = []
    for recompute in (False, True):
        folder = tmp_path / str(recompute)
        folder.mkdir()
        t = LoraMoe(Knobs(beta=1.0, types="kind", dropout=0.0))
        rows = t.rows(Data(_table(folder), "input_ids"), None, 96, _TRAIN, 0)
        train = Train(tokens=200, batch=4, context=16, lr=2e-2, warmup=0.0, gradient_checkpointing=recompute)
        found.append(fit(model_of("llama").train(), rows, train, techniques=[t], evals={}, folder=folder / "run", seed=0).model)
    for a, b in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", ["no", "uniform"])
def test_result_saves_and_loads(merge: str, tiny, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    train = {"tokens": 200, "batch": 2, "context": 16, "lr": 1e-2, "warmup": 0.0}
    knobs = {"data": Data(_table(tmp_path), "input_ids"), "types": "kind", "merge": merge, "train": train}
    result = modelwright.run("tune.lora_moe", base=tiny("llama"), to=tmp_path / "out", **knobs)
    model = AutoModelForCausalLM.from_pretrained(result.to)
    assert type(model).__name__ == ("LoraMoeLlamaForCausalLM" if merge == "no" else "LlamaForCausalLM")
    assert any("lora_B" in n and p.any() for n, p in model.named_parameters()) == (merge == "no")


def test_released_samples_have_their_types_and_only_outputs_are_learnt(shared) -> None:
    t = LoraMoe(Knobs(types="task_type"))
    tokenizer = Checkpoint("seedling").tokenizer()
    rows = t.rows(Data(str(shared / "loramoe_tiny" / "train.json")), tokenizer, 1 << 20, Train(context=256), 0)
    assert len(rows) == 1565 and int(t.types.sum()) == 300
    first = json.loads((shared / "loramoe_tiny" / "train.json").read_text())[0]
    learnt = tokenizer.decode(rows.labels[0][rows.labels[0] >= 0].tolist(), skip_special_tokens=True)
    assert learnt == first["output"]


class _Letters:
    """One token a letter."""

    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def _asked(folder, *rows):
    (folder / "asked.jsonl").write_text("".join(json.dumps(dict(zip(("instruction", "output"), r, strict=True))) + "\n" for r in rows))
    return LoraMoe(Knobs()).rows(Data(str(folder / "asked.jsonl")), _Letters(), 200, Train(context=12), 0)


def test_a_long_instruction_loses_its_beginning_a_long_output_its_end_and_both_are_counted(tmp_path) -> None:
    rows = _asked(tmp_path, ("context question?", "out"), ("q", "a"), ("question", "o" * 30), ("", "b" * 12))
    text = lambda i: "".join(map(chr, rows.ids[i][: rows.lengths[i]].tolist())).replace("\2", "|")  # noqa: E731
    assert [text(i) for i in range(4)] == ["estion?|out|", "q|a|", "o" * 12, "b" * 12]
    assert rows.facts["instructions cut at the context"] == 2 and rows.facts["outputs cut at the context"] == 2
    assert rows.facts["longer than the context, left out"] == 0


@pytest.mark.parametrize("output", [["x", "y"], {"a": 1}, None, [1, [2]]])
def test_an_output_that_is_neither_text_nor_tokens_is_named(output, tmp_path) -> None:
    with pytest.raises(UserError, match="row 2 holds"):
        _asked(tmp_path, ("q", "a"), ("q", output))


def test_its_experts_cannot_be_masked_by_migu(tmp_path) -> None:
    from modelwright.tune.migu import Knobs as MiguKnobs
    from modelwright.tune.migu import Migu

    rows = LoraMoe(Knobs(types="kind")).rows(Data(_table(tmp_path), "input_ids"), None, 96, _TRAIN, 0)
    t = LoraMoe(Knobs(beta=0.0))
    for methods in ([t, Migu(MiguKnobs())], [Migu(MiguKnobs()), t]):
        with pytest.raises(UserError, match="migu cannot mask LoRAMoE's experts"):
            fit(model_of("llama").train(), rows, _TRAIN, techniques=methods, evals={}, folder=tmp_path / "run", seed=0)


def test_what_cannot_be_is_said(tmp_path) -> None:
    with pytest.raises(UserError, match="only llama"):
        LoraMoe(Knobs()).attach(m := model_of("gpt_neox"), Anatomy(m))
    with pytest.raises(UserError, match="no column 'sort'"):
        LoraMoe(Knobs(types="sort")).rows(Data(_table(tmp_path), "input_ids"), None, 96, _TRAIN, 0)
    with pytest.raises(UserError, match="no plain linear"):
        LoraMoe(Knobs(roles=["expert.down"])).attach(m := model_of("llama"), Anatomy(m))
