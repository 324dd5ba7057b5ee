"""tune.migu: which rows move, under every way to run a step; what leaks; what is refused."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from families import model_of
from modelwright.core.data.rows import Rows
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.freeze import units
from modelwright.core.train.technique import Technique
from modelwright.core.train.trainer import forward
from modelwright.tune.lora import Knobs as LoraKnobs
from modelwright.tune.lora import Lora
from modelwright.tune.migu import Knobs, Migu, kept
from small import Fatal, backward, batches, go, moved, named, passes, rows, same, weights

FUSED = ["phi3", "gpt_neox", "gpt2"]


def migu(**knobs: Any) -> Migu:
    return Migu(Knobs(**knobs))


def masks(model: Any, window: list[dict[str, Tensor]], anatomy: Anatomy | None = None, **knobs: Any) -> dict[str, Tensor]:
    """The masks that MIGU makes from these passes."""
    technique = migu(**knobs)
    backward(model, technique, window, anatomy)
    technique.facts()
    return technique.masks


@torch.no_grad()
def loudness(model: Any, batch: dict[str, Tensor], padding: bool = False) -> dict[str, Tensor]:
    """Mean |output| of each linear layer in the blocks, by the name of its weight; written without MIGU."""
    found: dict[str, Tensor] = {}
    parts = {p.name for p in Anatomy(model) if len(p.shape) == 2 and p.layer is not None}
    count = torch.ones_like(batch["real"]) if padding else batch["real"]

    def watch(name: str) -> Any:
        return lambda layer, inputs, out: found.update({name: (out.flatten(0, -2).abs() * count.flatten()[:, None]).sum(0) / count.sum()})

    handles = [m.register_forward_hook(watch(n + ".weight")) for n, m in model.named_modules() if n + ".weight" in parts]
    forward(model, batch)
    for h in handles:
        h.remove()
    return found


def louder(n: Tensor, share: float = 0.7) -> Tensor:
    """All but the floor(share * units) quietest."""
    keep = torch.ones(len(n), dtype=torch.bool)
    keep[n.sort(stable=True).indices[: int(share * len(n))]] = False
    return keep


# ---- which rows ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.0, 0.1, 0.29, 0.5, 0.7, 0.9, 1.0])
def test_kept_rows_are_the_loudest_exactly_counted_or_at_the_official_quantile(share: float) -> None:
    for d in (1, 7, 10, 32, 100):
        n = torch.rand(d, generator=torch.Generator().manual_seed(d))
        keep, official = kept(n, share), kept(n, share, "official")
        assert int((~keep).sum()) == int(share * d + 1e-9)
        assert keep.all() or not keep.any() or n[keep].min() >= n[~keep].max()
        assert torch.equal(official, n >= torch.quantile(n, share)) and abs(int(official.sum()) - int(keep.sum())) <= 1


def test_ties_at_the_quantile_are_all_kept_officially_and_counted_exactly_otherwise() -> None:
    n = torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0])
    assert kept(n, 0.5, "official").tolist() == [False, True, True, True, True] and int(kept(n, 0.5).sum()) == 3


@pytest.mark.parametrize("kind", ["llama", "qwen2", *FUSED, "opt"])
def test_masks_follow_the_mean_output_of_each_layer_and_piece(kind: str) -> None:
    model, window = model_of(kind), batches(rows(ragged=True), 8)
    want, anatomy = loudness(model, window[0]), Anatomy(model)
    for compat, rule in (("paper", louder), ("official", lambda n: n >= torch.quantile(n, 0.7))):
        got = masks(model, window, compat=compat)
        assert got.keys() == want.keys()
        for name, n in want.items():
            for group in [units(anatomy.parts[name], [p]) for p in anatomy.parts[name].rows] or [torch.ones(len(n), dtype=torch.bool)]:
                assert torch.equal(got[name][group], rule(n[group])), name


@pytest.mark.parametrize("kind", FUSED)
def test_each_piece_of_a_fused_projection_keeps_its_share(kind: str) -> None:
    model = model_of(kind)
    for name, mask in masks(model, batches(rows(), 8)).items():
        part = Anatomy(model).parts[name]
        for piece in part.rows:
            mine = mask[units(part, [piece])]
            assert int((~mine).sum()) == int(0.7 * len(mine))


@pytest.mark.parametrize(("layers", "roles"), [("attention", {"attn"}), ("ffn", {"ffn"}), ("all", {"attn", "ffn"})])
def test_layers_chooses_the_kind_of_matrix(layers: str, roles: set[str]) -> None:
    model = model_of("llama")
    got = masks(model, batches(rows(), 8), layers=layers)
    assert got.keys() == {p.name for p in Anatomy(model) if p.role.split(".")[0] in roles}


@pytest.mark.parametrize("tied", [False, True])
def test_head_is_masked_when_asked_for_even_where_it_is_the_embedding(tied: bool) -> None:
    model = model_of("llama", tie_word_embeddings=tied)
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert name not in masks(model, batches(rows(), 8))
    mask = masks(model, batches(rows(), 8), head=True)[name]
    assert int((~mask).sum()) == int(0.7 * 96) and torch.equal(model.get_parameter(name).grad.any(1), mask)


# ---- the same masks however a step is run -------------------------------------------------------------------------------
def test_accumulation_gives_the_masks_of_one_large_batch(tmp_path: Path) -> None:
    data, found = rows(8, ragged=True), []
    for size in (8, 2, 1):
        technique = migu()
        go(technique, model_of("llama"), tmp_path / str(size), data, batch=size, accumulate=8 // size, epochs=1)
        found.append(technique.masks)
    assert same(found[0], found[1]) and same(found[0], found[2]) and len(found[0]) == 14


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_recomputed_activations_are_not_counted_twice(kind: str, reentrant: bool) -> None:
    window, sums = batches(rows(ragged=True), 4), []
    for recompute in (False, True):
        model, technique = model_of(kind), migu()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        seen: list[Tensor] = []
        choose = technique._choose
        technique._choose = lambda t=technique, seen=seen, choose=choose: (seen.extend(t._sums), choose())  # type: ignore[method-assign,misc]
        backward(model, technique, window)
        sums.append((seen, technique.masks))
    (plain, a), (again, b) = sums
    assert same(a, b) and all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


def test_gradient_checkpointing_trains_the_same_weights(tmp_path: Path) -> None:
    a = go(migu(), model_of("llama"), tmp_path / "a", accumulate=2)
    b = go(migu(), model_of("llama"), tmp_path / "b", accumulate=2, gradient_checkpointing=True)
    assert same(weights(a.model), weights(b.model)) and a.liveness == b.liveness


def wider(data: Rows, by: int) -> list[dict[str, Tensor]]:
    """The rows as one batch with more padding."""
    batch = batches(data, len(data))[0]
    longer = {k: torch.nn.functional.pad(v, (0, by), value=-100 if k == "labels" else 0) for k, v in batch.items() if v.dim() == 2}
    return [batch | longer | {"input_ids": torch.nn.functional.pad(batch["input_ids"], (0, by), value=5)}]


def test_padding_does_not_change_the_masks_unless_it_is_counted() -> None:
    model, data = model_of("llama"), rows(ragged=True)
    less, more = wider(data, 0), wider(data, 20)
    assert same(masks(model, less), masks(model, more))
    counted = masks(model, more, include_padding=True)
    assert not same(counted, masks(model, less, include_padding=True))
    want = loudness(model, more[0], padding=True)
    assert all(torch.equal(counted[n], louder(want[n])) for n in want)


def test_a_factor_on_all_rows_of_a_layer_does_not_change_its_mask() -> None:
    model, window, name = model_of("llama"), batches(rows(), 8), "model.layers.1.mlp.down_proj.weight"
    before = masks(model, window)[name]
    for rows_, factor, equal in ((slice(None), 4.0, True), (before.nonzero()[0], 1e-3, False)):
        model.get_parameter(name).data[rows_] *= factor
        assert torch.equal(masks(model, window)[name], before) == equal


# ---- what moves ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("guard", ["grad", "update"])
def test_nothing_masked_is_plain_training_to_the_bit(guard: str, tmp_path: Path) -> None:
    train = {"epochs": 3, "weight_decay": 0.1}
    plain = go(Technique(), model_of("llama"), tmp_path / "a", **train)
    assert same(
        weights(go(migu(threshold=0.0, guard=guard, leak_every=1), model_of("llama"), tmp_path / "b", **train).model), weights(plain.model)
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2", *FUSED])
def test_everything_masked_and_guarded_moves_only_biases_norms_and_embeddings(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    before, masked = weights(model), {p.name for p in Anatomy(model) if p.kind == "weight" and p.role.startswith(("attn.", "ffn."))}
    out = go(migu(threshold=1.0, guard="update"), model, tmp_path, epochs=3, weight_decay=0.1)
    still = before.keys() - moved(out.model, before)
    assert still - {n for n in before if n.endswith("k_proj.bias")} == masked  # softmax cancels a key bias


@pytest.mark.parametrize("kind", ["llama", *FUSED])
def test_masked_rows_stay_to_the_bit_in_every_step_under_guard_update(kind: str, tmp_path: Path) -> None:
    class Checked(Migu):
        steps_seen = 0

        def on_gradients(self, named: Any) -> None:
            named = list(named)
            super().on_gradients(named)
            self.before = {n: p.detach().clone() for n, p in named}

        def after_step(self, named: Any) -> None:
            named = list(named)
            super().after_step(named)
            for n, p in named:
                if (mask := self.masks.get(n)) is not None:
                    across = {t.weight: t.across for t in self.targets}[n]
                    changed = (p != self.before[n]).any(0 if across else 1)
                    assert not changed[~mask].any() and changed[mask].any(), n
            self.steps_seen += 1

    technique = Checked(Knobs(guard="update"))
    go(technique, model_of(kind), tmp_path, epochs=3, weight_decay=0.1, batch=2)
    assert technique.steps_seen == 12


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_descent_with_masks_is_projected_gradient_descent(kind: str) -> None:
    window, plain, model = batches(rows(), 8), model_of(kind), model_of(kind)
    passes(plain, Technique(), window)
    technique = migu()
    backward(model, technique, window)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    anatomy = Anatomy(model)
    for n, p in plain.named_parameters():
        m = technique.masks.get(n, torch.ones(1, dtype=torch.bool))
        m = m if p.dim() < 2 or anatomy.parts[n].orientation == "in_out" else m[:, None]
        assert torch.allclose(model.get_parameter(n), p - 0.1 * m * p.grad, atol=1e-7), n


def test_momentum_leaks_into_masked_rows_and_the_guard_stops_it(tmp_path: Path) -> None:
    leak = {}
    for guard in ("grad", "update"):
        out = go(migu(guard=guard, leak_every=1), model_of("llama"), tmp_path / guard, rows(32), epochs=2)
        leak[guard] = out.facts["migu"]["leak"]
    assert 0.05 < leak["grad"] < 1 and leak["update"] == 0


# ---- LoRA ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", *FUSED])
def test_adapter_a_is_masked_by_its_output_and_b_by_the_merged_layers(kind: str) -> None:
    base, window = model_of(kind), batches(rows(ragged=True), 8)
    anatomy = Anatomy(base)
    model = Lora(LoraKnobs(r=8, roles=["attn.qkv" if kind == "gpt_neox" else "attn.v", "ffn.down"])).attach(base, anatomy)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.copy_(torch.randn_like(p) * 0.2)
    outputs: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_hook(lambda layer, x, y, n=n: outputs.update({n: (y.abs() * window[0]["real"][..., None]).sum((0, 1))}))
        for n, m in model.named_modules()
        if n.endswith("lora_A.default")
    ]
    got = masks(model, window, anatomy)
    for h in hooks:
        h.remove()
    a = {n: m for n, m in got.items() if "lora_A" in n}
    b = {n.replace(".lora_B.default", ""): m for n, m in got.items() if "lora_B" in n}
    assert len(a) == len(b) == len(outputs) == 4 and len(got) == 8
    for n, total in outputs.items():
        assert torch.equal(a[n.removeprefix("base_model.model.") + ".weight"], louder(total))
    assert isinstance(model, peft.PeftModel)
    merged = masks(model.merge_and_unload().requires_grad_(True), window)
    assert same(b, {n: merged[n] for n in b})


# ---- the control, the first task, resuming, probes -----------------------------------------------------------------------
def test_random_rows_have_the_share_change_each_step_and_follow_the_seed() -> None:
    def drawn(seed: int) -> list[dict[str, Tensor]]:
        model, technique = model_of("llama"), migu(rows="random")
        technique.select(model, Anatomy(model), seed)
        found = []
        for _ in range(3):
            passes(model, technique, batches(rows(), 8))
            found.append(dict(technique.masks))
        return found

    a, b, c = drawn(0), drawn(0), drawn(1)
    assert all(int((~m).sum()) == int(0.7 * len(m)) for step in a for m in step.values())
    assert all(same(x, y) for x, y in zip(a, b, strict=True)) and not same(a[0], a[1]) and not same(a[0], c[0])
    pairs = list(a[0].values())
    assert len({tuple(m.tolist()) for m in pairs if len(m) == 32}) > 1  # not one draw for all layers


def test_first_task_is_plain_training_unless_asked_otherwise(tmp_path: Path) -> None:
    plain = weights(go(Technique(), model_of("llama"), tmp_path / "a").model)
    for mask_first in (False, True):
        technique = migu(mask_first=mask_first)
        technique.first_task = True
        assert same(weights(go(technique, model_of("llama"), tmp_path / f"{mask_first}").model), plain) != mask_first


@pytest.mark.parametrize("knobs", [{}, {"rows": "random"}, {"guard": "update"}], ids=str)
def test_resumed_run_is_equal_to_the_bit(knobs: dict[str, Any], tmp_path: Path) -> None:
    def run(folder: str, stop: int | None = None) -> Any:
        technique = migu(leak_every=2, **knobs)
        return go(technique, model_of("llama"), tmp_path / folder, rows(12), stop, batch=2, accumulate=2, epochs=3, save_every=3)

    want = run("a")
    with pytest.raises(Fatal):
        run("b", stop=5)
    got = run("b")
    assert same(weights(got.model), weights(want.model)) and got.facts == want.facts and got.liveness == want.liveness


class Deaf(Migu):
    """One hook is lost, as when another library clears them."""

    def select(self, model: Any, anatomy: Any, seed: int) -> None:
        super().select(model, anatomy, seed)
        self._handles[3].remove()


class Idle(Migu):
    """Masks are made and not applied."""

    def _masked(self, named: Any) -> Any:
        return iter(())


class Shut(Migu):
    """All that should move is put back."""

    def after_step(self, named: Any) -> None:
        self.masks = {n: ~m for n, m in self.masks.items()}
        super().after_step(named)
        self.masks = {n: ~m for n, m in self.masks.items()}


@pytest.mark.parametrize("broken", [Deaf, Idle, Shut])
def test_sabotage_is_found_after_the_first_step(broken: type[Migu], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="migu: "):
        go(broken(Knobs(guard="update")), model_of("llama"), tmp_path)


def test_probe_counts_masked_and_moved_rows(tmp_path: Path) -> None:
    line = go(migu(guard="update"), model_of("llama"), tmp_path).liveness[0]
    each = [int(0.7 * d) for d in (32, 16, 16, 32, 48, 48, 32)]
    assert line.startswith(f"migu: {2 * sum(each)} of {2 * 224} rows of 14 matrices masked, 0 of them moved; ")


def test_hooks_are_gone_after_training(tmp_path: Path) -> None:
    out = go(migu(), model_of("llama"), tmp_path)
    assert not any(m._forward_hooks for m in out.model.modules())


@pytest.mark.parametrize("layers", ["all", "ffn"])
def test_experts_are_refused_and_attention_works(layers: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one tensor.*layers: attention"):
        go(migu(layers=layers), model_of("mixtral"), tmp_path / "a")
    out = go(migu(layers="attention", guard="update"), model_of("mixtral"), tmp_path / "b")
    assert "8 matrices" in out.liveness[0]


def test_nothing_to_mask_is_refused() -> None:
    model = model_of("llama").requires_grad_(False)
    with pytest.raises(UserError, match="nothing to mask"):
        migu().select(model, Anatomy(model), 0)
    assert named(model)
