"""inspect.modularity: published figures, activations, perturbation, stabilisation, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import modelwright
from modelwright.cli import app as cli
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.inspect.functions.examples import SubFunction, activations, predict, sites
from modelwright.inspect.functions.perturb import choose, choose_experts, choose_random, disturbed, loss

IDS = [[5, 9, 11, 30], [7, 8], [44, 3, 60, 61, 17, 20], [90]]


def test_published_switch_figures(shared: Path) -> None:
    found = modelwright.run("inspect.modularity", published=str(shared / "modularity")).steps[0]["metrics"]["switch"]
    assert {s: round(r["average"], 2) for s, r in found.items()} == {"Original": 73.23, "NoFunction": 72.78, "Function": 74.45}
    want = {
        "mnli": "53.94/50.94/56.24",
        "qnli": "75.16/76.19/78.34",
        "cola": "72.11/72.96/73.14",
        "mrpc": "75.83/75.18/77.24",
        "qqp": "77.14/76.80/78.26",
        "rte": "65.66/65.30/65.43",
        "sst2": "92.79/92.10/92.53",
    }
    order = ("Original", "NoFunction", "Function")
    assert {n: "/".join(f"{found[s]['datasets'][n]:.2f}" for s in order) for n in want} == want
    assert all(n == 8 for r in found.values() for n in r["seeds"].values())


def test_published_perturbation_and_stabilisation_figures(shared: Path) -> None:
    found = modelwright.run("inspect.modularity", published=str(shared / "modularity")).steps[0]["metrics"]
    a, b = (found["t5"][f"figure 2{f}"]["accuracy"] for f in "ab")
    assert [round(a[m]["12"], 4) for m in ("random", "ap(sst2)", "ap_avg", "moe")] == [0.8365, 0.6919, 0.6, 0.557]
    assert [round(b[m]["12"], 4) for m in ("random", "ap_avg", "moe")] == [0.8062, 0.5376, 0.508]
    assert round(a["random"]["0"], 4) == 0.874 and round(b["random"]["0"], 4) == 0.8331
    second = {
        level: [round(by[f][1], 3) for f in ("semantic", "knowledge", "task")] for level, by in found["stabilisation"]["T5_step"].items()
    }
    assert second == {"expert": [0.716, 0.676, 0.503], "neuron": [0.4, 0.372, 0.181], "random_partition": [0.26, 0.226, 0.184]}


# ---- activations -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "phi3", "gpt_neox", "bert", "t5", "t5_v1_1"])
def test_activations_are_the_largest_over_an_examples_own_tokens(kind: str, tiny) -> None:
    model = Checkpoint(tiny(kind)).model().eval()
    together = activations(model, IDS, sites(model), batch=4)
    for i, ids in enumerate(IDS):
        alone = activations(model, [ids], sites(model))
        for layer, values in alone.items():
            assert values.shape == (1, 128 if kind == "gpt2" else 48)
            np.testing.assert_allclose(together[layer][i], values[0], rtol=1e-3, atol=1e-4)
    assert sorted(together) == [0, 1] and all((v >= 0).all() and v.max() > 0 for v in together.values())


def test_activations_of_a_gated_layer_are_relu_of_its_gate(tiny) -> None:
    model, seen = Checkpoint(tiny("llama")).model(), []
    model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda m, a, o: seen.append(o.detach()))
    found = activations(model, IDS[:1], sites(model))
    np.testing.assert_allclose(found[1][0], seen[0][0].relu().amax(0).numpy(), rtol=1e-5)


def test_a_mixtures_neurons_are_silent_on_tokens_of_other_experts(tiny) -> None:
    model = Checkpoint(tiny("mixtral")).model()
    found = sites(model)
    assert [s.neurons for s in found] == [4 * 48] * 2
    assert torch.equal(found[0].labels, torch.arange(4).repeat_interleave(48))
    router, seen = model.model.layers[0].mlp.gate, []
    router.register_forward_hook(lambda m, a, o: seen.append(o[2]))
    values = activations(model, [[17]], found)[0].reshape(4, 48)
    assert sorted(np.flatnonzero(values.sum(1) > 0).tolist()) == sorted(seen[0][0].tolist())


def test_layers_are_scored_in_parts_alike(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelwright.inspect.functions import examples

    model = Checkpoint(tiny("llama")).model()
    f = SubFunction("f", "task", IDS, np.array([True, False, True, False]))
    whole = predict(model, f, sites(model))
    monkeypatch.setattr(examples, "_VALUES", 1)
    parts = predict(model, f, sites(model))
    assert all(np.array_equal(whole[i], parts[i]) for i in whole)


# ---- perturbation ----------------------------------------------------------------------------------------------------
def test_disturbing_no_neuron_or_by_a_single_value_changes_nothing_and_leaves_no_hook(tiny) -> None:
    model = Checkpoint(tiny("llama")).model().eval()
    before = loss(model, IDS)
    with disturbed(model, {0: np.zeros(0, np.int64), 1: np.zeros(0, np.int64)}):
        assert loss(model, IDS) == before
    with disturbed(model, {0: np.array([4])}, scale=1.0), torch.no_grad():
        model(torch.tensor([[17]]))  # one value, shuffled with itself
    with disturbed(model, {0: np.arange(48), 1: np.arange(48)}):
        assert loss(model, IDS) != before
    assert loss(model, IDS) == before


def test_disturbed_neurons_keep_their_values_times_the_scale_and_others_are_untouched(tiny) -> None:
    model, seen = Checkpoint(tiny("llama")).model(), []
    down = model.model.layers[0].mlp.down_proj
    ids = torch.tensor([IDS[0], IDS[2][:4]])
    with torch.no_grad():
        down.register_forward_hook(lambda m, a, o: seen.append(a[0]))
        model(ids)
        with disturbed(model, {0: np.array([1, 5, 7])}, scale=4.0):
            model(ids)
    a, b = seen
    index = torch.tensor([1, 5, 7])
    torch.testing.assert_close(b[..., index].flatten().sort().values, 4 * a[..., index].flatten().sort().values)
    assert not torch.equal(b[..., index], 4 * a[..., index])
    rest = torch.ones(48, dtype=torch.bool)
    rest[index] = False
    assert torch.equal(a[..., rest], b[..., rest])


def test_chosen_neurons_are_the_best_over_all_layers_and_random_ones_as_many() -> None:
    scores = {0: np.array([0.1, 0.9, 0.2, 0.8]), 3: np.array([0.7, 0.3, 0.95, 0.0])}
    assert {k: v.tolist() for k, v in choose(scores, 0.5).items()} == {0: [1, 3], 3: [0, 2]}
    drawn = choose_random({0: np.array([1]), 3: np.array([0, 1, 2])}, scores, 0)
    assert [len(set(v.tolist())) for v in drawn.values()] == [1, 3]
    labels = {0: np.array([0, 0, 1, 1]), 3: np.array([0, 1, 0, 1])}
    assert {k: sorted(v.tolist()) for k, v in choose_experts(scores, labels, 0.5).items()} == {0: [0, 1], 3: [0, 2]}


# ---- the public call -------------------------------------------------------------------------------------------------
def write(folder: Path, rows: list[dict]) -> str:
    (folder / "examples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder / "examples.jsonl")


def rows() -> list[dict]:
    rng = np.random.default_rng(0)
    low, high = (lambda: rng.integers(3, 20, 8).tolist()), (lambda: rng.integers(60, 90, 8).tolist())
    made = [{"function": "height", "input_ids": high() if i % 2 else low(), "label": i % 2} for i in range(24)]
    return made + [{"function": "other", "level": "semantic", "input_ids": low() + [33] * (i % 2), "label": i % 2} for i in range(24)]


@pytest.mark.parametrize("kind", ["llama", "mixtral", "t5"])
def test_a_function_of_the_input_is_found(kind: str, tiny, tmp_path: Path) -> None:
    found = modelwright.run(
        "inspect.modularity", base=tiny(kind), examples=write(tmp_path, rows()), experts=4, top=0.1, disturb=[0.1], partitions=20, draws=1
    )
    metrics = found.steps[0]["metrics"]
    height = metrics["functions"]["height"]
    assert height["chance"] == 0.5 and max(r["best"] for r in height["layers"].values()) > 0.95
    assert metrics["levels"].keys() == {"task", "semantic"}
    assert ("left_out" in metrics["perturbation"]) == (kind != "llama")


def test_a_checkpoint_agrees_with_its_copy_and_not_with_another_model(tiny, tmp_path: Path) -> None:
    found = modelwright.run(
        "inspect.modularity",
        base=tiny("llama", dtype="bfloat16"),
        examples=write(tmp_path, rows()[24:]),
        experts=4,
        disturb=[],
        partitions=2,
        checkpoints=[str(tiny("llama", seed=1)), str(tiny("llama"))],
    )
    stable = found.steps[0]["metrics"]["stabilisation"]
    assert stable.keys() == {"neuron", "expert", "random_partition"}
    for kind, by in stable.items():
        (first, second) = by["semantic"]
        assert second > 0.95 and (kind != "neuron" or abs(first) < 0.5)


def refuse(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(["inspect", "modularity", *map(str, argv)])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and "Traceback" not in out + err
    return err.strip().splitlines()[-1]


def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], tiny, tmp_path: Path) -> None:
    base = tiny("llama")
    assert "nothing to measure" in refuse(capsys)
    assert "nothing to measure" in refuse(capsys, "--base", base)
    assert "no folder at" in refuse(capsys, "--published", tmp_path / "none")
    assert "holds no recorded results" in refuse(capsys, "--published", tmp_path)
    assert "no examples at" in refuse(capsys, "--base", base, "--examples", tmp_path / "none.jsonl")
    one = write(tmp_path, [{"input_ids": [3, 4], "label": 1}, {"input_ids": [3, 5], "label": 1}])
    assert "one label only" in refuse(capsys, "--base", base, "--examples", one)
    assert "no column 'label'" in refuse(capsys, "--base", base, "--examples", write(tmp_path, [{"text": "a"}]))
    assert "row 1 of" in refuse(capsys, "--base", base, "--examples", write(tmp_path, [{"input_ids": [3], "label": 2}]))
    assert "no tokenizer" in refuse(capsys, "--base", base, "--examples", write(tmp_path, [{"text": "a", "label": 1}]))
    high = write(tmp_path, [{"input_ids": [3, 96], "label": 1}, {"input_ids": [3], "label": 0}])
    assert "out of range" in refuse(capsys, "--base", base, "--examples", high)
    good = write(tmp_path, rows())
    assert "has 48 neurons" in refuse(capsys, "--base", base, "--examples", good, "--experts", 49)
    assert "does not have the shape" in refuse(
        capsys, "--base", base, "--examples", good, "--checkpoints", tiny("llama", num_hidden_layers=3)
    )
    (tmp_path / "t5_perturbation_results.txt").write_text("sst2 ap 2 0 4.0 sst2\n")
    assert "line 1 of" in refuse(capsys, "--published", tmp_path)
