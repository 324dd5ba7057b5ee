"""Balancing while training: the loss balances, the global one does not depend on how a batch is split, the bias moves."""

from pathlib import Path

import pytest
import torch

from families import model_of, sigmoid_moe
from modelwright.core.data.rows import IGNORE, Rows, collate
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.loop import fit
from modelwright.core.train.trainer import forward
from modelwright.moe.watch import watch
from modelwright.tune.balance import Balance, Knobs


def _rows(n: int = 16) -> Rows:
    ids = torch.randint(3, 96, (n, 12), generator=torch.Generator().manual_seed(0)).int()
    return Rows(ids, ids, torch.full((n,), 12))


def _padded(filler: int) -> Rows:
    """Rows of several lengths; what stands in their padding must not matter."""
    ids, lengths = _rows().ids.clone(), torch.tensor([12, 3, 7, 5] * 4)
    real = torch.arange(12) < lengths[:, None]
    ids[~real] = filler
    return Rows(ids, torch.where(real, ids, IGNORE), lengths)


def _skewed(model=None):
    """Every token has a large first entry, and the first expert likes it."""
    model = (model or model_of("mixtral")).train()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()[:, 0] = 2.0
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(0, 0.1)
            layer.mlp.gate.weight[0, 0] += 0.3
    return model


def _fit(technique, folder: Path, model=None, **train):
    settings = {"tokens": 16 * 12 * 4, "batch": 4, "lr": 3e-3, "warmup": 0.0, **train}
    return fit(model or _skewed(), _rows(), Train(**settings), techniques=[technique], evals={}, folder=folder, seed=0)


def _max_violation(model) -> float:
    with watch(model.eval()) as seen, torch.no_grad():
        model(input_ids=_rows().ids.long())
    return seen.facts()["MaxVio"]


@pytest.mark.parametrize("kind", ["switch", "global", "sequence", "cv"])
def test_a_loss_balances_the_load(kind: str, tmp_path) -> None:
    none, some = (
        _max_violation(_fit(Balance(Knobs(kind=kind, coefficient=c)), tmp_path / str(c), tokens=16 * 12 * 8).model) for c in (0.0, 3.0)
    )
    assert some < none - 0.2


@pytest.mark.parametrize("kind", ["switch", "global", "sequence", "z", "cv"])
def test_padding_is_neither_counted_nor_balanced(kind: str) -> None:
    found = []
    for filler in (0, 50):
        t, model, rows = Balance(Knobs(kind=kind)), _skewed(), _padded(filler)
        t.select(model, Anatomy(model), 0)
        (term,) = t.terms()
        batch = collate([rows[i] for i in range(8)])
        batch["input_ids"] = rows.ids[:8, : batch["input_ids"].shape[1]].long()  # the filler too
        t.before_batch(batch)
        outputs = forward(model, batch)
        found.append((t.step.counts.clone(), term.sums(batch, outputs).detach() / term.count(batch)))
        t.facts()
    assert torch.equal(found[0][0], found[1][0]) and found[0][0].sum(1).tolist() == [2 * 2 * (12 + 3 + 7 + 5)] * 2
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)


def test_the_whole_step_is_counted_without_its_padding(tmp_path) -> None:
    t, model = Balance(Knobs(kind="global")), _skewed()
    fit(model, _padded(0), Train(epochs=1.0, batch=2, accumulate=2, lr=1e-3, warmup=0.0), techniques=[t], evals={}, folder=tmp_path, seed=0)
    assert t.total.sum(1).tolist() == [2 * 4 * (12 + 3 + 7 + 5)] * 2


def test_z_loss_makes_logits_small(tmp_path) -> None:
    sizes = []
    for c in (0.0, 1.0):
        model = _fit(Balance(Knobs(kind="z", coefficient=c)), tmp_path / str(c)).model
        with watch(model) as seen, torch.no_grad():
            model(input_ids=_rows().ids.long())
        sizes.append(float(seen.records[0].logits.logsumexp(-1).square().mean()))
    assert sizes[1] < sizes[0]


def test_the_loss_is_the_closed_form_and_gradients_are_those_of_one_batch(tmp_path) -> None:
    """One micro-batch a step: the global loss is the switch loss bit for bit."""
    one, two = (_fit(Balance(Knobs(kind=k, coefficient=1.0)), tmp_path / k).model.state_dict() for k in ("switch", "global"))
    assert all(torch.equal(a, two[n]) for n, a in one.items())
    split = [_fit(Balance(Knobs(kind=k, coefficient=1.0)), tmp_path / f"{k}2", batch=2, accumulate=2).model for k in ("switch", "global")]
    assert not all(torch.equal(a, b) for a, b in zip(split[0].parameters(), split[1].parameters(), strict=True))


