"""MoEfication: exactness with all experts on, the stock result against the masked dense model, streaming, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modelwright
from modelwright.cli import app as cli
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.reshape.experts.simulate import Plan, simulated
from modelwright.reshape.experts.split import contiguous, split_random
from modelwright.reshape.experts.walk import walk
from modelwright.reshape.moefy import Knobs, moefy
from modelwright.reshape.moefy import split as split_layer

STOCK = {
    "llama": "GraniteMoeForCausalLM",
    "mistral": "GraniteMoeForCausalLM",
    "granite": "GraniteMoeForCausalLM",
    "phi3": "GraniteMoeForCausalLM",
    "qwen2": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
}


def token_file(folder: Path, rows: int = 40) -> str:
    g = torch.Generator().manual_seed(0)
    lines = [{"input_ids": torch.randint(3, 96, (16,), generator=g).tolist()} for _ in range(rows)]
    (folder / "ids.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return str(folder / "ids.jsonl")


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("split", ["random", "kmeans"])
def test_with_all_experts_on_the_function_is_unchanged(kind: str, split: str, tiny, tmp_path: Path) -> None:
    result = modelwright.run("reshape.moefy", base=tiny(kind), to=tmp_path / "out", experts=6, top_k=6, split=split)
    assert result.certificate["passed"] is True and result.certificate["loads_in"] == STOCK[kind]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_shared_experts_are_exact_too(kind: str, tiny, tmp_path: Path) -> None:
    result = modelwright.run("reshape.moefy", base=tiny(kind), to=tmp_path / "out", experts=4, shared=2, top_k=4)
    assert result.certificate["passed"] is True
    assert result.certificate["loads_in"] == {"llama": "GraniteMoeSharedForCausalLM", "qwen2": "Qwen2MoeForCausalLM"}[kind]


@pytest.mark.parametrize(
    ("kind", "shared", "limit"),
    [("llama", 0, 1e-5), ("llama", 2, 1e-5), ("granite", 0, 1e-5), ("phi3", 0, 1e-5), ("qwen2", 0, 5e-3), ("qwen3", 0, 5e-3)],
)
def test_the_stock_result_is_the_dense_model_with_the_other_neurons_off(kind: str, shared: int, limit: float, tiny, tmp_path: Path) -> None:
    """Relative difference of the logits; Qwen's classes weigh chosen experts by a softmax that is flat only to about 1e-3."""
    knobs = {"experts": 6 - shared, "top_k": 2, "shared": shared, "split": "random"}
    out = modelwright.run("reshape.moefy", base=tiny(kind), to=tmp_path / "out", seed=3, **knobs).to
    source, ids = Checkpoint(tiny(kind)), torch.randint(3, 96, (3, 12))
    dense, sparse = source.model(), Checkpoint(out).model()
    plans = {}
    for step in walk(source, None):
        block = sparse.model.layers[step.block.index]
        moe = block.mlp if hasattr(block, "mlp") else block.block_sparse_moe
        rows = (moe.gate if hasattr(moe, "gate") else moe.router).weight.detach()
        rows = rows / rows.norm()
        plans[step.block.index] = Plan(split_layer(step, None, Knobs(**knobs), 8, 3), lambda x, mass, w=rows: x @ w.T, 2)
    with simulated(dense, plans):
        want = logits(dense, ids)
    whole = logits(dense, ids)
    found = logits(sparse, ids)
    assert float((want - whole).abs().max()) > 0.1 * float(whole.abs().max())  # two of six experts are not all
    assert float((found - want).abs().max()) < limit * float(want.abs().max())


def test_simulation_with_all_experts_or_oracle_of_all_is_the_model_itself_and_leaves_no_hook(tiny) -> None:
    model, ids = Checkpoint(tiny("llama")).model(), torch.randint(3, 96, (2, 9))
    before = logits(model, ids)
    with simulated(model, {i: Plan(contiguous(48, 6), lambda x, mass: mass, 6) for i in range(2)}):
        torch.testing.assert_close(logits(model, ids), before)
    with simulated(model, {0: Plan(contiguous(48, 6), lambda x, mass: mass, 1)}):
        assert not torch.allclose(logits(model, ids), before, atol=1e-2)
    assert torch.equal(logits(model, ids), before)


def test_a_relabelled_split_gives_the_same_function(tiny) -> None:
    model, ids, order = Checkpoint(tiny("llama")).model(), torch.randint(3, 96, (2, 9)), torch.randperm(6)
    labels = split_random(48, 6, 0, 0)
    found = []
    for own in (labels, order[labels]):
        with simulated(model, {i: Plan(own, lambda x, mass: mass, 2) for i in range(2)}):
            found.append(logits(model, ids))
    torch.testing.assert_close(*found)


