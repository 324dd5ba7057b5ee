"""Macro actions: every segmenter is a plain loop over each response, and PPO's numbers over them are those of a plain loop too."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modelwright.core.model.checkpoint import Checkpoint
from modelwright.rl.macro import segments
from modelwright.rl.macro.segments import LENGTHS, Responses, Segmenter, Sentences, advantages, numbered, spread, summed, weights
from modelwright.rl.rollout.experience import Terms, estimated, kl_of
from modelwright.rl.rollout.objective import policy_losses, value_losses

SEEDLING = Path(segments.__file__).parents[2] / "data" / "seedling"


def made(rows: int = 6, width: int = 40, seed: int = 0, vocab: int = 90) -> Responses:
    """Responses of every length, one of a single token and one that fills its row."""
    g = torch.Generator().manual_seed(seed)
    begin = torch.randint(0, 5, (rows,), generator=g)
    length = torch.randint(1, width - 5, (rows,), generator=g)
    begin[0], length[0], length[1] = 0, width, 1
    at = torch.arange(width)
    mask = (at >= begin[:, None]) & (at < (begin + length)[:, None])
    logp = -torch.rand(rows, width, generator=g) * 3
    return Responses(mask, torch.randint(0, vocab, (rows, width), generator=g), logp, [(seed, i) for i in range(rows)])


def numbers(begins: list[int], count: int) -> list[int]:
    """Numbers of `count` tokens from the places where actions begin."""
    found, now = [], -1
    for i in range(count):
        now += i == 0 or i in begins or i == count - 1
        found.append(now)
    return found


def by_loop(r: Responses, begins_of: Any) -> Tensor:
    out = torch.full_like(r.tokens, -1)
    for row in range(len(r.mask)):
        at = r.mask[row].nonzero().flatten().tolist()
        for place, number in zip(at, numbers(begins_of(row, at), len(at)), strict=True):
            out[row, place] = number
    return out


def _random(r: Responses, repeats: int) -> Any:
    def begins(row: int, at: list[int]) -> list[int]:
        lengths = [n for n in LENGTHS for _ in range(repeats)]
        order = np.random.default_rng(r.keys[row]).permutation(len(lengths))
        found, now = [], 0
        for i in order:
            now += lengths[i]
            found.append(now)
        return found

    return begins


def _rises(r: Responses, official: bool) -> Any:
    def begins(row: int, at: list[int]) -> list[int]:
        p = [math.exp(-float(r.logp[row, i])) for i in at]
        return [i - official for i in range(1, len(p)) if p[i] > p[i - 1]]

    return begins


def _sentences(r: Responses, tokenizer: Any, cutoff: int) -> Any:
    def begins(row: int, at: list[int]) -> list[int]:
        ids = [int(r.tokens[row, i]) for i in at]
        texts = [tokenizer.decode([*tokenizer("a")["input_ids"], i])[1:] for i in ids]
        found, since = [], 0
        for i in range(len(ids)):
            before = texts[i - 1] if i else ""
            quiet = before.rstrip("\"')]")
            stop = before.rstrip().endswith((".", "!", "?")) and before.rstrip(" ") != before
            line = before.rstrip(" ").endswith("\n")
            follows = quiet.endswith((".", "!", "?")) and texts[i][:1].isspace()
            if i == 0 or stop or line or follows or since == cutoff:
                found.append(i)
                since = 0
            since += 1
        return found

    return begins


@pytest.mark.parametrize("seed", range(3))
def test_every_segmenter_is_a_loop_over_each_response(seed: int) -> None:
    r = made(seed=seed)
    for n in (1, 2, 3, 5, 10, 1000):
        assert torch.equal(Segmenter("ngram", n=n)(r), by_loop(r, lambda row, at, n=n: list(range(0, len(at), n))))
    for repeats in (1, 2):
        assert torch.equal(Segmenter("random", repeats=repeats)(r), by_loop(r, _random(r, repeats)))
    for official in (False, True):
        assert torch.equal(Segmenter("perplexity", official=official)(r), by_loop(r, _rises(r, official)))
    assert torch.equal(Segmenter("token")(r), by_loop(r, lambda row, at: at and list(range(len(at)))))


@pytest.mark.parametrize("cutoff", [2, 5])
def test_sentences_are_a_loop_over_the_text(cutoff: int) -> None:
    tokenizer = Checkpoint(SEEDLING).tokenizer()
    text = "Is it red? No. It is blue!\nSee 3.14 and (this one.) So it goes on and on without an end. Yes"
    r = made(vocab=2048, width=60)
    ids = tokenizer(text)["input_ids"][:60]
    r.tokens[0, : len(ids)] = torch.tensor(ids)
    found = Segmenter("parse", sentences=Sentences(tokenizer, cutoff))(r)
    assert torch.equal(found, by_loop(r, _sentences(r, tokenizer, cutoff)))
    assert int(found[0, : len(ids)].max()) >= 6


def test_numbers_never_fall_and_padding_has_none() -> None:
    r = made(rows=20)
    for kind in ("token", "ngram", "random", "perplexity"):
        found = Segmenter(kind)(r)
        assert bool(((found >= 0) == r.mask).all())
        inside = r.mask[:, 1:] & r.mask[:, :-1]
        steps = (found[:, 1:] - found[:, :-1])[inside]
        assert bool(((steps == 0) | (steps == 1)).all())
        assert found[0, 0] == 0


def test_one_long_action_leaves_the_last_token_alone() -> None:
    found = Segmenter("ngram", n=10**6)(made())
    assert found.amax(1).tolist() == [1, 0, 1, 1, 1, 1]


def test_n_of_one_is_plain_ppo() -> None:
    r = made()
    assert torch.equal(Segmenter("ngram", n=1)(r), Segmenter("token")(r))


@pytest.mark.parametrize("how", ["equal", "unit", "position"])
@pytest.mark.parametrize("kind", ["token", "ngram", "random", "perplexity"])
def test_the_shares_of_a_macro_action_sum_to_one(kind: str, how: str) -> None:
    r = made()
    actions = Segmenter(kind)(r)
    shares = weights(actions, how)
    assert not bool(shares[~r.mask].any()) and bool((shares >= 0).all())
    sums = summed(shares, actions)
    there = torch.arange(sums.shape[1]) <= actions.amax(1, keepdim=True)
    assert torch.allclose(sums, there.float(), atol=1e-6)


def test_shares_are_those_of_the_paper() -> None:
    actions = torch.tensor([[-1, 0, 0, 0, 1]])
    assert torch.allclose(weights(actions, "equal"), torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3, 1]]))
    assert torch.equal(weights(actions, "unit"), torch.tensor([[0.0, 0, 0, 1, 1]]))
    assert torch.allclose(weights(actions, "position"), torch.tensor([[0, 6 / 11, 3 / 11, 2 / 11, 1]]))


@pytest.mark.parametrize(("n", "credit"), [(1, "2e-06"), (3, "0.0128"), (5, "0.0731"), (10, "0.2635")])
def test_a_reward_at_the_end_of_256_tokens_reaches_the_first_so_far(n: int, credit: str) -> None:
    r = Responses(torch.ones(1, 256, dtype=torch.bool), torch.zeros(1, 256).long(), torch.zeros(1, 256), [(0,)])
    actions = Segmenter("ngram", n=n)(r)
    rewards = summed(torch.nn.functional.pad(torch.ones(1, 1), (255, 0)), actions)
    gains = advantages(rewards, torch.zeros_like(rewards), 1.0, 0.95)
    assert f"{float(gains[0, 0]):{'.0e' if n == 1 else '.4f'}}" == credit


# ---- the numbers of an update -------------------------------------------------------------------------------------------
def columns(r: Responses, seed: int = 5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    near = r.logp + 0.3 * torch.randn(r.logp.shape, generator=g)
    found = {"logp": near, "reference": r.logp, "values": torch.randn(r.logp.shape, generator=g)}
    return {k: v * r.mask for k, v in found.items()} | {"score": 3 * torch.randn(len(r.mask), generator=g)}


def terms(**changes: Any) -> Terms:
    usual = {"kl": 0.05, "estimator": "k1", "reward_clip": 2.5, "shares": "equal", "aggregate": "sum", "gamma": 0.99, "lam": 0.9}
    return Terms(**{"actions": Segmenter("ngram"), **usual, **changes})


def plain(c: dict[str, Tensor], row: int, at: list[int], groups: list[list[int]], t: Terms) -> tuple[list[float], list[float]]:
    """Advantage and return of each token of one response whose macro actions are `groups` of places."""
    kl = [float(c["logp"][row, i] - c["reference"][row, i]) for i in at]
    rewards = dict(zip(at, [-t.kl * (k if t.estimator == "k1" else math.exp(-k) - 1 + k) for k in kl], strict=True))
    score = float(c["score"][row])
    rewards[at[-1]] += max(-t.reward_clip, min(t.reward_clip, score)) if t.reward_clip else score
    values, sums = [], []
    for group in groups:
        share = [1 / len(group) for _ in group]
        if t.shares == "unit":
            share = [float(i == len(group) - 1) for i in range(len(group))]
        if t.shares == "position":
            share = [1 / (i + 1) / sum(1 / (k + 1) for k in range(len(group))) for i in range(len(group))]
        values.append(sum(s * float(c["values"][row, i]) for s, i in zip(share, group, strict=True)))
        sums.append(sum((s if t.aggregate == "mean" else 1) * rewards[i] for s, i in zip(share, group, strict=True)))
    gains, later = [0.0] * len(groups), 0.0
    for m in reversed(range(len(groups))):
        following = values[m + 1] if m + 1 < len(groups) else 0.0
        later = sums[m] + t.gamma * following - values[m] + t.gamma * t.lam * later
        gains[m] = later
    found = [(gains[m], gains[m] + values[m]) for m, group in enumerate(groups) for _ in group]
    return [a for a, _ in found], [b for _, b in found]


def groups_of(actions: Tensor, row: int, at: list[int], empty: bool = False) -> list[list[int]]:
    count = int(actions[row].max()) + 1
    found = [[i for i in at if int(actions[row, i]) == m] for m in range(count)]
    return found if empty else [g for g in found if g]


CASES = [
    ({}, {}),
    ({"kind": "token"}, {}),
    ({"kind": "perplexity"}, {"estimator": "k3", "reward_clip": 0.0}),
    ({"kind": "random"}, {"aggregate": "mean", "shares": "position"}),
    ({"n": 3}, {"aggregate": "mean", "shares": "unit"}),
    ({"n": 3, "official": True}, {"aggregate": "mean"}),
    ({"n": 1, "official": True}, {}),
]


@pytest.mark.parametrize(("segmenter", "changes"), CASES)
def test_advantages_and_returns_are_those_of_a_plain_loop(segmenter: dict[str, Any], changes: dict[str, Any]) -> None:
    r = made()
    actions, c, t = Segmenter(**{"kind": "ngram", **segmenter})(r), columns(r), terms(**changes)
    found = estimated(c, r.mask, actions, t)
    for row in range(len(r.mask)):
        at = r.mask[row].nonzero().flatten().tolist()
        gains, returns = plain(c, row, at, groups_of(actions, row, at, segmenter.get("official", False)), t)
        assert found["advantages"][row, at].tolist() == pytest.approx(gains, abs=1e-5)
        assert found["returns"][row, at].tolist() == pytest.approx(returns, abs=1e-5)
    assert not bool(found["advantages"][~r.mask].any() or found["returns"][~r.mask].any())


def test_the_official_code_puts_an_empty_action_before_the_last_where_n_divides_the_rest() -> None:
    mask = torch.ones(1, 7, dtype=torch.bool)
    r = Responses(mask, torch.zeros(1, 7).long(), torch.zeros(1, 7), [(0,)])
    assert Segmenter("ngram", n=3)(r).tolist() == [[0, 0, 0, 1, 1, 1, 2]]
    assert Segmenter("ngram", n=3, official=True)(r).tolist() == [[0, 0, 0, 1, 1, 1, 3]]
    assert Segmenter("ngram", n=4, official=True)(r).tolist() == [[0, 0, 0, 0, 1, 1, 2]]


def test_losses_are_those_of_a_plain_loop() -> None:
    g = torch.Generator().manual_seed(1)
    new, old, gains, values, before, returns = (torch.randn(3, 7, generator=g) for _ in range(6))
    policy, value = policy_losses(new, old, gains, 0.2), value_losses(values, before, returns, 0.2)
    for i in range(3):
        for j in range(7):
            ratio = math.exp(float(new[i, j] - old[i, j]))
            a = float(gains[i, j])
            assert float(policy[i, j]) == pytest.approx(max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)), rel=1e-5)
            v, w, goal = float(values[i, j]), float(before[i, j]), float(returns[i, j])
            near = min(max(v, w - 0.2), w + 0.2)
            assert float(value[i, j]) == pytest.approx(0.5 * max((v - goal) ** 2, (near - goal) ** 2), rel=1e-4, abs=1e-6)


def test_k3_is_never_negative_and_both_estimate_the_divergence() -> None:
    g = torch.Generator().manual_seed(2)
    p, q = (torch.randn(5, generator=g).log_softmax(0) for _ in range(2))
    drawn = torch.multinomial(p.exp(), 200_000, replacement=True, generator=g)
    true = float((p.exp() * (p - q)).sum())
    k1, k3 = (kl_of(p[drawn], q[drawn], e) for e in ("k1", "k3"))
    assert bool((k3 >= 0).all()) and float(k1.min()) < 0
    assert float(k1.mean()) == pytest.approx(true, rel=0.05) and float(k3.mean()) == pytest.approx(true, rel=0.05)


def test_spread_gives_each_token_the_value_of_its_action() -> None:
    actions = numbered(torch.tensor([[True, False, True, False, False]]), torch.tensor([[True, True, True, True, False]]))
    assert actions.tolist() == [[0, 0, 1, 2, -1]]
    assert spread(torch.tensor([[5.0, 6.0, 7.0]]), actions).tolist() == [[5.0, 5.0, 6.0, 7.0, 0.0]]
