"""Experts over real processes: a layer and stock models are what they are in one process, with simulated ranks."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import expert_ranks
import pytest
import torch
import torch.nn.functional as F
from expert_ranks import CASES, NAMES, STOCK, Case, E

from families import model_of
from modelwright.core.errors import UserError
from modelwright.moe.execute import execute
from modelwright.moe.parallel import Lists, execute_over, rectify_over, share
from modelwright.moe.rectify import rectify
from modelwright.moe.routing import CHOSEN, FILLED, LOCAL, capacity

pytestmark = pytest.mark.slow  # every case trains or runs in two processes
HERE = Path(__file__).parent
PROCESSES = 4  # two groups of two
Found = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case run by all processes, in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    done = subprocess.run(
        [*command, str(HERE / "expert_ranks.py"), str(folder), str(PROCESSES)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Found]]:
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(PROCESSES)]


@pytest.fixture(params=range(PROCESSES // 2), ids="group {}".format)
def group(request: pytest.FixtureRequest, ranks: list[dict[str, Found]]) -> tuple[int, list[dict[str, Found]]]:
    return request.param, ranks[2 * request.param : 2 * request.param + 2]


def _laid_out(case: Case, made: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token of the group its place in equal shares, and which places are real."""
    longest = max(case.sizes)
    place = torch.cat([torch.arange(n) + r * longest for r, n in enumerate(case.sizes)])
    return place, torch.zeros(2 * longest, dtype=torch.bool).index_put((place,), made["real"])


def _alone(case: Case, which: int) -> Found:
    """The case in one process, with simulated ranks."""
    made = expert_ranks.data(case, which)
    leaves = {n: made[n].clone().requires_grad_() for n in NAMES}
    place, real = _laid_out(case, made)
    x = leaves["x"].new_zeros(len(real), leaves["x"].shape[1]).index_add(0, place, leaves["x"])
    if not case.options:
        x = leaves["x"]
    routing = expert_ranks.route(case, x, leaves["router"], real, lambda *a, **o: rectify(*a, ranks=2, **o))
    y = execute(x, routing, leaves["gate_up"], leaves["down"])
    y = y[place] if case.options else y
    grads = torch.autograd.grad((y * made["v"]).sum(), list(leaves.values()))
    return {"y": y.detach(), "routing": routing, "place": place} | {f"d {n}": g for n, g in zip(leaves, grads, strict=True)}


def _together(parts: list[Found]) -> Found:
    cat = {n: torch.cat([p[n] for p in parts]) for n in ("y", "d x", "d gate_up", "d down")}
    return cat | {"d router": sum(p["d router"] for p in parts)}


def _same(found: Found, want: Found, dtype: torch.dtype, *names: str) -> None:
    near = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for n in names or ("y", *(f"d {n}" for n in NAMES)):
        scale = float(want[n].abs().max()) if want[n].numel() else 1.0
        torch.testing.assert_close(found[n] / max(scale, 1.0), want[n] / max(scale, 1.0), **near, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_processes_are_the_simulated_ranks(name: str, group) -> None:
    case, (which, both) = CASES[name], group
    want, parts = _alone(case, which), [p[name] for p in both]
    _same(_together(parts), want, case.dtype)
    if not case.options:
        return
    rows = lambda r, start: set(zip((r["token"] + start).tolist(), r["expert"].tolist(), r["source"].tolist(), strict=True))  # noqa: E731
    simulated, longest = want["routing"], max(case.sizes)
    assert set.union(*(rows(p, i * longest) for i, p in enumerate(parts))) == rows(vars(simulated), 0)
    assert sum(p["asked"] for p in parts) == simulated.num_assignments
    assert torch.equal(torch.cat([p["probs"] for p in parts]), simulated.probs[want["place"]])


@pytest.mark.parametrize("name", ["enough", "plain", "plain fp32"])
def test_enough_capacity_is_the_plain_layer_in_one_process(name: str, group) -> None:
    from modelwright.moe.layer import Layer, TokenChoice

    case, (which, both) = CASES[name], group
    made = expert_ranks.data(case, which)
    layer = Layer(TokenChoice(expert_ranks.D, E, case.k), expert_ranks.D, expert_ranks.WIDTH, E).to(case.dtype)
    layer.load_state_dict({"router.weight": made["router"], "gate_up": made["gate_up"], "down": made["down"]}, strict=False)
    x = made["x"].requires_grad_()
    y, _ = layer(x)
    (y * made["v"]).sum().backward()
    want = {
        "y": y.detach(),
        "d x": x.grad,
        "d router": layer.router.weight.grad,
        "d gate_up": layer.gate_up.grad,
        "d down": layer.down.grad,
    }
    names = () if name != "enough" else ("y", "d gate_up", "d down")  # rectified weights have denominators without gradient
    _same(_together([p[name] for p in both]), want, case.dtype, *names)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("identical")])
