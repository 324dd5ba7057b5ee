"""Ways to tune that change routing while training: evaluation, the saved model and the hooks."""

from pathlib import Path

import pytest
import torch

from families import model_of, sigmoid_moe
from modelwright.core.data.rows import IGNORE, Rows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.loop import fit
from modelwright.moe.execute import use
from modelwright.moe.rectify import rectify as route
from modelwright.moe.routing import BROADCAST, CHOSEN, capacity
from modelwright.moe.watch import routers
from modelwright.tune import gw_moe, rectify

_TRAIN = Train(tokens=160, batch=2, lr=1e-2, warmup=0.0, save_every=100)


def _rows(padded: bool = True) -> Rows:
    ids, lengths = (
        torch.randint(3, 96, (8, 12), generator=torch.Generator().manual_seed(0)),
        torch.tensor([12, 12, 9, 12, 7, 12, 12, 12] if padded else [12] * 8),
    )
    return Rows(ids.int(), torch.where(torch.arange(12) < lengths[:, None], ids, IGNORE).int(), lengths)


def _fit(technique, folder: Path, train: Train = _TRAIN, padded: bool = True):
    model = use(model_of("mixtral").train())
    outcome = fit(model, _rows(padded), train, techniques=[technique], evals={"e": _rows()}, folder=folder, seed=0)
    technique.export(model, folder)
    return outcome


NEVER = 1.38624  # nats: all that 4 experts can give is 1.38625, where they are all alike


def test_gw_moe_without_an_uncertain_token_trains_bit_for_bit_as_plain_and_says_so(tmp_path) -> None:
    from modelwright.tune.full import Full, Knobs

    plain = _fit(Full(Knobs()), tmp_path / "a", padded=False).model.state_dict()
    same = _fit(t := gw_moe.GwMoe(gw_moe.Knobs(threshold=NEVER)), tmp_path / "b", padded=False).model.state_dict()
    assert all(torch.equal(a, same[n]) for n, a in plain.items()) and t.facts()["share of uncertain tokens"] == 0
    other = _fit(gw_moe.GwMoe(gw_moe.Knobs(threshold=0.0)), tmp_path / "c")
    assert "100.0% of the tokens were uncertain" in other.liveness[0]


def test_gw_moe_leaves_evaluation_alone(tmp_path) -> None:
    from modelwright.tune.full import Full, Knobs

    plain, other = (_fit(t, tmp_path / t.name) for t in (Full(Knobs()), gw_moe.GwMoe(gw_moe.Knobs(threshold=0.0))))
    assert plain.evals[0]["loss"] == other.evals[0]["loss"] and plain.evals[-1]["loss"] != other.evals[-1]["loss"]


@pytest.mark.parametrize("unit", ["share", "normalised"])
def test_share_of_uncertain_tokens_counts_a_recomputed_pass_once(unit: str, tmp_path) -> None:
    found = []
    for recompute in (False, True):
        t = gw_moe.GwMoe(gw_moe.Knobs(threshold=0.4, unit=unit))
        train = Train(tokens=160, batch=2, lr=1e-2, warmup=0.0, gradient_checkpointing=recompute)
        outcome = _fit(t, tmp_path / f"{unit}{recompute}", train=train)
        found.append((t.tokens, t.facts()["share of uncertain tokens"], outcome.model.state_dict()))
    assert found[0][:2] == found[1][:2]
    assert all(torch.allclose(a, found[1][2][n], atol=1e-6) for n, a in found[0][2].items())


def test_rectify_without_a_limit_is_plain_training_and_hooks_are_gone(tmp_path) -> None:
    from modelwright.tune.full import Full, Knobs

    plain = _fit(Full(Knobs()), tmp_path / "a")
    free = _fit(t := rectify.Rectify(rectify.Knobs(factor=1e9, fill_in=False)), tmp_path / "b")
    # equal but for the sum of the weights, which carries no gradient here; the forward pass is the same
    assert free.evals[0]["loss"] == pytest.approx(plain.evals[0]["loss"], rel=1e-6)
    assert t.facts() == {"dropped": 0.0, "filled in": 0.0, "rectified tokens": 0.0}
    assert not free.model._forward_pre_hooks and all(len(r._forward_hooks) <= 1 for _, r in routers(free.model))


def test_rectify_is_under_the_capacity_in_evaluation_too_and_says_what_it_dropped(tmp_path) -> None:
    free, tight = (_fit(rectify.Rectify(rectify.Knobs(factor=f, fill_in=False, intra=False)), tmp_path / str(f)) for f in (1e9, 0.3))
    assert free.evals[0]["loss"] != tight.evals[0]["loss"] and "% dropped" in tight.liveness[0]
    both = _fit(rectify.Rectify(rectify.Knobs(factor=0.5)), tmp_path / "both")
    assert all(both.facts["rectify"][n] > 0 for n in ("dropped", "rectified tokens"))


