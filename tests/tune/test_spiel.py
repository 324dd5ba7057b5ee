"""tune.spiel: exactly k entries, moved as by a dense optimizer, grown where the dense gradient is large; plain weights at the end."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from families import model_of
from modelwright import registry
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train.technique import Technique
from modelwright.tune.c_rlft import CRlft
from modelwright.tune.c_rlft import Knobs as CRlftKnobs
from modelwright.tune.sparse.layer import VALUES
from modelwright.tune.sparse.rules import adam, replaced, seeds, share, sm3
from modelwright.tune.spiel import BETAS, Knobs, Spiel, budget, targets
from small import Fatal, batches, far, go, passes, rows, same, weights

QUICK: dict[str, Any] = {"rank": 1, "reselect": 3, "window": 2}


def spiel(**knobs: Any) -> Spiel:
    return Spiel(Knobs(**{**QUICK, **knobs}))


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    ids = rows().ids.long() if ids is None else ids
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, **more).logits


def attached(kind: str, technique: Spiel, **changes: Any) -> Any:
    """The model with its entries, drawn."""
    model = model_of(kind, **changes)
    anatomy = Anatomy(model)
    technique.attach(model, anatomy)
    technique.select(model, anatomy, 0)
    return model


def filled(model: Any) -> Any:
    """All values drawn, as after training."""
    torch.manual_seed(4)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith(VALUES):
                p.copy_(torch.randn_like(p) * 0.2)
    return model


def distinct(technique: Spiel) -> bool:
    return all(len(d.indices.unique()) == len(d.indices) for d in technique.deltas.values())


KINDS = ["llama", "qwen2", "qwen3", "gpt2", "phi3", "gemma2", "t5", "bert", "mixtral"]


# ---- the layer ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_base_and_merges_into_what_it_was(kind: str, tmp_path: Path) -> None:
    base, technique = model_of(kind), spiel()
    before = weights(base)
    model = attached(kind, technique)
    assert torch.allclose(logits(model), logits(base), atol=1e-6)
    if kind != "gpt2":  # addmm rounds in another way
        assert torch.equal(logits(model), logits(base))
    changed = logits(filled(model))
    assert float((changed - logits(base)).abs().max()) > 1e-3
    merged = technique.export(model, tmp_path)
    assert type(merged) is type(base) and weights(merged).keys() == before.keys()
    assert float((logits(merged) - changed).abs().max()) <= 1e-6 * float(changed.abs().max() + 1)
    for n, p in weights(merged).items():
        delta = technique.deltas.get(n.removesuffix(".weight"))
        assert int((p != before[n]).sum()) == (0 if delta is None else len(delta.indices)), n
    assert all(type(m).__name__ == type(base.get_submodule(n)).__name__ for n, m in merged.named_modules())


def test_values_of_zero_leave_every_bit_of_the_base(tmp_path: Path) -> None:
    technique = spiel()
    merged = technique.export(attached("llama", technique), tmp_path)
    assert same(weights(merged), weights(model_of("llama")))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_gradient_of_the_values_is_that_of_the_weight_at_their_places(kind: str) -> None:
    technique = spiel()
    model, plain = attached(kind, technique), model_of(kind)
    data = batches(rows(4, ragged=True), 4)
    plain.requires_grad_(True)
    for m in (model, plain):
        passes(m, Technique(), data)
    for path, delta in technique.deltas.items():
        dense = plain.get_parameter(f"{path}.weight").grad.flatten()
        got = model.get_submodule(path).get_parameter(VALUES).grad
        assert torch.allclose(got, dense[delta.indices.long()], atol=1e-6)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith(VALUES))


# ---- the optimizers --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_all_entries_without_growth_are_adamw_on_the_matrices(decay: float, tmp_path: Path) -> None:
    class Queries(Technique):
        def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
            for n, p in model.named_parameters():
                p.requires_grad_("q_proj.weight" in n)

    options: dict[str, Any] = {"epochs": 4, "schedule": "linear", "clip": 0.1}
    technique = spiel(roles=["attn.q"], rank=None, tunable=2 * 32 * 32, growth="none", eps=1e-8)
    model, dense = model_of("llama"), model_of("llama")
    go(technique, model, tmp_path / "a", weight_decay=0.0, **options)
    go(Queries(), dense, tmp_path / "b", weight_decay=0.0, **options)
    merged = technique.export(model, tmp_path)
    assert all(len(d.indices) == d.numel for d in technique.deltas.values())
    assert far(weights(merged), weights(dense)) < 3e-6 < 1e-2 < far(weights(merged), weights(model_of("llama")))
    if decay:  # decay pulls the values to 0, which is the base
        pulled = model_of("llama")
        again = spiel(roles=["attn.q"], rank=None, tunable=2 * 32 * 32, growth="none")
        go(again, pulled, tmp_path / "c", weight_decay=10 * decay, **options)
        norms = [far(weights(again.export(pulled, tmp_path)), weights(model_of("llama"))), far(weights(merged), weights(model_of("llama")))]
        assert norms[0] < norms[1]


def test_adam_with_ages_is_torch_adamw_for_each_entry_by_its_own_age() -> None:
    torch.manual_seed(0)
    grads = torch.randn(6, 5)
    state = {"m": torch.zeros(5), "v": torch.zeros(5), "age": torch.zeros(5)}
    values, reference = torch.zeros(5), torch.nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.AdamW([reference], lr=0.1, eps=1e-6, weight_decay=0.2)
    for g in grads:
        values = adam(values, g, state, 0.1, 0.2, BETAS, 1e-6)
        reference.grad = g.clone()
        optimizer.step()
    assert torch.allclose(values, reference.detach(), atol=1e-6)
    assert torch.equal(state["age"], torch.full((5,), 6.0))


def test_grown_entries_have_the_moments_of_adam_that_ran_through_the_window() -> None:
    g, count = torch.tensor([0.5, -2.0, 1e-3]), 5
    state = {"m": torch.zeros(3), "v": torch.zeros(3), "age": torch.zeros(3)}
    for _ in range(count):  # for gradients that stay the same the two are one
        adam(torch.zeros(3), g, state, 0.1, 0.0, BETAS, 1e-6)
    for name, t in seeds(count * g, count * g * g, count, BETAS).items():
        assert torch.allclose(t, state[name], rtol=1e-5), name
    other = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    s = seeds(other.sum(0), other.square().sum(0), 2, BETAS)  # of others the bias correction gives the means back
    assert torch.allclose(s["m"] / (1 - BETAS[0] ** 2), other.mean(0)) and torch.allclose(
        s["v"] / (1 - BETAS[1] ** 2), other.square().mean(0)
    )


def test_sm3_of_all_entries_is_dense_sm3() -> None:
    torch.manual_seed(0)
    w, r, c = torch.randn(4, 3), torch.zeros(4), torch.zeros(3)
    state, values, at = {"r": torch.zeros(4), "c": torch.zeros(3)}, w.flatten().clone(), torch.arange(12)
    for _ in range(5):
        g = torch.randn(4, 3)
        nu = torch.minimum(r[:, None], c[None]) + g * g  # (o, i), the algorithm as it is written
        r, c = nu.max(1).values, nu.max(0).values
        w = w - 0.1 * g / (nu + 1e-8).sqrt()
        values = sm3(values, g.flatten(), state, 0.1, 0.0, at // 3, at % 3)
        assert torch.allclose(values.view(4, 3), w, atol=1e-6) and torch.allclose(state["r"], r) and torch.allclose(state["c"], c)


# ---- dropping and growing --------------------------------------------------------------------------------------------
def test_small_values_are_dropped_for_the_best_free_candidates_and_what_is_both_stays() -> None:
    values, indices = torch.tensor([0.1, -5.0, 0.01, 3.0, 0.2]), torch.tensor([10, 11, 12, 13, 14])
    # dropped: slots 2 (entry 12), 0 (10), 4 (14); candidate 11 is active, 12 is both dropped and among the best
    slots, new = replaced(values, indices, 3, torch.tensor([11, 12, 20, 21]), torch.tensor([9.0, 8.0, 7.0, 1.0]))
    assert slots.tolist() == [0, 4] and new.tolist() == [2, 3]
    slots, new = replaced(values, indices, 3, torch.tensor([11, 20]), torch.tensor([9.0, 7.0]))  # one candidate for three drops
    assert slots.tolist() == [2] and new.tolist() == [1]
    assert [len(x) for x in replaced(values, indices, 0, torch.tensor([20]), torch.ones(1))] == [0, 0]


def test_candidates_and_their_gradients_are_those_of_the_dense_gradient() -> None:
    window = [batches(rows(4, ragged=True, seed=s), 2) for s in (1, 2)]
    for direct in (False, True):
        technique, plain = spiel(), model_of("llama").requires_grad_(True)
        model = attached("llama", technique)
        technique._direct, technique.optimizer = direct, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
        for i, step in enumerate(window):
            step = [step[0]] if direct else step
            passes(model, technique, step)
            passes(plain, Technique(), step)
            technique.t += 1
            for path, delta in technique.deltas.items():
                dense = plain.get_parameter(f"{path}.weight").grad.flatten()
                assert delta.candidates is not None and torch.allclose(technique._now[path], dense[delta.candidates], atol=1e-6)
                if i == 0:
                    assert set(delta.candidates.tolist()) == set(dense.abs().topk(len(delta.indices)).indices.tolist())
        assert all(d.dense is None for d in technique.deltas.values())


@pytest.mark.parametrize("growth", ["ag", "ma"])
@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_exactly_k_distinct_entries_and_as_many_replaced_as_the_schedule_says(growth: str, decay: str, tmp_path: Path) -> None:
    technique, history = spiel(growth=growth, decay=decay), []
    change = technique._reselect

    def watched(path: str, param: Any, p: float) -> None:
        before, count = set(technique.deltas[path].indices.tolist()), technique._replaced
        change(path, param, p)
        delta = technique.deltas[path]
        gone = len(before - set(delta.indices.tolist()))
        assert gone == technique._replaced - count <= int(len(delta.indices) * p)
        assert len(delta.indices.unique()) == len(before) == len(delta.indices)
        history.append((technique.t, p))

    technique._reselect = watched  # type: ignore[method-assign]
    out = go(technique, model_of("llama"), tmp_path, epochs=4)
    steps = sorted({t for t, _ in history})
    assert steps == [2, 5, 8] and out.facts["spiel"]["replaced"] > 0 and distinct(technique)
    assert {p for t, p in history if t == 2} == {1.0 if decay == "linear" else share(2, 8, 0.2, "cosine", True)}
    assert {p for t, p in history if t == 5} == {share(5, 8, 0.2, decay, False)} and share(8, 8, 0.2, decay, False) < 1e-12


def test_a_fixed_mask_stays(tmp_path: Path) -> None:
    technique, fresh = spiel(growth="none"), spiel(growth="none")
    go(technique, model_of("llama"), tmp_path, epochs=4)
    attached("llama", fresh)
    assert all(torch.equal(technique.deltas[n].indices, d.indices) for n, d in fresh.deltas.items())


def test_windows_are_as_long_as_they_say_and_the_official_ones_a_step_longer() -> None:
    ours, theirs = (Spiel(Knobs(legacy_window=legacy)) for legacy in (False, True))
    assert [t for t in range(1, 50) if ours.collects(t)] == [*range(1, 6), *range(21, 26), *range(41, 46)]
    assert [t for t in range(1, 50) if theirs.collects(t)] == [*range(1, 6), *range(20, 26), *range(40, 46)]


# ---- the budget ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "want"), [("7b", 159_907_840), ("13b", 250_347_520)])
def test_budget_is_that_of_lora_of_rank_64_on_all_linear_layers(size: str, want: int) -> None:
    wide = {} if size == "7b" else {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    with torch.device("meta"):
        anatomy = Anatomy(transformers.LlamaForCausalLM(transformers.LlamaConfig(**wide)))
    parts = targets(anatomy, [])
    assert sum(64 * sum(p.shape) for p in parts) == want
    counts = budget(anatomy, parts, Knobs(rank=64))
    assert want - len(counts) < sum(counts) <= want
    total = sum(p.size for p in anatomy)
    assert int(0.01 * total) - len(counts) < sum(budget(anatomy, parts, Knobs())) <= int(0.01 * total)


# ---- through the loop --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("growth", ["ag", "ma"])
def test_an_accumulated_step_is_one_pass(growth: str, tmp_path: Path) -> None:
    found = []
    for batch, accumulate in ((1, 4), (4, 1)):
        technique, model = spiel(growth=growth), model_of("llama")
        technique.settings(rows(), Train(batch=batch, accumulate=accumulate))
        go(technique, model, tmp_path / f"{batch}", rows(8, ragged=True), batch=batch, accumulate=accumulate, epochs=2, lr=1e-3)
        found.append((weights(technique.export(model, tmp_path)), {n: d.indices for n, d in technique.deltas.items()}))
    assert all(set(found[0][1][n].tolist()) == set(found[1][1][n].tolist()) for n in found[0][1])
    assert far(found[0][0], found[1][0]) < 1e-5


@pytest.mark.parametrize(("growth", "stop"), [("ag", 2), ("ma", 4)])
def test_a_run_that_was_stopped_in_a_window_goes_on_bit_for_bit(growth: str, stop: int, tmp_path: Path) -> None:
    def run(name: str, at: int | None = None) -> tuple[Any, Any]:
        technique, model = spiel(growth=growth), model_of("llama")
        out = go(technique, model, tmp_path / name, rows(8), at, batch=2, accumulate=2, epochs=2, save_every=1)
        return weights(technique.export(model, tmp_path / name)), out.facts

    want = run("whole")
    with pytest.raises(Fatal):
        run("broken", stop)
    got = run("broken")
    assert same(got[0], want[0]) and got[1] == want[1]


@pytest.mark.parametrize("kind", ["llama, bf16", "qwen3, tied", "t5", "gpt2"])
def test_other_models_and_recomputation_train(kind: str, tmp_path: Path) -> None:
    name, _, what = kind.partition(", ")
    model = model_of(name, dtype="bfloat16" if what == "bf16" else "float32", **({"tie_word_embeddings": True} if what == "tied" else {}))
    out = go(spiel(), model, tmp_path, epochs=1, batch=4, gradient_checkpointing=True)
    assert "no frozen tensor did" in out.liveness[0]


# ---- saved -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
def test_stock_peft_loads_the_adapter_and_gives_the_merged_model(kind: str, tiny: Any, tmp_path: Path) -> None:
    technique = spiel(rank=2)
    model = filled(attached(kind, technique))
    changed = logits(model)
    merged = technique.export(model, tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SHIRA"
    loaded = peft.PeftModel.from_pretrained(Checkpoint(tiny(kind)).model(), tmp_path / "adapter")
    assert torch.allclose(logits(loaded), changed, atol=1e-5)
    assert far(weights(loaded.merge_and_unload()), weights(merged)) < 1e-6


def test_what_shira_cannot_hold_is_told_and_merged_all_the_same(tmp_path: Path) -> None:
    technique = spiel()
    model = attached("gpt2", technique)
    technique.export(model, tmp_path)
    assert not (tmp_path / "adapter").exists() and technique.facts()["adapter"].startswith("none")


# ---- beside other methods ------------------------------------------------------------------------------------------------
def test_conditioned_chats_train_with_sparse_entries(tmp_path: Path) -> None:
    lines = [
        {
            "messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": f"it is {i + 1}"}],
            "source": "ab"[i % 2],
        }
        for i in range(8)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for turned in (False, True):
        chats = CRlft(CRlftKnobs(weights={"a": 1.0, "b": 0.1}, conditions={"a": "A", "b": "B"}))
        made = chats.rows(Data(path=str(tmp_path / "chats.jsonl")), Checkpoint("seedling").tokenizer(), 2048, Train(context=64), 0)
        technique, model = spiel(), model_of("llama", vocab_size=2048)
        both: list[Technique] = [technique, chats] if turned else [chats, technique]
        out = go(both, model, tmp_path / str(turned), made, batch=2, epochs=1)
        assert len(out.liveness) == 2 and all(n.endswith(VALUES) for n, p in out.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("beside", ["sftmix", "moi", "full"])
def test_it_trains_beside(beside: str, tmp_path: Path) -> None:
    other = registry.techniques_named(beside, {"split": "random"} if beside == "sftmix" else {})
    out = go([*other, spiel()], model_of("llama"), tmp_path, batch=2, epochs=1)
    assert len(out.liveness) == 2


@pytest.mark.parametrize("beside", ["hft", "migu", "key_value", "lora"])
def test_what_chooses_among_frozen_weights_is_refused(beside: str, tmp_path: Path) -> None:
    words = "migu finds nothing to mask" if beside == "migu" else "does not work with adapters, because adapters freeze every base weight"
    with pytest.raises(UserError, match=words):
        go([*registry.techniques_named(beside, {}), spiel()], model_of("llama"), tmp_path)


# ---- bad input -----------------------------------------------------------------------------------------------------------
def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    for words, knobs in (
        ("density is 0", {"rank": None, "density": 0.0}),
        ("tunable and rank are both given", {"tunable": 3}),
        ("window=5 is longer than reselect=3", {"window": 5}),
    ):
        with pytest.raises(UserError, match=words):
            spiel(**knobs)
    with pytest.raises(UserError, match="density=1.5 is out of range"):
        registry.techniques_named("spiel", {"density": 1.5})
    with pytest.raises(UserError, match="3 entries are too few"):
        attached("llama", spiel(rank=None, tunable=3))
    with pytest.raises(UserError, match="roles has 'attn.w'"):
        attached("llama", spiel(roles=["attn.w"]))
    with pytest.raises(UserError, match="spiel does not train with sgd"):
        spiel().settings(rows(), Train(optimizer="sgd"))
