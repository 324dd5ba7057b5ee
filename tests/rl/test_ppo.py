"""rl.ppo inside the one loop: plain PPO as n = 1, resumed to the bit, accumulated, beside adapters and freezing, on real models."""

import gc
import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rollout import reward_model

import modelwright
from families import model_of
from modelwright.core.data.rows import Rows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train.loop import fit, steps_for
from modelwright.rl.ppo import Knobs, Ppo
from modelwright.rl.rollout.objective import PpoOutputs
from modelwright.tune import hft, lora
from small import Fatal, far, go, rows, same, weights

SEEDLING = Path(modelwright.__file__).parent / "data" / "seedling"


def worth(completion_ids: list[list[int]]) -> list[float]:
    """How many even tokens a response has: something that each response has more or less of."""
    return [sum(t % 2 == 0 for t in ids) / 4 for ids in completion_ids]


@pytest.fixture(scope="module", autouse=True)
def _cheap_collections() -> Iterator[None]:
    """The Trainer collects garbage when it starts; what the session holds already is left out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    module = types.ModuleType("my_rewards")
    module.worth = worth  # type: ignore[attr-defined]
    module.nothing = lambda completions: [0.0] * len(completions)  # type: ignore[attr-defined]
    module.late = _Late()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_rewards", module)


class _Late:
    """Fails in the third update."""

    calls = 0

    def __call__(self, completion_ids: list[list[int]]) -> list[float]:
        self.calls += 1
        return [math.nan if self.calls > 2 else float(len(i)) for i in completion_ids]


def ppo(**knobs: Any) -> Ppo:
    usual = {"reward_function": "my_rewards:worth", "response_tokens": 8, "kl": 0.02}
    return Ppo(Knobs(**{**usual, **knobs}))


def prompts(n: int = 8) -> Rows:
    return rows(n, 6, ragged=True)


def trained(folder: Path, technique: Ppo | None = None, kind: str = "llama", n: int = 8, **train: Any) -> tuple[Any, Ppo, Any]:
    technique = technique or ppo()
    model = model_of(kind)
    out = go(technique, model, folder, prompts(n), None, **{"epochs": 2.0, "divergence": 0.0, **train})
    return model, technique, out


# ---- what is learnt --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("critic", ["model", "head"])
def test_the_reward_rises(critic: str, tmp_path: Path) -> None:
    _, technique, out = trained(tmp_path, ppo(critic=critic), n=16, epochs=8.0, batch=16)
    reward = out.facts["ppo"]["reward"]
    assert reward["last"] > reward["first"] + 0.3
    assert out.facts["ppo"]["updates"] == 8 == len(technique.history.updates)
    assert "the critic moved" in out.liveness[0] and "macro actions" in out.liveness[0]
    [panels] = technique.plots()
    assert [p["title"] for p in panels["plots"]][:2] == ["reward", "KL from the reference (nats a response)"]
    assert all(len(s) == 8 for p in panels["plots"] for s in p["series"].values())


def test_n_of_one_is_plain_ppo_to_the_bit(tmp_path: Path) -> None:
    a, one, _ = trained(tmp_path / "a", ppo(segmenter="token"), batch=8)
    b, two, _ = trained(tmp_path / "b", ppo(segmenter="ngram", n=1), batch=8)
    c, three, _ = trained(tmp_path / "c", ppo(segmenter="ngram", n=3), batch=8)
    assert same(weights(a), weights(b)) and one.history.updates == two.history.updates
    assert all(torch.equal(one.kept[k], two.kept[k]) for k in ("advantages", "returns", "values"))
    assert not same(weights(a), weights(c)) and three.history.updates[0]["actions"] < one.history.updates[0]["actions"]


def test_the_first_loss_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    """Before the first step every ratio is 1: the policy loss is -mean A, the value loss the mean of (v - return)^2 / 2."""
    seen: list[tuple[dict[str, Any], PpoOutputs]] = []

    class Watched(Ppo):
        def objective(self, *a: Any) -> Any:
            made = super().objective(*a)
            forward = made.forward

            def watched(model: Any, batch: Any, weights: Any) -> Any:
                out = forward(model, batch, weights)
                seen.append((dict(batch), out))
                return out

            made.forward = watched
            return made

    technique = Watched(ppo(kl=0.1, segmenter="perplexity").knobs)
    _, _, out = trained(tmp_path, technique, batch=4, epochs=1.0)
    batch, first = seen[0]
    learnt = batch["labels"][:, 1:] != -100
    assert torch.allclose(first.losses[learnt], -batch["advantages"][learnt], atol=1e-4)
    expected = 0.5 * (batch["values"] - batch["returns"])[learnt] ** 2
    assert first.value_losses is not None and torch.allclose(first.value_losses.detach()[learnt], expected, atol=1e-4)
    count = int(learnt.sum())
    total = float(-batch["advantages"][learnt].sum()) / count
    assert out.log[0]["loss"] == pytest.approx(total, abs=1e-4)
    assert technique.history.updates[0]["clipped"] == 0.0
    # only tokens of the response are learnt, and all of them
    lengths = batch["real"].sum(1) - (batch["labels"] == -100).logical_and(batch["real"]).sum(1)
    assert learnt.sum(1).tolist() == lengths.tolist() and int(lengths.max()) <= 8


@pytest.mark.slow
def test_the_penalty_keeps_the_policy_near_its_reference(tmp_path: Path) -> None:
    free = trained(tmp_path / "a", ppo(kl=0.0), n=16, epochs=8.0, batch=16)[2].facts["ppo"]
    held = trained(tmp_path / "b", ppo(kl=5.0, kl_estimator="k3"), n=16, epochs=8.0, batch=16)[2].facts["ppo"]
    name = "KL (nats a response)"
    assert held[name]["last"] < 0.5 * free[name]["last"] and held["reward"]["last"] < free["reward"]["last"]


# ---- the loop --------------------------------------------------------------------------------------------------------
def stoppable(folder: Path, at: int | None) -> tuple[Any, Ppo]:
    """Four optimizer steps an update: two passes of two minibatches. Two updates."""
    technique, model = ppo(ppo_epochs=2, minibatches=2, response_tokens=6), model_of("llama")
    go(technique, model, folder, prompts(8), at, epochs=2.0, batch=2, save_every=1, lr=3e-3, divergence=0.0)
    return model, technique


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Any, Ppo]]:
    return cache(lambda: stoppable(tmp_path_factory.mktemp("whole"), None))


@pytest.mark.parametrize("stop", [4, 6])
def test_a_resumed_run_is_equal_to_the_bit_in_the_middle_of_an_update_too(stop: int, unbroken: Any, tmp_path: Path) -> None:
    whole, first = unbroken()
    with pytest.raises(Fatal):
        stoppable(tmp_path, stop)
    model, technique = stoppable(tmp_path, None)
    assert same(weights(whole), weights(model)) and same(weights(first.critic), weights(technique.critic))
    assert technique.history.updates == first.history.updates and len(technique.history.updates) == 2


@pytest.mark.slow
def test_passes_of_an_update_see_each_response_once(tmp_path: Path) -> None:
    technique = ppo(ppo_epochs=2, minibatches=2)
    trained(tmp_path, technique, batch=2, accumulate=2, epochs=1.0)
    technique.update = -1
    technique.model.eval()
    found = [technique.minibatch(step, at)["input_ids"].tolist() for step in range(4) for at in range(2)]
    flat = [[tuple(t for t in row if t) for b in part for row in b] for part in (found[:4], found[4:])]
    assert sorted(flat[0]) == sorted(flat[1]) and flat[0] != flat[1] and len(set(flat[0])) == 8


@pytest.mark.slow
def test_accumulation_is_one_large_batch(tmp_path: Path) -> None:
    a = trained(tmp_path / "a", batch=8)[0]
    b = trained(tmp_path / "b", batch=2, accumulate=4)[0]
    assert far(weights(a), weights(b)) < 2e-3


@pytest.mark.slow
def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    a = trained(tmp_path / "a")[0]
    b = trained(tmp_path / "b", gradient_checkpointing=True)[0]
    assert far(weights(a), weights(b)) < 1e-4


def test_a_run_takes_as_many_updates_as_it_is_told() -> None:
    data, usual = prompts(8), Train(batch=2, accumulate=2, epochs=3.0)
    for technique, train, updates in (
        (ppo(), usual, 6),
        (ppo(ppo_epochs=3), usual, 6),
        (ppo(minibatches=2), usual, 3),
        (ppo(updates=5, ppo_epochs=2), usual, 5),
        (ppo(), replace(usual, tokens=5 * data.tokens), 10),
        (ppo(), replace(usual, epochs=0.01), 1),
    ):
        settings = technique.settings(data, train)
        assert steps_for(data, settings) == updates * technique.knobs.ppo_epochs * technique.knobs.minibatches
        assert settings.divergence == 0.0


def test_held_out_prompts_tell_reward_and_distance(tmp_path: Path) -> None:
    technique = ppo()
    train = Train(batch=8, epochs=4.0, lr=1e-2, divergence=0.0, eval_every=4, warmup=0.0, schedule="constant", record=False)
    out = fit(model_of("llama"), prompts(), train, techniques=[technique], evals={"new": prompts(6)}, folder=tmp_path, seed=0)
    first, last = out.at("new", last=False), out.at("new")
    assert first["loss"] == pytest.approx(0.0, abs=1e-4) and last["loss"] > 0.01
    assert last["reward"] > first["reward"] and 1 <= last["response tokens"] <= 8


# ---- beside other methods, on other models ---------------------------------------------------------------------------
@pytest.mark.slow
def test_adapters_learn_and_the_base_stays(tmp_path: Path) -> None:
    model, before = model_of("llama"), weights(model_of("llama"))
    both = [lora.Lora(lora.Knobs(r=4)), ppo()]
    out = go(both, model, tmp_path, prompts(16), epochs=8.0, batch=16, lr=3e-2, divergence=0.0)
    base = {n.replace(".base_layer", ""): p for n, p in out.model.get_base_model().named_parameters() if "lora_" not in n}
    assert same({n: base[n].detach() for n in before}, before)
    assert out.facts["ppo"]["reward"]["last"] > out.facts["ppo"]["reward"]["first"]
    assert out.facts["ppo"]["KL (nats a response)"]["first"] == pytest.approx(0, abs=0.3)


def test_frozen_halves_stay_and_the_critic_moves_whole(tmp_path: Path) -> None:
    technique = ppo()
    model, before = model_of("llama"), weights(model_of("llama"))
    out = go([hft.Hft(hft.Knobs()), technique], model, tmp_path, prompts(), epochs=2.0, batch=8)
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert len(still) > 5 and all("moved" in said for said in out.liveness[1:])
    start = model_of("llama").base_model.state_dict()
    assert all(not torch.equal(p, start[n]) for n, p in technique.critic.trunk.named_parameters())


@pytest.mark.parametrize(("kind", "critic"), [("qwen3", "model"), ("gpt2", "head"), ("opt", "head"), ("mixtral", "model")])
def test_other_kinds_of_models_learn_too(kind: str, critic: str, tmp_path: Path) -> None:
    _, technique, out = trained(tmp_path, ppo(critic=critic, response_tokens=4), kind, batch=8, epochs=1.0)
    assert "the critic moved" in out.liveness[0]
    assert technique.history.updates[0]["clipped"] == 0.0 and technique.history.updates[0]["kl"] == pytest.approx(0, abs=1e-4)


def test_models_without_a_response_are_refused(tmp_path: Path) -> None:
    for kind in ("t5", "bert"):
        with pytest.raises(UserError, match="writes no responses"):
            go(ppo(), model_of(kind), tmp_path / kind, prompts())
    with pytest.raises(UserError, match="the model has 64 positions"):
        go(ppo(response_tokens=60), model_of("llama"), tmp_path / "long", prompts())
    with pytest.raises(UserError, match="parse reads text"):
        go(ppo(segmenter="parse"), model_of("llama"), tmp_path / "parse", prompts())


def test_nothing_to_learn_is_said_and_no_fault(tmp_path: Path) -> None:
    _, _, out = trained(tmp_path, ppo(reward_function="my_rewards:nothing", kl=0.0), epochs=1.0, batch=8)
    assert "nothing to learn" in out.liveness[0]


def test_a_reward_that_breaks_keeps_the_states(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not finite"):
        trained(tmp_path, ppo(reward_function="my_rewards:late"), save_every=1)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


# ---- whole runs ------------------------------------------------------------------------------------------------------
def test_a_whole_run_from_prompts_to_a_model_that_loads(tmp_path: Path) -> None:
    data, own = tmp_path / "prompts.jsonl", tmp_path / "own.py"
    texts = ["def read(", "import", "class File:", "return x " * 40, "for i in"]
    data.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    own.write_text("def letters(completions):\n    return [sum(c.isalpha() for c in t) / 10 for t in completions]\n")
    result = modelwright.run(
        "rl.ppo",
        base=SEEDLING,
        to=tmp_path / "out",
        data=str(data),
        reward_function=f"{own}:letters",
        segmenter="parse",
        response_tokens=8,
        prompt_tokens=16,
        updates=2,
        train={"batch": 4, "lr": 1e-4, "warmup": 0.0},
        save={"certificate": "structure"},
    )
    assert Checkpoint(result.to).model() is not None
    assert result.steps[0]["facts"]["ppo"]["updates"] == 2
    told = (result.to / "report.html").read_text()
    assert all(w in told for w in ("left out: longer than prompt tokens", "reward: first", "KL from the reference (nats a response)"))


def test_a_reward_model_of_the_same_tokens_starts_the_critic(tmp_path: Path) -> None:
    folder = reward_model(tmp_path / "reward")
    technique = ppo(reward=str(folder), reward_function=None, reward_clip=0.0)
    _, _, out = trained(tmp_path / "run", technique, batch=8, epochs=1.0)
    last = technique.kept["length"] - 2  # the value before the last token, of what stands there so far
    before = technique.kept["values"].gather(1, last[:, None])[:, 0]
    prompts_of = [r[: int(n) - 1] for r, n in zip(technique.kept["input_ids"], technique.kept["length"], strict=True)]
    judged = technique.reward([p[:1] for p in prompts_of], [p[1:] for p in prompts_of], 8)
    assert torch.allclose(before, judged, atol=1e-4) and "the critic moved" in out.liveness[0]
