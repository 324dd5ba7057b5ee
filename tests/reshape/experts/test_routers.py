"""Router rows: their statistics without data, and with data that they are what their definition says, computed here anew."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import write_tensors
from modelwright.reshape.upcycle import Knobs, upcycle

STORY = (
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park with her mom. "
    "One day she saw a big red ball under the tree and she wanted to play with it. "
)
SUMS = " ".join(f"{i * 37 % 911} + {i * 53 % 877} = {i * 37 % 911 + i * 53 % 877};" for i in range(40))
CODE = "def f(x):\n    return [y * 2 for y in x if y != 0]\n\nclass A(B):\n    def __init__(self):\n        self.x = None\n"
KING = "The king and the queen lived in a castle with a dragon. The dragon was sad and he wanted a friend. "
# one short and one long prompt, and more prompts than one batch holds
PROMPTS = [["Once", STORY], ["7", SUMS], [CODE], [KING[: 8 + 7 * i] for i in range(11)]]


def rows(base: Path, seed: int = 0, **knobs: Any) -> list[Tensor]:
    """The router of each layer, (E, d)."""
    knobs = {"experts": 4, "top_k": 2, **knobs}
    made, _ = upcycle(Checkpoint(base), Knobs(**knobs), seed)
    found = {p[0]: p[1] for p in made.stream() if p[0].endswith("block_sparse_moe.gate.weight")}
    width, layers = Checkpoint(base).config["hidden_size"], Checkpoint(base).config["num_hidden_layers"]
    assert [found[f"model.layers.{i}.block_sparse_moe.gate.weight"].shape for i in range(layers)] == [(knobs["experts"], width)] * layers
    return [found[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(layers)]


def files(folder: Path, texts: list[str]) -> list[str]:
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    return [str(folder / f"{i}.txt") for i in range(len(texts))]


Seen = Callable[[str], list[Tensor]]


@pytest.fixture(scope="module")
def seen(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """seen(text) -> per layer the states (N, d) that the router of the *converted* model is given, one text at a time, unpadded."""
    folder = tmp_path_factory.mktemp("seen")
    made, _ = upcycle(Checkpoint(stories), Knobs(experts=2, top_k=2, router="zero"))
    write_tensors(made, folder, 10**9)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(stories)

    @torch.no_grad()
    def states(text: str) -> list[Tensor]:
        caught: list[list[Tensor]] = [[] for _ in model.model.layers]
        hooks = [
            layer.mlp.gate.register_forward_pre_hook(lambda m, args, c=c: c.append(args[0].reshape(-1, 64).double()))
            for layer, c in zip(model.model.layers, caught, strict=True)
        ]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for i in range(0, len(ids), 512):
            model(torch.tensor([ids[i : i + 512]]))
        for h in hooks:
            h.remove()
        assert all(len(torch.cat(c)) == len(ids) for c in caught)
        return [torch.cat(c) for c in caught]

    return states


def means(seen: Seen, groups: list[list[str]]) -> list[Tensor]:
    """Per layer the mean state of each group over all of its tokens, (E, d)."""
    each = [[torch.cat(x) for x in zip(*map(seen, texts), strict=True)] for texts in groups]
    return [torch.stack([x.mean(0) for x in layer]) for layer in zip(*each, strict=True)]


# ---- without data ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("std", [0.02, 0.5])
def test_normal_rows_are_normal(std: float, stories: Path) -> None:
    values = torch.stack(rows(stories, router="normal", router_std=std, experts=64)) / std  # (5, 64, 64)
    assert abs(values.mean()) < 5 / 20480**0.5
    assert abs(values.std() - 1) < 5 / 40960**0.5
    assert abs((values.abs() < 1).float().mean() - 0.6827) < 0.02


def test_uniform_rows_fill_zero_to_one(stories: Path) -> None:
    values = torch.stack(rows(stories, router="uniform", experts=64))
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01 and abs(values.std() - 12**-0.5) < 0.01


def test_zero_rows_are_zero(stories: Path) -> None:
    assert not torch.stack(rows(stories, router="zero")).any()


@pytest.mark.parametrize("router", ["normal", "uniform"])
def test_each_layer_and_seed_draws_its_own_rows(router: str, stories: Path) -> None:
    drawn = [*rows(stories, router=router), *rows(stories, seed=1, router=router)]
    assert len({tuple(r.flatten().tolist()) for r in drawn}) == 10
    assert all(torch.equal(a, b) for a, b in zip(drawn, rows(stories, router=router), strict=False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_have_the_base_s_type(dtype: str, tiny) -> None:
    for router in ("normal", "uniform", "zero", "gate_means"):
        assert {r.dtype for r in rows(tiny("llama", dtype=dtype), router=router)} == {getattr(torch, dtype)}


# ---- gate_means ------------------------------------------------------------------------------------------------------
def shifted(base: Path, to: Path, seed: int) -> Path:
    """`base` with a direction of its own added to every row of gate_proj."""
    shutil.copytree(base, to)
    g = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    tensors |= {n: t + torch.randn(t.shape[1], generator=g) * 0.3 for n, t in sorted(tensors.items()) if "gate_proj" in n}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("count", [2, 3])
def test_gate_means_point_to_their_own_expert(count: int, tiny, tmp_path: Path) -> None:
    sources = [shifted(tiny("llama"), tmp_path / str(i), i) for i in range(count)]
    result = rows(sources[0], method="btx", others=[str(s) for s in sources[1:]], router="gate_means", experts=count, router_std=0.1)
    for layer, row in enumerate(result):
        gates = torch.stack([load_file(s / "model.safetensors")[f"model.layers.{layer}.mlp.gate_proj.weight"].mean(0) for s in sources])
        cosine = normalize(row, dim=1) @ normalize(gates - gates.mean(0), dim=1).T  # (rows, experts)
        assert cosine.argmax(1).tolist() == list(range(count))
        assert torch.allclose(cosine.diagonal(), torch.ones(count), atol=1e-5)
        assert torch.allclose(row.norm(dim=1), torch.full((count,), 0.1 * 32**0.5), rtol=1e-5)  # the norm of a normal router


def test_gate_means_read_the_expert_after_it_was_changed(tiny) -> None:
    result = rows(tiny("llama"), method="drop", ratio=0.5, router="gate_means")
    made, _ = upcycle(Checkpoint(tiny("llama")), Knobs(experts=4, method="drop", ratio=0.5))
    tensors = {p[0]: p[1] for p in made.stream()}
    for layer, row in enumerate(result):
        gates = torch.stack([tensors[f"model.layers.{layer}.block_sparse_moe.experts.{e}.w1.weight"].mean(0) for e in range(4)])
        assert torch.allclose(normalize(row, dim=1), normalize(gates - gates.mean(0), dim=1), atol=1e-5)


@pytest.mark.parametrize("experts", [2, 3, 7])
def test_gate_means_of_identical_experts_are_zero(experts: int, tiny) -> None:
    assert not torch.stack(rows(tiny("llama"), router="gate_means", experts=experts)).any()


# ---- prompts and texts -----------------------------------------------------------------------------------------------
def test_prompt_rows_are_centred_means_of_what_the_router_sees_and_padding_leaves_no_trace(stories: Path, seen: Seen) -> None:
    expected = [normalize(m - m.mean(0), dim=1) for m in means(seen, PROMPTS)]
    for row, want in zip(rows(stories, router="prompts", prompts=PROMPTS), expected, strict=True):
        assert (row - want).abs().max() < 1e-4
        assert torch.allclose(row.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("group", range(4))
def test_prompts_of_one_batch_weigh_as_many_as_their_tokens(group: int, stories: Path, seen: Seen) -> None:
    texts = PROMPTS[group]
    each, other = [seen(t) for t in texts], seen(STORY + SUMS)
    for layer, row in enumerate(rows(stories, router="prompts", prompts=[texts, [STORY + SUMS]], experts=2)):
        share = torch.tensor([float(len(x[layer])) for x in each], dtype=torch.float64)
        alone = torch.stack([x[layer].mean(0) for x in each])  # each prompt's own mean, from a run by itself
        m = torch.stack([(share @ alone) / share.sum(), other[layer].mean(0)])
        assert (row - normalize(m - m.mean(0), dim=1)).abs().max() < 1e-4


def test_negatives_are_subtracted(stories: Path, seen: Seen) -> None:
    negatives = [[SUMS], [STORY], [KING], [CODE, "one"]]
    result = rows(stories, router="prompts", prompts=PROMPTS, negatives=negatives)
    for row, good, bad in zip(result, means(seen, PROMPTS), means(seen, negatives), strict=True):
        assert (row - normalize(good - bad, dim=1)).abs().max() < 1e-4
    assert all((a - b).abs().max() > 0.1 for a, b in zip(result, rows(stories, router="prompts", prompts=PROMPTS), strict=True))


def test_text_rows_are_prompt_rows_of_the_same_text(stories: Path, tmp_path: Path) -> None:
    texts = [STORY, SUMS, CODE, KING]
    as_text = rows(stories, router="text", texts=files(tmp_path, texts))
    assert all(torch.equal(a, b) for a, b in zip(as_text, rows(stories, router="prompts", prompts=[[t] for t in texts]), strict=True))


def test_long_text_is_read_to_its_end(stories: Path, seen: Seen, tmp_path: Path) -> None:
    texts = [STORY * 9 + SUMS, CODE * 4]  # the first is longer than the model's 512 positions
    assert len(seen(texts[0])[0]) > 600
    result = rows(stories, router="text", texts=files(tmp_path, texts), experts=2)
    for row, m in zip(result, means(seen, [[t] for t in texts]), strict=True):
        assert (row - normalize(m - m.mean(0), dim=1)).abs().max() < 1e-4


@pytest.mark.parametrize("router", ["prompts", "ridge"])
def test_rows_follow_the_order_of_the_experts(router: str, stories: Path, tmp_path: Path) -> None:
    order = [2, 0, 3, 1]
    knobs = []
    for name, groups in (("a", PROMPTS), ("b", [PROMPTS[i] for i in order])):
        (tmp_path / name).mkdir()
        knobs.append({"prompts": groups} if router == "prompts" else {"texts": files(tmp_path / name, ["\n".join(g) for g in groups])})
    for a, b in zip(rows(stories, router=router, **knobs[0]), rows(stories, router=router, **knobs[1]), strict=True):
        assert (a[order] - b).abs().max() < 1e-4


def test_prompts_spread_the_load_over_experts(stories: Path, tmp_path: Path) -> None:
    made, _ = upcycle(Checkpoint(stories), Knobs(experts=4, top_k=2, router="prompts", prompts=PROMPTS))
    write_tensors(made, tmp_path, 10**9)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(stories)
    first = torch.zeros(2, 5, 4)
    with torch.no_grad():
        for i, text in enumerate((STORY + KING, SUMS)):
            logits = model(torch.tensor([tokenizer(text)["input_ids"][:512]]), output_router_logits=True).router_logits
            for layer, x in enumerate(logits):  # (N, E)
                first[i, layer] = torch.bincount(x.argmax(1), minlength=4) / len(x)
    assert first.mean(0).max() < 0.9  # not all on one expert in any layer
    assert ((first.mean(0) > 0.02).sum(1) >= 3).all()
    # the expert of sums gets more of the sums, the experts of stories more of the story
    assert (first[1, :, 1] > first[0, :, 1]).all()
    assert (first[0, :, [0, 3]].sum(1) > first[1, :, [0, 3]].sum(1)).all()


# ---- ridge -----------------------------------------------------------------------------------------------------------
def labelled(seen: Seen, texts: list[str]) -> list[tuple[Tensor, Tensor]]:
    """Per layer the states of all texts (N, d) and their one-hot experts (N, E)."""
    each = [seen(t) for t in texts]
    found = []
    for layer in zip(*each, strict=True):
        owner = torch.cat([torch.full((len(x),), e) for e, x in enumerate(layer)])
        found.append((torch.cat(layer), torch.nn.functional.one_hot(owner, len(texts)).double()))
    return found


@pytest.mark.parametrize("strength", [1e-3, 1e-2, 1.0])
def test_ridge_is_the_least_squares_solution(strength: float, stories: Path, seen: Seen, tmp_path: Path) -> None:
    texts = [STORY * 6, SUMS, CODE]
    result = rows(stories, router="ridge", ridge=strength, texts=files(tmp_path, texts), experts=3)
    for row, (x, y) in zip(result, labelled(seen, texts), strict=True):
        n, d = x.shape
        weight = (strength * n * float((x**2).mean())) ** 0.5  # lambda N in units of the mean squared state
        stacked = torch.cat([x, weight * torch.eye(d, dtype=torch.float64)])
        expected = torch.linalg.lstsq(stacked, torch.cat([y, torch.zeros(d, 3, dtype=torch.float64)])).solution.T
        assert (row - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("strength", [0.0, 1e-3])
def test_ridge_gives_no_weight_to_directions_that_no_text_shows(strength: float, stories: Path, seen: Seen, tmp_path: Path) -> None:
    """True of every ridge solution; with lambda=0 and fewer tokens than dimensions it singles out the smallest least-squares solution."""
    texts = ["hello", "the red ball", "1 + 2", "a dog"]
    result = rows(stories, router="ridge", ridge=strength, texts=files(tmp_path, texts))
    for row, (x, _) in zip(result, labelled(seen, texts), strict=True):
        assert len(x) < 64
        inside = torch.linalg.pinv(x, rtol=1e-5) @ x  # projection onto the span of the states
        assert (row.double() - row.double() @ inside).norm() < 1e-3 * row.double().norm()


def test_ridge_separates_planted_domains(stories: Path, seen: Seen, tmp_path: Path) -> None:
    texts = [STORY * 3 + KING * 3, SUMS]
    result = rows(stories, router="ridge", texts=files(tmp_path, texts), experts=2)
    for e, text in enumerate(texts):
        for row, x in zip(result, seen(text), strict=True):
            assert ((x.float() @ row.T).argmax(1) == e).float().mean() > 0.8


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"router": "prompts", "prompts": [["a"], ["a"]]}, "two experts have the same prompts, because their router rows would be equal"),
        ({"router": "text", "texts": ["a", "a"]}, "two experts have the same texts"),
        ({"router": "ridge", "texts": ["a", "a"]}, "two experts have the same texts"),
        ({"router": "prompts", "prompts": [["a"], ["b"], ["c"]]}, "prompts has 3 groups and there are 2 experts"),
        ({"router": "prompts"}, "prompts has 0 groups and there are 2 experts"),
        ({"router": "text", "texts": ["a"]}, "texts has 1 groups and there are 2 experts"),
        ({"router": "prompts", "prompts": [["a"], []]}, "has no tokens"),
        ({"router": "prompts", "prompts": [["a"], [""]]}, "has no tokens"),
        ({"router": "prompts", "prompts": [["a"], ["b"]], "negatives": [["c"]]}, "negatives has 1 groups and there are 2 experts"),
    ],
)
def test_refusal_says_why(knobs: dict, reason: str, stories: Path, tmp_path: Path) -> None:
    if "texts" in knobs:
        knobs = knobs | {"texts": files(tmp_path, knobs["texts"])}
    with pytest.raises(UserError) as caught:
        rows(stories, experts=2, **knobs)
    assert reason in str(caught.value)


def test_missing_text_file_is_named(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data at .*nowhere.txt"):
        rows(stories, experts=2, router="text", texts=[*files(tmp_path, ["a"]), str(tmp_path / "nowhere.txt")])


@pytest.mark.parametrize("router", ["prompts", "text", "ridge"])
def test_base_without_tokenizer_is_refused(router: str, tiny, tmp_path: Path) -> None:
    knobs = {"prompts": [["a"], ["b"]]} if router == "prompts" else {"texts": files(tmp_path, ["a", "b"])}
    with pytest.raises(UserError, match=f"router={router} needs a tokenizer"):
        rows(tiny("llama"), experts=2, router=router, **knobs)


def test_tokenizer_of_another_model_is_refused(stories: Path, tiny, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny("llama"), base)  # 96 embeddings
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories / name, base / name)  # 512 tokens
    with pytest.raises(UserError, match="tokenizer"):
        rows(base, experts=2, router="prompts", prompts=[[STORY], [SUMS]])


@pytest.mark.parametrize("line", [{"messages": [{"role": "user", "content": "hi"}]}, {"input_ids": [5, 6, 7]}], ids=lambda v: next(iter(v)))
def test_text_that_is_no_text_is_refused(line: dict, stories: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="text"):
        rows(stories, experts=2, router="text", texts=[*files(tmp_path, ["a"]), str(tmp_path / "rows.jsonl")])
