"""NACL: its draw against enumeration, its limits against other methods, its published figures."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_baselines import B, D, G, H, T, kept, read_of, weights

from modelwright.cache.engine.method import Read
from modelwright.cache.evictors.baselines import H2O
from modelwright.cache.evictors.nacl import NACL, TABLE, averages, budget_table, retention
from modelwright.core.errors import UserError


def test_gumbel_top_k_draws_as_one_after_the_other_with_the_probabilities_softmax_f() -> None:
    """Probabilities of every set of 3 of 7 tokens, enumerated over the orders in which they can be drawn; 500 heads draw at a time."""
    n, heads, times = 3, 500, 60
    one = read_of()
    q, k = one.q[:1, :1, :5], one.k[:1, :1, :8]
    read = Read(q.expand(1, heads, 5, D), k.expand(1, heads, 8, D), k.expand(1, heads, 8, D), D**-0.5, 0, 1)
    p = torch.softmax(read.received(5)[0, 0, :7].double(), 0).tolist()
    assert max(p) > 4 * min(p)
    wanted = dict.fromkeys(itertools.combinations(range(7), n), 0.0)
    for order in itertools.permutations(range(7), n):
        left, chance = 1.0, 1.0
        for i in order:
            chance, left = chance * p[i] / left, left - p[i]
        wanted[tuple(sorted(order))] += chance
    assert math.isclose(sum(wanted.values()), 1)
    seen = dict.fromkeys(wanted, 0)
    for seed in range(times):  # the last token is protected, the proxies choose none
        index, _ = NACL(tokens=n + 1, protect=0.25, random=0.75, proxies=0.5, seed=seed).choose(read)
        assert index is not None and (index[..., -1] == 7).all()
        for drawn in index[0, :, :-1].tolist():
            seen[tuple(drawn)] += 1
    draws = heads * times
    chi2 = sum((seen[s] - draws * w) ** 2 / (draws * w) for s, w in wanted.items())
    assert chi2 < 34 + 4 * math.sqrt(2 * 34)  # 35 sets


def test_without_chance_and_with_all_tokens_as_proxies_it_is_h2o_s_score() -> None:
    read = read_of()
    assert kept(NACL(keep=0.5, random=0, protect=0.5, proxies=1, sinks=0), read) == kept(H2O(keep=0.5), read)


def test_without_chance_and_with_one_proxy_it_is_the_last_token_s_attention_per_head() -> None:
    read = read_of()
    a = weights(read)[:, :, -1].view(B, G, H // G, T).sum(2)
    found = kept(NACL(keep=0.25, random=0, protect=1 / 6, proxies=0), read)
    for b, h in itertools.product(range(B), range(G)):
        assert found[b][h] == sorted([23, *a[b, h, :23].argsort(descending=True)[:5].tolist()])


@pytest.mark.parametrize("lengths", [None, [24, 15]])
def test_first_and_last_tokens_and_the_proxies_choice_always_stay(lengths: list[int] | None) -> None:
    read = read_of(lengths)
    method = NACL(keep=0.5, protect=1 / 3, random=1 / 3, proxies=0.1, sinks=2)
    sets = [kept(NACL(keep=0.5, protect=1 / 3, random=1 / 3, proxies=0.1, sinks=2, seed=s), read) for s in range(30)]
    read.counts = method.counts(read.real, 0, 3)
    first, last, chosen, proxies = (np.broadcast_to(x, (B, 1)) for x in method.split(read.counts, read.real))
    for b, h in itertools.product(range(B), range(G)):
        start = T - (lengths or [T, T])[b]
        sure = [*range(start, start + first[b, 0]), *range(T - last[b, 0], T)]
        F = weights(read)[b, 2 * h : 2 * h + 2, T - proxies[b, 0] :].sum((0, 1))
        rest = sorted((i for i in range(start, T) if i not in sure), key=lambda i, F=F: -float(F[i]))
        sure += rest[: chosen[b, 0]]
        assert all(set(sure) <= set(s[b][h]) for s in sets)
        assert len({tuple(s[b][h]) for s in sets}) > 20  # the rest is left to chance
        assert all(len(s[b][h]) == read.counts[b if lengths else 0, 0] for s in sets)


def test_heads_and_layers_draw_apart_and_seeds_decide() -> None:
    same = read_of()
    same.k, same.q = same.k[:, :1].expand(-1, G, -1, -1), same.q[:, :1].expand(-1, H, -1, -1)
    one = kept(NACL(keep=0.4), same)
    assert one[0][0] != one[0][1] and one == kept(NACL(keep=0.4), same)
    assert one != kept(NACL(keep=0.4, seed=1), same)
    other = read_of()
    other.layer, other.k, other.q = 1, same.k, same.q
    assert one != kept(NACL(keep=0.4), other)


def test_the_paper_s_table_is_the_default_and_sums_to_the_budget(shared: Path) -> None:
    published = json.loads((shared / "published_numbers" / "nacl_infinitebench.json").read_text())["table4_percent"]
    for prompt in (1000, 2000, 10_000):
        assert {str(k): v for k, v in budget_table(prompt).items()} == published
    for percent, (protect, _, proxy, chance) in TABLE.items():
        assert protect + proxy + chance == percent


def test_published_averages_and_retention(shared: Path) -> None:
    data = json.loads((shared / "published_numbers" / "nacl_infinitebench.json").read_text())
    assert [round(x, 5) for x in averages(data["rows"])] == [0.39145, 0.33748]
    assert [round(x, 5) for x in averages(data["rows"], without=["KV"])] == [0.37139, 0.36763]
    for ours, theirs in ((averages(data["rows"]), data["avg_published"]), (averages(data["rows"], ["KV"]), data["avg_without_KV"])):
        assert all(abs(a - b) < 1e-4 for a, b in zip(ours, theirs, strict=True))
    assert f"{retention(0.2, 32):.2%}" == "99.92%"
    assert retention(0.01, 32 * 32) > 0.9999


def test_official_shares_and_its_limit() -> None:
    method = NACL(keep=0.2, compat="official")
    real = np.array([[2048], [4096], [100_000]])
    counts = method.counts(real, 0, 1)
    assert counts.T.tolist() == [[2048, 819, 20_000]]
    first, last, chosen, proxies = method.split(counts, real)
    assert (first + last)[2, 0] == 1000 and first[2, 0] == 256 and chosen[2, 0] == 12_000
    assert last[1, 0] > 0 and (counts - first - last - chosen)[2, 0] == 7000 and proxies[2, 0] == 1000


def test_official_proxies_are_one_percent_in_all_and_ours_are_beside_the_protected() -> None:
    real = np.array([[30_000], [30_099]])
    for compat in ("official", "none"):
        method = NACL(keep=0.2, compat=compat)
        _, last, _, proxies = method.split(method.counts(real, 0, 1), real)
        wanted = [300, 300] if compat == "official" else (np.rint(0.18 * real) + last)[:, 0].tolist()
        assert proxies[:, 0].tolist() == wanted and (last > 0).all()
        assert method.window(30_000) == proxies[0, 0]


def test_shares_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="random=1.5 is out of range"):
        NACL(random=1.5)
    with pytest.raises(UserError, match="more than the budget"):
        NACL(protect=0.6, random=0.6)
