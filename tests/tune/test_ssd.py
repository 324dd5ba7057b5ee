"""SSD: ordering the neurons changes neither the function nor the next step; when turns begin; what sparse steps cost and decay."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import modelwright
from families import model_of
from modelwright.cli import app as cli
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train.technique import Technique
from modelwright.tune.ssd import Knobs, Ssd
from small import Fatal, far, go, named, rows, same, weights

RELU = {"hidden_act": "relu"}
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
ALWAYS: dict[str, Any] = {"experts": 6, "top_k": 2, "stable": -1.0, "zeros": 0.0}


def ssd(train: dict[str, Any] | None = None, **knobs: Any) -> Ssd:
    return Ssd(Knobs(**{**ALWAYS, "train": Train(**(train or {})), **knobs}))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


class Arranged(Ssd):
    """Stays dense, and puts the neurons in order after the second step; moments follow, or do not."""

    moments = True

    def after_step(self, named: Any) -> None:
        self.step += 1
        if self.step == 2:
            self.look()
            optimizer, self.optimizer = self.optimizer, self.optimizer if self.moments else None
            self.arrange()
            self.optimizer = optimizer


class Forgetful(Arranged):
    moments = False


@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
def test_dense_to_sparse_to_dense_changes_neither_the_function_nor_the_steps_that_follow(kind: str, tmp_path: Path) -> None:
    """Four steps of Adam: the same logits as plain training, whose neurons stand elsewhere; without the moments' order they differ."""
    knobs, found = ssd(experts=8).knobs, {}
    for technique in (Technique(), Arranged(knobs), Forgetful(knobs)):
        model = model_of(kind, **({"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if kind == "gpt2" else {}))
        go(technique, model, tmp_path / type(technique).__name__, rows(), epochs=2, lr=1e-3)
        found[type(technique)] = logits(model)
    assert torch.allclose(found[Arranged], found[Technique], atol=1e-4)
    assert not torch.allclose(found[Forgetful], found[Technique], atol=1e-3)


def test_sparse_steps_with_all_experts_are_dense_steps(tmp_path: Path) -> None:
    plain, model = (model_of("qwen2", **RELU) for _ in range(2))
    go(Technique(), plain, tmp_path / "plain", rows(), epochs=2, lr=1e-3)
    technique = ssd(top_k=6, check_every=1, final_dense=0.0)
    go(technique, model, tmp_path / "ssd", rows(), epochs=2, lr=1e-3)
    assert technique.flops["sparse steps"] == 2
    technique.export(model, tmp_path)
    assert torch.allclose(logits(model), logits(plain), atol=1e-4)


def test_turns_follow_each_other_and_the_end_is_dense(tmp_path: Path) -> None:
    technique, seen = ssd(check_every=2, sparse_steps=3, final_dense=0.25), []
    count = technique.before_batch
    technique.before_batch = lambda batch: (seen.append(technique.sparse), count(batch))[1]  # type: ignore[method-assign]
    go(technique, model_of("llama", **RELU), tmp_path, rows(48), epochs=1, lr=1e-3)
    assert seen == [False] * 2 + [True] * 3 + [False] * 2 + [True] * 2 + [False] * 3  # 12 steps, dense from the tenth on
    assert technique.turns == [2, 7]


@pytest.mark.parametrize(("given", "turns"), [({"stable": 0.9}, [2, 4]), ({"zeros": 0.2}, [1, 3]), ({"zeros": 1.0}, [])])
def test_a_turn_begins_where_groups_are_stable_and_activations_sparse(given: dict[str, Any], turns: list[int], tmp_path: Path) -> None:
    """The first look has nothing to compare with; with a tiny rate the groups stay. Half of a random ReLU layer is 0."""
    technique = ssd(check_every=1, sparse_steps=1, final_dense=0.0, **given)
    go(technique, model_of("llama", num_hidden_layers=1, **RELU), tmp_path, rows(20), epochs=1, lr=1e-6)
    assert technique.turns == turns
    assert all(0.3 < look["zeros"] < 0.95 for look in technique.looks)
    assert technique.looks[0]["similarity"] == -1 and all(look["similarity"] > 0.9 for look in technique.looks[1:])


def test_groups_of_the_same_weights_are_the_former_ones_though_the_neurons_moved() -> None:
    technique, model = ssd(), model_of("llama")
    technique.attach(model, Anatomy(model))
    technique.look()
    technique.arrange()
    technique.look()
    assert technique.looks[1]["similarity"] > 0.9
    assert all(torch.bincount(x).tolist() == [8] * 6 for x in technique.labels)


def test_weight_decay_of_a_dense_step_is_adamws_and_of_a_sparse_step_leaves_neurons_alone_that_do_not_learn(tmp_path: Path) -> None:
    train: dict[str, Any] = {"weight_decay": 0.5, "lr": 1e-2}
    plain, model = (model_of("llama", **RELU) for _ in range(2))
    go(Technique(), plain, tmp_path / "plain", rows(), **train)
    go(ssd(train, check_every=100), model, tmp_path / "dense", rows(), **train)
    assert far(weights(model), weights(plain)) < 1e-6
    technique, p = ssd(train, check_every=100), model.model.layers[0].mlp.up_proj.weight
    technique.attach(model, Anatomy(model))
    technique.optimizer, technique.sparse = torch.optim.AdamW(technique.groups(named(model)), lr=0.1), True
    assert technique.optimizer.param_groups[0]["weight_decay"] == 0
    model.zero_grad()
    p.grad = torch.zeros_like(p)
    p.grad[3, 1] = 1.0
    before = p.detach().clone()
    technique.on_gradients(named(model))
    assert torch.allclose(p[3], before[3] * 0.95) and torch.equal(p[4:], before[4:])


def test_flops_are_those_of_the_steps_that_were_done(tmp_path: Path) -> None:
    """12 of 24 neurons' worth of experts in the sparse step; three matrices of 32 x 48 in each of two layers, forward and twice back."""
    technique, model = ssd(top_k=3, check_every=1, sparse_steps=1, final_dense=0.0), model_of("llama", **RELU)
    data = rows(8, 12)
    go(technique, model, tmp_path, data, epochs=1, lr=1e-3)  # a dense and a sparse step
    spent, dense = (technique.flops[k] for k in ("spent", "dense"))
    saved = 48 * (6 * 0.5 * 2 * 3 * 32 * 48 - 2 * 2 * 6 * 32)
    assert dense - spent == pytest.approx(saved)
    assert technique.facts()["of those of dense training"] == pytest.approx(spent / dense, abs=1e-4)


@pytest.mark.parametrize("stop", [2, 3])  # in a dense turn, in a sparse one
def test_a_run_that_was_stopped_goes_on_bit_for_bit(stop: int, tmp_path: Path) -> None:
    found = []
    settings: dict[str, Any] = {"check_every": 1, "sparse_steps": 2, "final_dense": 0.0}
    for place, end in (("whole", None), ("parts", stop), ("parts", None)):
        model, technique = model_of("llama", **RELU), ssd(**settings)
        try:
            go(technique, model, tmp_path / place, rows(16), epochs=1, stop=end, save_every=stop - 1)
            found.append((weights(model), technique.turns))
        except Fatal:
            assert end == stop
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1] == [1]


def data(folder: Path) -> str:
    lines = [{"input_ids": [(7 * i + j) % 90 + 3 for j in range(20)]} for i in range(12)]
    (folder / "ids.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return str(folder / "ids.jsonl")


def test_a_run_saves_the_dense_model(tiny: Callable[..., Path], tmp_path: Path) -> None:
    train = {"epochs": 1, "batch": 2, "context": 16, "lr": 1e-3}
    result = modelwright.run(
        "tune.ssd", base=tiny("llama", **RELU), to=tmp_path / "out", train=train, data=data(tmp_path), check_every=1, **ALWAYS
    )
    facts = result.steps[-1]["facts"]["ssd"]
    assert result.certificate["loads_in"] == "LlamaForCausalLM" and facts["sparse steps"] > 0
    assert facts["of those of dense training"] < 1
    assert Checkpoint(result.to).model().generate(IDS, max_new_tokens=2).shape[0] == 2


@pytest.mark.parametrize(
    ("kind", "changes", "knobs", "words"),
    [
        ("llama", {}, {"zeros": 0.8}, ["zeros=0.8", "silu", "zeros=0"]),
        ("llama", RELU, {"top_k": 7}, ["top_k=7"]),
        ("llama", RELU, {"experts": 7}, ["48 neurons", "7 experts"]),
        ("llama", RELU, {"check_every": 50}, ["first look is after 50"]),
        ("llama", RELU, {"train": {"optimizer": "adafactor", "context": 16}}, ["adafactor", "adamw or sgd"]),
        ("mixtral", RELU, {}, ["mixture of experts already"]),
        ("opt", {}, {}, ["no module of its own"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_done_is_refused(
    kind: str, changes: dict[str, Any], knobs: dict[str, Any], words: list[str], tiny: Any, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    given = {**ALWAYS, "check_every": 1, "train": {"batch": 2, "context": 16}, "data": data(tmp_path / "in"), **knobs}
    with pytest.raises(UserError) as caught:
        modelwright.run("tune.ssd", base=tiny(kind, **changes), to=tmp_path / "out", **given)
    assert all(w in str(caught.value) for w in words), caught.value
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    common = [
        "tune",
        "ssd",
        "--base",
        str(tiny("llama", **RELU)),
        "--data",
        data(tmp_path),
        "--json",
        "--experts",
        "6",
        "--top-k",
        "2",
        "--check-every",
        "1",
        "--stable",
        "-1",
        "--zeros",
        "0",
    ]
    common += ["--train.context", "16", "--train.epochs", "2", "--train.lr", "1e-4"]
    for to, own in (("one", ["--train.batch", "4"]), ("two", ["--train.batch", "2", "--nproc", "2"])):
        with pytest.raises(SystemExit) as end:
            cli.main([*common, "--to", str(tmp_path / to), *own])
        assert not end.value.code
    one, two = (load_file(tmp_path / to / "model.safetensors") for to in ("one", "two"))
    assert one.keys() == two.keys() and max(float((one[n] - two[n]).abs().max()) for n in one) <= 2e-5
