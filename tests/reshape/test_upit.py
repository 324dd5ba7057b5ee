"""UpIT: equal checkpoints give the dense model, experts are the checkpoints, planted domains find their experts, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modelwright
from families import model_of
from modelwright.core.data.make import make_rows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train.technique import Technique
from modelwright.moe.watch import watch
from modelwright.reshape.experts.vectors import Gates, buckets, losses, train_vectors
from modelwright.reshape.upit import Knobs, spaced, upit
from small import go, rows

IDS = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"experts": 3, "context": 16, "epochs": 1, "seed_rows": 6}


def logits(base: Path) -> torch.Tensor:
    with torch.no_grad():
        return Checkpoint(base).model(torch.float32).eval()(IDS).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_equal_checkpoints_give_the_dense_model_whatever_the_router(kind: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Two copies of a tuned model; a third expert is bred from them without dropping. Biases and norms of q and k included."""
    tuned = tiny(kind, seed=1)
    knobs = {"checkpoints": [str(tuned)] * 2, "experts": 3, "router": "random", "drop": 0.0}
    result = modelwright.run("reshape.upit", base=tiny(kind), to=tmp_path / "out", **knobs)
    assert float((logits(tuned) - logits(result.to)).abs().max()) < 2e-5


@pytest.mark.parametrize(("rest", "seeds"), [("last", [2]), ("mean", [1, 2]), ("base", [0])])
def test_experts_are_the_checkpoints_and_the_rest_is_where_it_was_told_from(rest: str, seeds: list[int], tiny: Callable[..., Path]) -> None:
    tuned = [Checkpoint(tiny("llama", seed=s)) for s in (0, 1, 2)]
    knobs = Knobs(checkpoints=[str(t.folder) for t in tuned[1:]], experts=2, router="random", rest=rest)
    made = {name: tensor for name, tensor, *_ in upit(tuned[0], knobs)[0].stream()}
    for e, t in enumerate(tuned[1:]):
        for ours, theirs in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            name = f"model.layers.1.block_sparse_moe.experts.{e}.{ours}.weight"
            assert torch.equal(made[name], t.get(f"model.layers.1.mlp.{theirs}_proj.weight"))
    q = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(made[q], torch.stack([tuned[s].get(q) for s in seeds]).mean(0), atol=1e-7)


def test_of_too_many_checkpoints_evenly_spaced_ones_stay_and_the_last_is_among_them() -> None:
    assert spaced(list(range(8)), 4) == [1, 3, 5, 7]
    assert spaced(list(range(7)), 3) == [2, 4, 6]
    assert spaced([1, 2], 4) == [1, 2]


def test_a_folder_of_checkpoints_gives_all_of_them_oldest_first(tiny: Callable[..., Path], tmp_path: Path) -> None:
    for n, seed in ((20, 2), (3, 1)):
        (tmp_path / f"checkpoint-{n}").symlink_to(tiny("llama", seed=seed))
    (tmp_path / "checkpoint-4").mkdir()  # nothing in it
    made = upit(Checkpoint(tiny("llama")), Knobs(checkpoints=[str(tmp_path)], experts=2, router="random"))[0]
    first = next(t for n, t, *_ in made.stream() if n == "model.layers.0.block_sparse_moe.experts.0.w1.weight")
    assert torch.equal(first, Checkpoint(tiny("llama", seed=1)).get("model.layers.0.mlp.gate_proj.weight"))


def test_even_buckets_have_one_size_at_the_least_total_loss_and_the_papers_rule_takes_the_minimum() -> None:
    loss = torch.tensor([[0.0, 1.0], [0.1, 0.2], [0.5, 0.9], [0.3, 0.5]])
    assert buckets(loss, even=False).tolist() == [0, 0, 0, 0]
    assert buckets(loss, even=True).tolist() == [0, 1, 0, 1]