def test_compensation_adds_the_mean_of_the_neurons_that_are_off(tiny) -> None:
    model, ids = Checkpoint(tiny("llama")).model(), torch.randint(3, 96, (1, 5))
    mlp, seen = model.model.layers[1].mlp, []
    mlp.register_forward_hook(lambda m, a, o: seen.append((a[0], o)))
    mean, labels = torch.randn(48), contiguous(48, 2)
    with simulated(model, {1: Plan(labels, lambda x, mass: torch.tensor([[1.0, 0.0]]).expand(len(x), 2), 1, mean)}):
        logits(model, ids)
    x, y = seen[0]
    h = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    want = h[..., :24] @ mlp.down_proj.weight[:, :24].T + mlp.down_proj.weight[:, 24:] @ mean[24:]
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", ["kmeans", "random", "coactivation", "cmoe"])
@pytest.mark.parametrize("router", ["similarity", "linear", "ridge"])
def test_every_split_and_router_makes_a_checkpoint_with_its_report(split: str, router: str, tiny, tmp_path: Path) -> None:
    knobs = {"experts": 5, "shared": 1, "top_k": 2, "split": split, "router": router, "context": 16, "data": token_file(tmp_path)}
    result = modelwright.run("reshape.moefy", base=tiny("llama", dtype="bfloat16"), to=tmp_path / "out", **knobs)
    facts = result.steps[0]["facts"]
    assert facts["target"] == "granitemoeshared" and facts["calibration tokens"] == 640
    oracle, own = facts["captured mass, oracle"], facts[f"captured mass, {router}"]
    assert 0.4 < oracle <= 1 and 0.2 < own <= oracle
    assert Checkpoint(result.to).dtype("model.layers.0.block_sparse_moe.input_linear.weight") == torch.bfloat16


def test_trained_routers_capture_more_than_similarity_and_chance(stories: Path, shared: Path, tmp_path: Path) -> None:
    data = str(next((shared / "tinyshakespeare").glob("*.txt")))
    found = {}
    for router in ("similarity", "ridge"):
        run = modelwright.run(
            "reshape.moefy", base=stories, to=tmp_path / router, experts=4, top_k=2, router=router, data=data, tokens=1024, context=128
        )
        found[router] = run.steps[0]["facts"][f"captured mass, {router}"]
    assert found["ridge"] > found["similarity"] + 0.01 and found["ridge"] > 0.53


def test_widths_are_padded_to_whole_16_bytes(tiny, tmp_path: Path) -> None:
    out = modelwright.run("reshape.moefy", base=tiny("llama", intermediate_size=44), to=tmp_path / "out", experts=4, top_k=4)
    assert out.steps[0]["facts"]["zero neurons per expert"] == 5 and out.certificate["passed"] is True
    experts = Checkpoint(out.to).model().model.layers[0].block_sparse_moe.experts
    assert experts.down_proj.shape == (4, 32, 16) and int((experts.down_proj.abs().sum(1) == 0).sum()) == 4 * 5


@pytest.mark.slow
def test_the_result_loads_and_generates_where_modelwright_is_never_imported(tiny, tmp_path: Path) -> None:
    out = modelwright.run("reshape.moefy", base=tiny("llama"), to=tmp_path / "out", experts=6, top_k=2).to
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        "print(m.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape[1])\n"
        "assert not any(n.startswith('modelwright') for n in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip().splitlines()[-1] == "7", done.stderr[-1000:]


def test_blueprint_streams_one_expert_at_a_time(tiny) -> None:
    blueprint, promise = moefy(Checkpoint(tiny("llama")), Knobs(experts=6, top_k=2))
    pieces = [p for p in blueprint.stream() if len(p) == 3]
    assert promise == "changed function" and {tuple(p[1].shape) for p in pieces} == {(16, 32), (32, 8)} and len(pieces) == 2 * 2 * 6


# ---- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("llama", ["--experts", "5", "--top-k", "2"], "48 neurons do not divide into 5 experts"),
        ("llama", ["--experts", "4", "--top-k", "5"], "top_k=5 but there are 4 experts"),
        ("llama", ["--router", "mlp"], "no stock class holds router=mlp"),
        ("llama", ["--split", "cmoe"], "needs calibration text"),
        ("llama", ["--router", "linear"], "needs calibration text"),
        ("llama", ["--shared", "2", "--target", "mixtral"], "has no shared expert"),
        ("qwen3", ["--shared", "2", "--experts", "4"], "no stock class holds shared experts"),
        ("mixtral", [], "is a mixture of experts already"),
        ("gpt2", [], "has no gate"),
        ("opt", [], "has no gate"),
        ("gemma2", [], "norms what attention"),
        ("t5", [], "has an encoder"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    kind: str, flags: list[str], words: str, tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["reshape", "moefy", "--base", str(tiny(kind)), "--to", str(tmp_path / "out"), *flags])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and "Traceback" not in out + err
    assert words in err.strip().splitlines()[-1], err
    assert not list(tmp_path.iterdir())


def test_a_calibration_text_shorter_than_a_row_is_refused(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = token_file(tmp_path, rows=1)
    flags = ["--experts", "6", "--top-k", "2", "--router", "ridge", "--data", data, "--context", "32"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["reshape", "moefy", "--base", str(tiny("llama")), "--to", str(tmp_path / "out"), *flags])
    assert caught.value.code == 2 and "one row takes 32" in capsys.readouterr()[1]
    assert not (tmp_path / "out").exists()
