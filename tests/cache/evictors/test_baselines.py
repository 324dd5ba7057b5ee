"""Every method against its definition written out in loops."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modelwright.cache.engine.method import Method, Read, highest
from modelwright.cache.evictors.baselines import H2O, TOVA, KeyNorm, PyramidKV, Random, SnapKV, StreamingLLM
from modelwright.cache.evictors.nacl import NACL
from modelwright.cache.evictors.names import METHODS, named
from modelwright.core.errors import UserError

B, H, G, T, D = 2, 4, 2, 24, 8


def read_of(lengths: list[int] | None = None, layer: int = 0, layers: int = 3, w: int = T, softcap: float | None = None) -> Read:
    g = torch.Generator().manual_seed(layer)
    q, k, v = (torch.randn(B, n, T, D, generator=g) * 1.5 for n in (H, G, G))
    return Read(q[:, :, T - w :], k, v, D**-0.5, layer, layers, lengths, softcap)


def weights(read: Read) -> Tensor:
    """(B, H, T, T) causal attention, pads out."""
    s = read.q @ read.k.repeat_interleave(H // G, 1).transpose(2, 3) * read.scale
    if read.softcap:
        s = torch.tanh(s / read.softcap) * read.softcap
    pads = [T - n for n in read.lengths or [T, T]]
    for b in range(B):
        s[b, :, :, : pads[b]] = -torch.inf
    s = s.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    for b in range(B):
        s[b, :, : pads[b]] = 0
    return s


def kept(method: Method, read: Read) -> list[list[list[int]]]:
    index, slots = method.choose(read)
    assert index is not None
    return [[[int(i) for j, i in enumerate(index[b, h]) if slots is None or slots[b, h, j]] for h in range(G)] for b in range(B)]


@pytest.mark.parametrize("queries", [1, 5, 24])
@pytest.mark.parametrize("block", [None, 7])
def test_the_last_queries_attend_to_what_attention_says(queries: int, block: int | None) -> None:
    read = read_of()
    read.attend, read.block = True, block
    read.received(queries)
    wanted = weights(read)[:, :, T - queries :] @ read.v.repeat_interleave(H // G, 1)
    assert read.attended is not None
    assert (read.attended.flatten(1, 2) - wanted).abs().max() < 1e-5
    read = read_of()
    read.attend = True
    read.received(queries, causal=False)
    assert read.attended is None  # queries that see ahead have attended to something else


@pytest.mark.parametrize("counts", [[[5]], [[1], [24]], [[3, 9], [24, 1]]])
def test_the_highest_are_the_first_of_a_stable_sort(counts: list[list[int]]) -> None:
    score = torch.randint(0, 6, (B, G, T), generator=torch.Generator().manual_seed(0)).float()  # many are equal
    score[0, :, :4], score[1, 0, 5:9], score[1, 1, 3] = torch.inf, -torch.inf, torch.nan
    found = highest(score, torch.tensor(counts)[..., None])
    order = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argsort(descending=True, stable=True)
    for b in range(B):
        for h in range(G):
            n = int(np.broadcast_to(counts, (B, G))[b, h])
            assert found[b, h].nonzero().flatten().tolist() == sorted(order[b, h, :n].tolist())


@pytest.mark.parametrize("lengths", [None, [24, 17]])
@pytest.mark.parametrize("queries", [1, 5, 24])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_received_is_the_sum_of_the_attention_matrix(lengths: Any, queries: int, softcap: float | None) -> None:
    read = read_of(lengths, softcap=softcap)
    wanted = weights(read)[:, :, T - queries :].sum(2).view(B, G, H // G, T).sum(2)
    assert (read.received(queries) - wanted).abs().max() < 1e-5
    whole, read.block = read.received(queries), 7
    assert (read.received(queries) - whole).abs().max() < 1e-5
    per_head = np.array([[3, 5], [7, 2]])
    each = read.received(per_head)
    for b in range(B):
        for h in range(G):
            alone = weights(read)[b, 2 * h : 2 * h + 2, T - per_head[b, h] :].sum((0, 1))
            assert (each[b, h] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("lengths", [None, [24, 17]])
def test_each_baseline_keeps_what_its_definition_says(lengths: Any) -> None:
    read, n = read_of(lengths), [10, 10 if lengths is None else 7]
    a, first = weights(read), [0, 0 if lengths is None else 7]
    keep = 0.4166

    def best(score: Any, sure: list[list[int]]) -> list[list[list[int]]]:
        out = []
        for b in range(B):
            rows = []
            for h in range(G):
                rest = [i for i in range(first[b], T) if i not in sure[b]]
                rest.sort(key=lambda i, b=b, h=h: (-score(b, h, i), i))
                rows.append(sorted(sure[b] + rest[: n[b] - len(sure[b])]))
            out.append(rows)
        return out

    heads = lambda h: slice(2 * h, 2 * h + 2)  # noqa: E731
    assert kept(StreamingLLM(keep=keep, sinks=3), read) == best(lambda b, h, i: i, [[f, f + 1, f + 2] for f in first])
    recent = [list(range(T - round(0.5 * x), T)) for x in n]
    assert kept(H2O(keep=keep), read) == best(lambda b, h, i: float(a[b, heads(h), :, i].sum()), recent)
    assert kept(TOVA(keep=keep), read) == best(lambda b, h, i: float(a[b, :, -1, i].mean()), [[T - 1]] * 2)
    assert kept(KeyNorm(keep=keep), read) == best(lambda b, h, i: -float(read.k[b, h, i].norm()), [[], []])
    window = [list(range(T - 4, T))] * 2

    def pooled(b: int, h: int, i: int) -> float:
        return max(float(a[b, heads(h), T - 4 :, j].sum()) for j in range(max(0, i - 1), min(T - 4, i + 2)))

    assert kept(SnapKV(keep=keep, observe=4, kernel=3), read) == best(pooled, window)
    mean = lambda b, h, i: sum(float(a[b, heads(h), T - 4 :, j].sum()) for j in range(max(0, i - 1), min(T - 4, i + 2)))  # noqa: E731
    assert kept(SnapKV(keep=keep, observe=4, kernel=3, pooling="mean"), read) == best(mean, window)


def test_the_pyramid_falls_in_a_line_and_its_mean_is_the_budget() -> None:
    for layers, length, keep in ((12, 1000, 0.2), (12, 1000, 0.8), (5, 512, 0.1), (1, 300, 0.3)):
        method = PyramidKV(keep=keep)
        counts = [method.counts(np.array([[length]]), i, layers).item() for i in range(layers)]
        assert counts == sorted(counts, reverse=True) and max(counts) <= length and min(counts) > 32
        assert abs(np.mean(counts) - keep * length) < 0.5
    counts = [PyramidKV(tokens=132, beta=20).counts(np.array([[10_000]]), i, 3).item() for i in range(3)]
    assert counts == [32 + 195, 32 + 100, 32 + 5]  # 2 n - n/beta, n, n/beta


def test_random_keeps_every_token_equally_often_and_heads_differ() -> None:
    read = read_of()
    draws = torch.stack([torch.tensor(kept(Random(keep=0.25, seed=s), read)) for s in range(600)])  # (600, B, G, 6)
    often = torch.stack([(draws == i).any(-1).float().mean((0, 2)) for i in range(T)])
    assert (often - 0.25).abs().max() < 5 * (0.25 * 0.75 / 1200) ** 0.5
    assert (draws[:, :, 0] != draws[:, :, 1]).any() and not torch.equal(draws[0], draws[1])
    other = torch.tensor(kept(Random(keep=0.25), read_of(layer=1)))
    assert not torch.equal(other, draws[0])


@pytest.mark.parametrize("name", METHODS)
def test_budgets_are_met_exactly_in_every_layer_and_head(name: str) -> None:
    settings = {"observe": 4} if "kv" in name else {}
    for budget in ({"keep": 0.5}, {"tokens": 9}):
        if name != "pyramidkv":
            method = named(name, settings=settings, **budget)
            assert {len(set(x)) for row in kept(method, read_of()) for x in row} == {12 if "keep" in budget else 9}
    if name != "pyramidkv":
        uneven = named(name, keep=[[0.5, 0.25], [0.3, 0.3], [1.0, 1.0]], settings=settings)
        assert [[len(set(x)) for x in row] for row in kept(uneven, read_of())] == [[12, 6]] * 2
        assert [[len(set(x)) for x in row] for row in kept(uneven, read_of([24, 16]))] == [[12, 6], [8, 4]]
        assert uneven.choose(read_of(layer=2)) == (None, None)


def test_unknown_names_and_settings_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'snapkv'"):
        named("snapkw")
    with pytest.raises(UserError, match="h2o has no setting 'window'"):
        named("h2o", settings={"window": 3})
    with pytest.raises(UserError, match="the kernel is odd"):
        named("snapkv", settings={"kernel": 4})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("snapkv", {"observe": ["a", 2.5, True, None, 0]}),
        ("snapkv", {"kernel": ["7", -1, 0], "pooling": ["avg", "median", 1]}),
        ("nacl", {"seed": ["x", 0.5], "sinks": [{"a": 1}, -1], "compat": ["bogus", None], "proxies": ["half", float("nan"), -0.1]}),
        ("streaming_llm", {"sinks": [None, -3, 2.5]}),
        ("h2o", {"recent": [3, -1, "half", float("inf")]}),
        ("pyramidkv", {"beta": [0, 0.5, "20"], "observe": [1.5]}),
        ("random", {"seed": [None, "1"]}),
    ],
)
def test_settings_of_the_wrong_type_or_out_of_range_are_one_sentence(name: str, wrong: dict[str, list[Any]]) -> None:
    for setting, values in wrong.items():
        for value in values:
            for make in (lambda s: named(name, settings=s), lambda s: METHODS[name](**s)):
                with pytest.raises(UserError, match=rf"^{setting}=.* (does not fit|is out of range for) {name}, because .*; change it"):
                    make({setting: value})


def test_settings_may_be_numbers_of_numpy_and_of_any_size() -> None:
    assert named("snapkv", settings={"observe": np.int64(4)}).window(9) == 4
    assert H2O(recent=1).recent == 1 and H2O(recent=np.float32(0.5)).recent == 0.5 and NACL(random=None).random is None
    for seed in (10**400 + 1, -7):
        assert kept(Random(seed=seed), read_of()) == kept(Random(seed=seed), read_of()) != kept(Random(), read_of())