def test_the_loss_of_an_example_is_the_mean_over_its_response(tmp_path: Path) -> None:
    model, data = model_of("llama"), rows(4, ragged=True)
    data.labels[:, :3] = -100  # a prompt
    found = losses(model, data, [2, 0], 1)
    for at, loss in zip((2, 0), found, strict=True):
        n = int(data.lengths[at])
        ids = data.ids[at : at + 1, :n].long()
        logp = model(ids).logits.detach().log_softmax(-1)[0]
        each = [-float(logp[t - 1, ids[0, t]]) for t in range(3, n)]
        assert float(loss) == pytest.approx(sum(each) / len(each) if each else 0.0, abs=1e-5)


# ---- planted domains ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], Path]:
    """A base, two models tuned on one domain each (their own half of the vocabulary), and mixed data: 20 rows of each domain in turn."""
    folder = tmp_path_factory.mktemp("domains")
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(low, low + 40, (20, 16), generator=g) for low in (3, 50)]
    mixed = torch.stack(texts, 1).flatten(0, 1)
    (folder / "data.jsonl").write_text("".join(json.dumps({"input_ids": r.tolist()}) + "\n" for r in mixed))
    base = model_of("llama")
    base.save_pretrained(folder / "base")
    for i, t in enumerate(texts):
        model, data = model_of("llama"), rows(20, 16)
        data.ids.copy_(t), data.labels.copy_(t)
        for name, p in model.named_parameters():
            p.requires_grad_(".mlp." in name)
        go(Technique(), model, folder / f"run{i}", data, epochs=6)
        model.save_pretrained(folder / f"tuned{i}")
    return folder / "base", [folder / "tuned0", folder / "tuned1"], folder / "data.jsonl"


def knobs_of(domains: tuple[Path, list[Path], Path], **more: Any) -> dict[str, Any]:
    _, tuned, data = domains
    return {"checkpoints": [str(t) for t in tuned], "data": str(data), "experts": 2, "top_k": 1, "context": 16, "seed_rows": 40, **more}


@pytest.mark.parametrize("rule", ["even", "paper"])
def test_examples_of_planted_domains_go_to_the_experts_of_their_domain(rule: str, domains: tuple[Path, list[Path], Path]) -> None:
    data = make_rows(Data(path=str(domains[2])), None, 96, 16)
    loss = torch.stack([losses(Checkpoint(t).model(), data, list(range(len(data))), 8) for t in domains[1]], 1)
    owner = buckets(loss, even=rule == "even")
    first = torch.tensor([int(data[i]["input_ids"][8]) for i in range(len(data))])  # running text: a row is of the domain of its middle
    assert (owner == (first >= 50)).float().mean() > 0.9


def share_of_own(folder: Path) -> float:
    """Share of tokens that the router of the first layer sends to the expert of their domain."""
    model = Checkpoint(folder).model().eval()
    found = []
    for e, low in enumerate((3, 50)):
        ids = torch.randint(low, low + 40, (8, 16), generator=torch.Generator().manual_seed(9))
        with watch(model) as seen, torch.no_grad():
            model(ids)
        found.append(float(seen.counts[0, e] / seen.counts[0].sum()))
    return sum(found) / 2