def test_packed_rows_train_and_their_padding_takes_no_slot(tmp_path) -> None:
    from modelwright.core.data.packing import Texts, packed

    texts = Texts(ids=[torch.arange(3, 3 + n).tolist() for n in (9, 5, 4, 7, 11)], weights=[[1.0] * n for n in (9, 5, 4, 7, 11)])
    rows = packed(texts, 12, 4, seed=0)
    assert rows.segments is not None and rows.tokens < rows.ids.numel()
    t = rectify.Rectify(rectify.Knobs(factor=0.5, fill_in=False, intra=False))
    train = Train(epochs=1.0, batch=len(rows) + 2, lr=1e-2, warmup=0.0, save_every=100)  # two of the rows are empty
    fit(use(model_of("mixtral").train()), rows, train, techniques=[t], evals={}, folder=tmp_path, seed=0)
    slots = capacity(rows.tokens, 4, 2, 0.5)
    assert t.tokens == 2 * rows.tokens and int(t.routed[CHOSEN]) <= 2 * 4 * slots  # two layers


def test_after_training_the_model_is_stock_even_before_it_is_exported(tmp_path) -> None:
    model = model_of("mixtral").train()
    before = model.config._experts_implementation
    fit(model, _rows(), _TRAIN, techniques=[rectify.Rectify(rectify.Knobs(factor=0.3))], evals={}, folder=tmp_path, seed=0)
    stock, ids = model_of("mixtral"), torch.arange(3, 19)[None]
    stock.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(ids).logits, stock(ids).logits) and model.config._experts_implementation == before


def test_simulated_ranks_that_are_not_the_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("mixtral")
    monkeypatch.setattr("modelwright.core.train.dist.world", lambda: 2)
    for ranks in (1, 2):
        rectify.Rectify(rectify.Knobs(ranks=ranks)).select(model, Anatomy(model), 0)
    with pytest.raises(UserError, match="ranks=4 but 2 processes train"):
        rectify.Rectify(rectify.Knobs(ranks=4)).select(model, Anatomy(model), 0)


def test_a_way_to_reroute_has_to_say_how() -> None:
    from modelwright.tune.rerouting.technique import Rerouted

    with pytest.raises(TypeError, match="change"):
        Rerouted()  # type: ignore[abstract]


def _technique(name: str):
    return rectify.Rectify(rectify.Knobs(factor=0.5)) if name == "rectify" else gw_moe.GwMoe(gw_moe.Knobs(threshold=0.5, unit="share"))


@pytest.mark.parametrize("names", [("gw_moe", "rectify"), ("rectify", "gw_moe")])
def test_two_reroutings_of_one_model_are_refused_and_the_model_stays_untrained(names: tuple[str, str], tmp_path) -> None:
    model = use(model_of("mixtral").train())
    with pytest.raises(UserError, match="rerouted already"):
        fit(model, _rows(), _TRAIN, techniques=[_technique(n) for n in names], evals={}, folder=tmp_path, seed=0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), model_of("mixtral").parameters(), strict=True))


def _residual():
    from modelwright.models.rmoe import RMoEConfig, RMoEForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = RMoEConfig(**sizes, num_hidden_layers=2, num_local_experts=4, router_width=8, router_residual=0.5, pad_token_id=0)
    return RMoEForCausalLM(config)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("rectify", lambda: model_of("olmoe")),
        ("rectify", lambda: model_of("qwen2_moe", norm_topk_prob=False)),
        ("rectify", sigmoid_moe),
        ("rectify", _residual),
        ("gw_moe", sigmoid_moe),
    ],
)
@pytest.mark.parametrize("evals", [False, True])
def test_a_model_that_would_change_without_a_limit_is_refused_before_it_is_trained(name: str, make, evals: bool, tmp_path) -> None:
    model = use(make().train())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserError, match=f"{name} does not go with the routers of .* sigmoid"):
        held_out = {"e": _rows()} if evals else {}
        fit(model, _rows(), _TRAIN, techniques=[_technique(name)], evals=held_out, folder=tmp_path, seed=0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    [
        ("rectify", "qwen2_moe", {"norm_topk_prob": True}),
        ("rectify", "olmoe", {"norm_topk_prob": True}),
        ("rectify", "mixtral", {"dtype": "bfloat16"}),
        ("rectify", "granitemoe", {"dtype": "bfloat16"}),
        ("gw_moe", "qwen2_moe", {"norm_topk_prob": False, "dtype": "bfloat16"}),
    ],
)
def test_a_model_that_weighs_by_a_softmax_is_taken(name: str, kind: str, changes: dict, tmp_path) -> None:
    model = use(model_of(kind, **changes).train())
    assert fit(model, _rows(), _TRAIN, techniques=[_technique(name)], evals={}, folder=tmp_path, seed=0).liveness


@pytest.mark.parametrize("unit", ["share", "normalised"])
@pytest.mark.parametrize("threshold", [None, 1.5])
def test_a_share_needs_a_threshold_of_at_most_one(unit: str, threshold: float | None) -> None:
    with pytest.raises(UserError, match=f"unit={unit} needs a threshold from 0 to 1"):
        gw_moe.GwMoe(gw_moe.Knobs(unit=unit, threshold=threshold))