def test_identical_experts_are_the_dense_layer_at_any_capacity(name: str, group) -> None:
    case, (which, both) = CASES[name], group
    made = expert_ranks.data(case, which)
    gate, up = (made["x"] @ made["gate_up"][0].T).chunk(2, -1)
    torch.testing.assert_close(_together([p[name] for p in both])["y"], (F.silu(gate) * up) @ made["down"][0].T, rtol=1e-10, atol=1e-10)
    assert all((p[name]["source"] == LOCAL).any() for p in both)


def test_rectification_inside_a_rank_sends_nothing(group) -> None:
    _, both = group
    for name in ("even", "intra alone", "uneven", "any"):
        for rank, p in enumerate(p[name] for p in both):
            local = p["source"] == LOCAL
            assert local.any() and (p["expert"][local] // (E // 2) == rank).all()
            away = p["expert"][~local] // (E // 2) != rank
            assert p["sent"][1 - rank] == int(away.sum()) > 0
    assert [p["even"]["sent"][1 - r] for r, p in enumerate(both)] == [p["fill in alone"]["sent"][1 - r] for r, p in enumerate(both)]


def test_slots_are_shared_by_the_group(group) -> None:
    _, both = group
    for name in ("even", "drop", "uneven", "none on one"):
        case = CASES[name]
        slots = capacity(sum(case.sizes), E, case.k, case.options["factor"])
        rows = torch.cat([p[name]["expert"][p[name]["source"] != LOCAL] for p in both]).bincount(minlength=E)
        assert rows.max() == slots
    sources = {name: set(torch.cat([p[name]["source"] for p in both]).tolist()) for name in ("drop", "fill in alone", "even")}
    assert sources == {"drop": {CHOSEN}, "fill in alone": {CHOSEN, FILLED}, "even": {CHOSEN, FILLED, LOCAL}}


def test_without_other_processes_it_is_the_layer_itself() -> None:
    made = expert_ranks.data(CASES["even"], 0)
    logits = made["x"] @ made["router"].T
    ours, theirs = rectify_over(logits, 2, factor=0.5), rectify(logits, 2, factor=0.5)
    found = execute_over(made["x"], ours, share(made["gate_up"]), share(made["down"]))
    torch.testing.assert_close(found, execute(made["x"], theirs, made["gate_up"], made["down"]))
    with pytest.raises(UserError, match="4 experts on each of 1 ranks, but 8 are routed to"):
        execute_over(made["x"], ours, made["gate_up"][:4], made["down"][:4])


# ---- stock models ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", STOCK)
def test_a_model_laid_on_processes_is_the_stock_one(name: str, ranks: list[dict[str, Found]], folder: Path, tmp_path: Path) -> None:
    stock, model = STOCK[name], model_of(STOCK[name].family)
    model.save_pretrained(tmp_path)
    whole, n = expert_ranks.bytes_of_experts(model), STOCK[name].processes
    want = expert_ranks.run(model, stock, expert_ranks.batch(stock), lambda *a, **o: rectify(*a, ranks=n, **o))
    for start in range(0, PROCESSES, n):
        parts = [p[name] for p in ranks[start : start + n]]
        for mine, p in zip(want.split(expert_ranks.ROWS), parts, strict=True):
            torch.testing.assert_close(p["logits"], mine[:, : p["logits"].shape[1]], rtol=0, atol=1e-5)
            assert p["bytes"] * n == whole and p["continues"]
        for path, weight in model.named_parameters():
            scale = max(float(weight.grad.abs().max()), 1.0)
            for g in (p[f"d {path}"] for p in parts):
                torch.testing.assert_close(g / scale, weight.grad / scale, rtol=0, atol=1e-5, msg=lambda m, path=path: f"{path}: {m}")
    assert (folder / name / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_a_model_whose_tokens_go_where_the_router_sends_them_is_not_rerouted(ranks: list[dict[str, Found]]) -> None:
    for found in ranks:
        assert "MixtralExperts cannot follow another routing" in found["refused"]["words"]
        assert 'ep_implementation="modelwright"' in found["refused"]["words"]


def test_experts_that_no_list_can_drive_are_refused() -> None:
    from types import SimpleNamespace

    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    biased = GptOssExperts(GptOssConfig(hidden_size=16, intermediate_size=8, num_local_experts=4))
    with pytest.raises(
        UserError, match="GptOssExperts cannot be spread over processes by routing lists, because its experts are not gated"
    ):
        Lists(biased, None, None)
    with pytest.raises(UserError, match="do not go with tensor parallelism"):
        Lists(model_of("mixtral").model.layers[0].mlp.experts, None, SimpleNamespace(size=lambda: 2))