def _ours(kind: str):
    from transformers import AutoModelForCausalLM

    from modelwright.models.hyper_moe import HyperMoEConfig
    from modelwright.models.rmoe import RMoEConfig

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 2, "num_local_experts": 4, "pad_token_id": 0}
    torch.manual_seed(0)
    config = RMoEConfig(**sizes, router_width=8) if kind == "rmoe" else HyperMoEConfig(**sizes, hyper_adapter=4, hyper_bottleneck=8)
    model = AutoModelForCausalLM.from_config(config)
    if kind == "hyper_moe":
        return _skewed(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()[:, 0] = 2.0
        for layer in model.model.layers:
            layer.mlp.gate.project.weight.normal_()
            layer.mlp.gate.weight.normal_()
    return model.train()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rmoe", "hyper_moe"])
def test_our_own_mixtures_are_heard_and_balanced(kind: str, tmp_path) -> None:
    none, some = (
        _max_violation(_fit(Balance(Knobs(kind="switch", coefficient=c)), tmp_path / str(c), _ours(kind), tokens=16 * 12 * 16).model)
        for c in (0.0, 10.0)
    )
    assert some < none - 0.1


def test_the_recipe_of_rmoe_trains_with_the_loss() -> None:
    from modelwright.runner import recipe

    step = recipe.read(recipe.RECIPES / "rmoe.yaml").steps[-1]
    assert (step.entry.name, step.knobs.kind, step.knobs.coefficient) == ("tune.balance", "switch", 0.01)


def test_recomputation_changes_nothing(tmp_path) -> None:
    found = []
    for recompute in (False, True):
        t = Balance(Knobs(kind="global", coefficient=1.0))
        found.append((_fit(t, tmp_path / str(recompute), gradient_checkpointing=recompute).model, t.total))
    assert torch.equal(found[0][1], found[1][1]) and int(found[0][1].sum()) == 2 * 2 * 16 * 12 * 4
    for a, b in zip(found[0][0].parameters(), found[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_bias_is_refused_where_there_is_none_and_a_dense_model_too() -> None:
    for kind, knobs, words in (("mixtral", Knobs(kind="bias"), "no bias"), ("llama", Knobs(), "no experts")):
        model = model_of(kind)
        with pytest.raises(UserError, match=words):
            Balance(knobs).select(model, Anatomy(model), 0)


def test_scores_of_sigmoid_routers_are_deepseek_v3_s() -> None:
    """P is the sigmoid over its sum (2412.19437, equations 17 to 20)."""
    t, model = Balance(Knobs(kind="sequence")), sigmoid_moe()
    t.select(model, Anatomy(model), 0)
    logits, real = torch.randn(2 * 5, 4), torch.ones(2, 5, dtype=torch.bool)
    index = logits.topk(2).indices
    s = logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True)
    want = []
    for rows in (slice(0, 5), slice(5, 10)):
        f = 4 / (2 * 5) * index[rows].flatten().bincount(minlength=4)
        want.append((f * s[rows].mean(0)).sum())
    torch.testing.assert_close(t.loss(0, logits, index, real), torch.stack(want).mean())


def test_a_coefficient_that_no_weight_survives_is_refused() -> None:
    from modelwright.core.knobs import build

    with pytest.raises(UserError, match="coefficient"):
        build(Knobs, {"coefficient": 1e30}, "tune.balance", Path())


@pytest.mark.parametrize("kind", ["Glm4Moe", "Dots1"])
def test_models_that_the_bias_names_are_taken(kind: str) -> None:
    import transformers

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_routed_experts": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    Balance(Knobs(kind="bias")).select(model, Anatomy(model), 0)


def test_bias_moves_against_the_load_after_each_step(tmp_path) -> None:
    model = sigmoid_moe()
    with torch.no_grad():
        for layer in _skewed(model).model.layers:
            layer.mlp.gate.e_score_correction_bias.zero_()
    before = _max_violation(model)
    t = Balance(Knobs(kind="bias", rate=0.02))
    outcome = _fit(t, tmp_path, model.train(), lr=1e-5, tokens=16 * 12 * 10)
    biases = [layer.mlp.gate.e_score_correction_bias for layer in outcome.model.model.layers]
    assert all(b.any() and abs(float(b.mean())) < 1e-6 for b in biases)
    assert _max_violation(outcome.model) < before - 0.1


@pytest.mark.parametrize("kind", ["global", "sequence", "z", "cv"])
def test_a_bf16_mixture_of_any_width_is_balanced(kind: str, tmp_path) -> None:
    model = model_of("mixtral", dtype="bfloat16", intermediate_size=42).train()
    outcome = _fit(Balance(Knobs(kind=kind)), tmp_path, model, tokens=16 * 12)
    assert outcome.steps == 4 and torch.isfinite(outcome.model(_rows().ids.long()).logits).all()