def test_trained_vectors_route_domains_to_their_experts_and_a_random_router_does_not(
    domains: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    share = {}
    for router in ("trained", "random"):
        result = modelwright.run("reshape.upit", base=domains[0], to=tmp_path / router, **knobs_of(domains, router=router))
        share[router] = share_of_own(result.to)
    assert share["trained"] > 0.8 > share["random"]


def test_the_same_seed_gives_the_same_bytes_and_rows_have_the_norm_that_was_asked_for(domains: tuple[Path, list[Path], Path]) -> None:
    knobs = Knobs(**knobs_of(domains, router_norm=0.5, epochs=1) | {"data": Data(path=str(domains[2]))})
    one, two = ({n: t for n, t, *_ in upit(Checkpoint(domains[0]), knobs, seed=3)[0].stream() if "gate.weight" in n} for _ in range(2))
    assert len(one) == 2 and all(torch.equal(one[n], two[n]) for n in one)
    assert all(torch.allclose(t.norm(dim=1), torch.tensor(0.5)) for t in one.values())


def test_training_vectors_leaves_the_model_and_its_hooks_as_they_were() -> None:
    model, data = model_of("qwen2"), rows(6)
    before = {n: p.clone() for n, p in model.named_parameters()}
    out = model(IDS).logits
    how: dict[str, Any] = {"alpha": 0.5, "epochs": 2, "lr": 1e-2, "batch": 2, "key": (0,)}
    vectors = train_vectors(model, data, [0, 1, 2], [3, 4], **how)
    assert vectors.shape == (2, 32) and bool((vectors != 0).any())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(model(IDS).logits, out)
    assert not torch.equal(vectors, train_vectors(model, data, [0, 1, 2], [], **how))


def test_words_of_other_experts_examples_are_not_to_be_predicted() -> None:
    """With the next-token loss alone the others change nothing; with the other term they do."""
    how: dict[str, Any] = {"epochs": 1, "lr": 1e-2, "batch": 8, "key": (0,)}
    for alpha, equal in ((1.0, True), (0.5, False)):
        alone, beside = (train_vectors(model_of("llama"), rows(6), [0, 1, 2], others, alpha=alpha, **how) for others in ([], [3, 4]))
        assert torch.allclose(alone, beside, atol=1e-6) == equal


def test_a_vector_of_zeros_halves_the_feed_forward_part() -> None:
    """The gate is sigmoid(r . h) on the input of the feed-forward part."""
    model = model_of("llama", num_hidden_layers=1)
    gates = Gates(Anatomy(model), 32)
    with gates.on(), torch.no_grad():
        half = model(IDS).logits
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
        assert torch.allclose(model(IDS).logits, half, atol=1e-6)


# ---- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"checkpoints": []}, ["gives 0 checkpoints", "reshape.upcycle"]),
        ({"checkpoints": ["ONE"]}, ["gives 1 checkpoint", "reshape.upcycle"]),
        ({"checkpoints": ["ONE", "OTHER"]}, ["does not have the shape"]),
        ({"checkpoints": ["ONE", "ROPE"]}, ["computes otherwise", "rope"]),
        ({"checkpoints": ["ONE", "/no/folder"]}, ["/no/folder"]),
        ({"top_k": 4}, ["top_k=4"]),
        ({"router": "trained"}, ["needs the data"]),
        ({"merge": "factors"}, ["merge=weights"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    given: dict[str, Any], words: list[str], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    places = {
        "ONE": tiny("llama", seed=1),
        "OTHER": tiny("llama", intermediate_size=64),
        "ROPE": tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    }
    knobs = {"checkpoints": ["ONE", "ONE"], "router": "random", "experts": 3, **given}
    knobs["checkpoints"] = [str(places.get(c, c)) for c in knobs["checkpoints"]]
    with pytest.raises(UserError) as caught:
        modelwright.run("reshape.upit", base=tiny("llama"), to=tmp_path / "out", **knobs)
    assert all(w in str(caught.value) for w in words), caught.value
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "t5"])
def test_models_that_no_stock_mixture_holds_are_refused(kind: str, tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"(?i)mixture|encoder"):
        upit(Checkpoint(tiny(kind)), Knobs(checkpoints=["a", "b"]))


def test_fewer_seed_rows_than_experts_are_refused(domains: tuple[Path, list[Path], Path], tmp_path: Path) -> None:
    knobs = knobs_of(domains, experts=12, context=256)
    with pytest.raises(UserError, match="10 seed rows for 12 experts"):
        modelwright.run("reshape.upit", base=domains[0], to=tmp_path / "out", **knobs)