@pytest.mark.parametrize(("experts", "default"), [(2, 0.5), (4, 1.0), (8, 1.5), (64, 3.0)])
def test_the_default_threshold_can_be_reached_with_any_number_of_experts(experts: int, default: float) -> None:
    model = model_of("mixtral", num_local_experts=experts)
    (t := gw_moe.GwMoe(gw_moe.Knobs())).select(model, Anatomy(model), 0)
    assert t.threshold == pytest.approx(default)


@pytest.mark.parametrize(("unit", "threshold"), [("nats", 1.5), ("nats", 1.3863), ("normalised", 1.0)])
def test_a_threshold_that_no_token_can_reach_is_refused_before_training(unit: str, threshold: float) -> None:
    model = model_of("mixtral")
    with pytest.raises(UserError, match=f"threshold={threshold} {unit} is never reached, because with 4 experts .* at most 1.38625 nats"):
        gw_moe.GwMoe(gw_moe.Knobs(threshold=threshold, unit=unit)).select(model, Anatomy(model), 0)


def _technique_of(kind: str, **knobs):
    """GW-MoE as it stands in the middle of a batch of 3 sequences of 5 tokens, and the scores of a layer."""
    model = model_of(kind)
    (t := gw_moe.GwMoe(gw_moe.Knobs(**knobs))).select(model, Anatomy(model), 0)
    t.terms()
    t.hooks.shape = (3, 5)
    logits = torch.randn(15, 4)
    weights, index = logits.softmax(-1).topk(2)
    return t, logits, weights, index


def test_the_limit_of_gw_moe_is_of_each_sequence() -> None:
    t, logits, weights, index = _technique_of("mixtral", threshold=0.0, limit=1)
    routing = t.change(0, logits, weights, index, None)
    assert routing.token[routing.source == BROADCAST].unique().tolist() == [0, 5, 10]


@pytest.mark.parametrize("match", [False, True])
def test_gw_moe_gives_the_broadcast_the_scale_that_it_was_told(match: bool) -> None:
    t, logits, weights, index = _technique_of("qwen2_moe", threshold=0.0, match_scale=match)
    routing = t.change(0, logits, weights, index, None)
    total = torch.zeros(15).index_add(0, routing.token, routing.weight)
    torch.testing.assert_close(total, weights.sum(1) if match else torch.ones(15))
    assert float(weights.sum(1).max()) < 0.99


@pytest.mark.parametrize(("chosen", "as_if"), [("auto", "ignore_last"), ("any", "any"), ("all", "all"), ("ignore_last", "ignore_last")])
def test_rectify_routes_as_its_settings_say(chosen: str, as_if: str) -> None:
    model = model_of("mixtral", num_local_experts=8)
    (t := rectify.Rectify(rectify.Knobs(factor=0.6, unrouted=chosen, fill_order="code", ranks=2))).select(model, Anatomy(model), 0)
    logits = torch.randn(40, 8) + torch.linspace(0, 2, 8)
    want = route(logits, 2, factor=0.6, unrouted=as_if, fill_order="code", ranks=2)
    found = t.change(0, logits, *logits.softmax(-1).topk(2), None)
    assert all(torch.equal(getattr(found, n), getattr(want, n)) for n in ("token", "expert", "weight", "source"))
    assert (
        len({len(route(logits, 2, factor=0.6, unrouted=u, fill_order="code", ranks=2).token) for u in ("all", "any", "ignore_last")}) == 3
    )


def test_a_step_without_an_uncertain_token_is_said_plainly(tmp_path) -> None:
    assert "NO token was uncertain" in _fit(gw_moe.GwMoe(gw_moe.Knobs(threshold=NEVER)), tmp_path).liveness[0]


def test_generation_with_padding_is_rerouted_and_watched() -> None:
    from modelwright.moe.reroute import rerouted
    from modelwright.moe.watch import watch

    model, ids = model_of("mixtral"), torch.randint(3, 96, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with rerouted(model, lambda layer, x, w, i, real: route(x, 2, real=real)), watch(model) as seen:
        model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert seen.counts.sum(1).tolist() == [2 * (10 + 2 * 2)] * 2


def test_a_dense_model_is_refused() -> None:
    model = model_of("llama")
    with pytest.raises(UserError, match="no experts"):
        gw_moe.GwMoe(gw_moe.Knobs()).select(model, Anatomy(model), 0)


def test_a_bf16_mixture_of_any_width_is_rerouted(tmp_path) -> None:
    for t in (gw_moe.GwMoe(gw_moe.Knobs(threshold=0.5, unit="share")), rectify.Rectify(rectify.Knobs(factor=0.5))):
        model = model_of("mixtral", dtype="bfloat16", intermediate_size=42).train()
        fit(model, _rows(), _TRAIN, techniques=[t], evals={"e": _rows()}, folder=tmp_path / t.name, seed=0)
        assert t.tokens and torch.isfinite(t.export(model, tmp_path)(_rows().ids.long()).logits).all()
