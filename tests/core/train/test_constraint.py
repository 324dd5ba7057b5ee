"""Gates and constraints: closed forms, multipliers that ascend, targets that are reached, one result whatever the processes."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # for torchrun, which starts this file

from families import model_of
from modelwright.core.knobs import Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train import constraint, dist
from modelwright.core.train.constraint import Constrained, Gates, Goal, Multipliers, keep_largest, settled
from modelwright.core.train.loop import fit
from small import Fatal, go, rows, same, weights


class Narrow(Constrained):
    """Closes half of the neurons of every feed-forward part."""

    name = "narrow"

    def __init__(self, end: float = 0.5, **rates: float):
        super().__init__(**{"parts_lr": 0.3, "multiplier_lr": 0.3, "warm_up": 0.3} | rates)
        self.end = end

    def build(self, model: Any, anatomy: Anatomy) -> nn.Module:
        self.gates: Tensor | None = None
        for b in anatomy.blocks:
            down = b.module.get_submodule("mlp.down_proj")
            down.register_forward_pre_hook(
                lambda m, args, i=b.index: None if self.gates is None else args[0] * self.gates[i].to(args[0].dtype)
            )
        return Gates((len(anatomy.blocks), 48), 3.0, seed=5, spread=0.01)

    def aims(self, parts: nn.Module) -> dict[str, Goal]:
        return {"open": Goal(self.end, 1.0)}

    def values(self, parts: nn.Module) -> dict[str, Tensor]:
        return {"open": parts.active().mean(-1)}  # type: ignore[operator]

    def enter(self, parts: nn.Module, training: bool) -> None:
        self.gates = parts(self.step) if training else settled(parts.log_alpha)  # type: ignore[arg-type]

    def leave(self, parts: nn.Module) -> None:
        parts.limit(4.0)  # type: ignore[operator]


# ---- gates -----------------------------------------------------------------------------------------------------------
def test_closed_forms_agree_with_many_draws() -> None:
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    for a in torch.linspace(-6, 6, 20):
        z = constraint.sample(a, u)
        assert abs(float((z > 0).float().mean() - constraint.open_probability(a))) < 5e-3
        assert abs(float((z == 1).float().mean() - constraint.whole_probability(a))) < 5e-3
    known = {0.0: (0.8318, 0.1682), 3.0: (0.9900, 0.8024)}
    for a, (some, all_) in known.items():
        assert float(constraint.open_probability(torch.tensor(a))) == pytest.approx(some, abs=1e-4)
        assert float(constraint.whole_probability(torch.tensor(a))) == pytest.approx(all_, abs=1e-4)


def test_settled_gates_are_exact_from_ln_11_on() -> None:
    edge, fine = math.log(11), 1e-4
    z = settled(torch.tensor([-edge - fine, -edge + fine, edge - fine, edge + fine]))
    assert z[0] == 0 and 0 < z[1] < 1e-3 and 1 - 1e-3 < z[2] < 1 and z[3] == 1
    assert settled(torch.tensor(edge / 1.2 + fine), 1.2) == 1 > settled(torch.tensor(edge / 1.2 - fine), 1.2)


def test_the_largest_are_kept_and_of_equal_ones_the_first() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert keep_largest(scores, torch.tensor([2, 3])).tolist() == [[False, True, True, False], [True, True, True, False]]
    assert keep_largest(scores, torch.tensor([0, 4])).sum(1).tolist() == [0, 4]


def test_a_draw_follows_from_seed_step_and_stream_alone() -> None:
    a, b = Gates((3, 7), 0.0, seed=1), Gates((3, 7), 0.0, seed=1)
    a(4), a(9)
    assert torch.equal(a(5), b(5)) and not torch.equal(a(5), a(6))
    assert not torch.equal(a(5), Gates((3, 7), 0.0, seed=1, stream=1)(5)) and not torch.equal(a(5), Gates((3, 7), 0.0, seed=2)(5))


def test_gates_are_reached_by_a_gradient() -> None:
    gates = Gates((50,), 0.0, seed=0)
    gates(0).sum().backward()
    assert 0 < int((gates.log_alpha.grad != 0).sum()) < 50  # none through a gate that is cut off at 0 or 1


# ---- the constraint --------------------------------------------------------------------------------------------------
def test_targets_move_from_begin_to_end_and_stay() -> None:
    goal = Goal(0.5, 1.0)
    assert [goal.at(x) for x in (0.0, 0.5, 1.0, 3.0)] == [1.0, 0.75, 0.5, 0.5]
    assert Goal(1.0, shape="cubic").at(0.5) == pytest.approx(0.875)


def test_the_value_is_the_formula_and_multipliers_have_the_opposite_gradient() -> None:
    held, gap = Multipliers(), torch.tensor([0.3, -0.1], requires_grad=True)
    with torch.no_grad():
        held.linear.fill_(2.0), held.square.fill_(4.0)
    value = held(gap)
    assert float(value.detach()) == pytest.approx(sum(2 * g + 4 * g * g for g in (0.3, -0.1)) / 2)
    value.backward()
    assert torch.allclose(gap.grad, (2 + 8 * gap.detach()) / 2)
    assert float(held.linear.grad) == pytest.approx(-0.1) and float(held.square.grad) == pytest.approx(-(0.09 + 0.01) / 2)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_multipliers_ascend_under_every_optimizer(optimizer: str, tmp_path: Path) -> None:
    technique = Narrow(warm_up=0.0)
    model = model_of("llama")
    go(technique, model, tmp_path, optimizer=optimizer, epochs=2.0, clip=0.0)
    held = model.constraint.multipliers["open"]
    assert held.linear.item() > 0 and held.square.item() > 0  # too many are open


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Narrow, Any]:
    torch.manual_seed(0)
    model, technique = model_of("llama"), Narrow(multiplier_lr=3.0)
    return model, technique, go(technique, model, tmp_path_factory.mktemp("trained"), rows(16), epochs=45.0, lr=1e-3, schedule="linear")


def test_the_expected_activity_reaches_its_target(trained: tuple[Any, Narrow, Any]) -> None:
    model, technique, outcome = trained
    each = model.constraint.parts.active().mean(-1)
    assert (each - 0.5).abs().max() < 0.01, each  # in every layer
    assert abs(outcome.facts["narrow"]["reached"]["open"] - 0.5) < 0.01 and outcome.facts["narrow"]["wanted"] == {"open": 0.5}
    assert (
        technique.step == outcome.steps and "open 0.9" in outcome.liveness[0] and float(model.constraint.parts.log_alpha.abs().max()) <= 4.0
    )


def test_what_was_added_comes_off(trained: tuple[Any, Narrow, Any]) -> None:
    model = trained[0]
    names = {n for n, _ in model_of("llama").named_parameters()}
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"model", "lm_head", "constraint"}
    assert not model._forward_pre_hooks
    parts = model.constraint.parts
    assert constraint.detach(model) is parts and {n for n, _ in model.named_parameters()} == names


def test_what_is_added_has_rates_of_its_own_and_no_decay(tmp_path: Path) -> None:
    technique, model = Narrow(), model_of("llama")
    go(technique, model, tmp_path, weight_decay=0.1)
    groups = {id(p): g for g in technique.optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        own = name.startswith("constraint.")
        assert (groups[id(p)]["lr"] == 0.3) is own and (not own or groups[id(p)]["weight_decay"] == 0), name


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_every": 2, "epochs": 3.0, "schedule": "linear"}
    whole, again = model_of("llama"), model_of("llama")
    first = go(Narrow(), whole, tmp_path / "whole", **settings)
    with pytest.raises(Fatal):
        go(Narrow(), model_of("llama"), tmp_path / "again", stop=3, **settings)
    technique = Narrow()
    second = go(technique, again, tmp_path / "again", **settings)
    assert same(weights(whole), weights(again)) and first.facts == second.facts and technique.step == first.steps


@pytest.mark.parametrize("how", [{"batch": 2, "accumulate": 4}, {"batch": 8, "gradient_checkpointing": True}], ids=str)
def test_accumulated_and_recomputed_passes_are_plain_ones(how: dict[str, Any], tmp_path: Path) -> None:
    one, other = model_of("llama"), model_of("llama")
    go(Narrow(), one, tmp_path / "one", batch=8, lr=1e-4, epochs=2.0)
    go(Narrow(), other, tmp_path / "other", **{"lr": 1e-4, "epochs": 2.0} | how)
    a, b = weights(one), weights(other)
    assert max(float((a[n] - b[n]).abs().max()) for n in a) <= 2e-6


# ---- several processes -----------------------------------------------------------------------------------------------
def _one(folder: Path, strategy: str) -> dict[str, Tensor]:
    train = Train(batch=8 // dist.world(), lr=1e-4, schedule="constant", warmup=0.0, epochs=4.0, record=False, strategy=strategy)
    out = fit(model_of("llama"), rows(16), train, techniques=[Narrow()], evals={"new": rows(seed=3)}, folder=folder, seed=0)
    found = {} if dist.rank() else weights(out.model)
    return found | {"evals": torch.tensor([e["loss"] for e in out.evals])}


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    alone = _one(tmp_path / "alone", "ddp")
    for strategy in ("ddp", "fsdp2"):
        both = torch.load(tmp_path / f"{strategy}.pt", weights_only=True)
        assert both.keys() == alone.keys() and max(float((both[n] - alone[n]).abs().max()) for n in alone) <= 1e-5, strategy


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start(2)
    for strategy in ("ddp", "fsdp2"):
        found = _one(Path(sys.argv[1]) / strategy, strategy)
        if not dist.rank():
            torch.save(found, Path(sys.argv[1]) / f"{strategy}.pt")
    dist.end()
