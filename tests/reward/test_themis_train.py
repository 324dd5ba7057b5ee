"""reward.themis_train: the loss of the traces is the language model's, the ranking is a term beside it, and the result calls its tools."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import modelwright
from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train.loop import fit
from modelwright.core.train.technique import LossTerm
from modelwright.models.tool_reward import ToolRewardModel, tool_reward_model
from modelwright.reward.themis_train import Knobs, Ranking, ThemisTrain
from modelwright.reward.tools.builtin import toolbox
from modelwright.reward.tools.judge import ToolReward
from modelwright.reward.tools.traces import OBSERVATION, parse
from modelwright.testing import made
from modelwright.tune.lora import Knobs as LoraKnobs
from modelwright.tune.lora import Lora


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made("traces", tmp_path_factory.mktemp("made"))["data"]


def ready(pairs: str, base: str = "seedling", **knobs: Any) -> tuple[ThemisTrain, Any, Any, Any]:
    """Technique, model, objective and rows, as a step makes them."""
    technique, source = ThemisTrain(Knobs(**knobs)), Checkpoint(base)
    model = technique.load(source, torch.float32)
    tokenizer, train = source.tokenizer(), Train(context=512)
    technique.select(model, None, 0)  # type: ignore[arg-type]
    rows = technique.rows(Data(path=pairs), tokenizer, len(tokenizer), train, 0)
    return technique, model, technique.objective(model, tokenizer, train, 0), rows


def weighted(model: Any, objective: Any, rows: Any, n: int = 3) -> tuple[Any, Any, torch.Tensor]:
    """A batch, its outputs, and the weights of its tokens."""
    batch = objective.collate([rows[i] for i in range(n)])
    weights = LossTerm().weights(batch)
    objective.install(model)
    try:
        return batch, objective.forward(model.eval(), batch, weights), weights
    finally:
        objective.remove()


def test_without_ranking_the_loss_is_the_causal_language_model_s(pairs: str) -> None:
    technique, model, objective, rows = ready(pairs, ranking=0.0)
    batch, out, weights = weighted(model, objective, rows)
    assert technique.terms() == []
    expected = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert float(out.total.detach() / weights.sum()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("knobs", [{"alpha": 0.0}, {"beta": 0.0}, {"omega": 0.0}, {"alpha": 0.5, "beta": 0.25, "omega": 2.0}], ids=str)
def test_each_part_of_a_trace_has_its_weight(knobs: dict[str, float], pairs: str) -> None:
    _, model, objective, rows = ready(pairs, **knobs)
    batch, out, weights = weighted(model, objective, rows, 1)
    k = Knobs(**knobs)
    ids = rows[0]["chosen"].tolist()
    marks = [i for i, t in enumerate(ids) if t >= 2048]  # <start_tool>, <start_observation>, <start_work>
    assert len(marks) == 3
    expected = [0.0] * marks[0] + [k.alpha] * (marks[1] + 1 - marks[0]) + [k.alpha * k.beta] * (marks[2] - marks[1] - 1)
    expected += [k.omega] * (len(ids) - marks[2])
    assert rows[0]["chosen_weights"].tolist() == expected
    assert float(out.total.detach()) == pytest.approx(float((out.losses * weights).sum()), rel=1e-5)


def test_the_ranking_loss_is_of_rewards_read_at_the_end_of_the_trace(pairs: str) -> None:
    technique, model, objective, rows = ready(pairs, ranking=0.5)
    batch, out, _ = weighted(model, objective, rows)
    [term] = technique.terms()
    assert isinstance(term, Ranking) and term.weight == 0.5 and int(term.count(batch)) == 3
    alone = [float(model(input_ids=rows[i][n][None]).logits[0, 0].detach()) for n in ("chosen", "rejected") for i in range(3)]
    assert out.rewards.tolist() == pytest.approx(alone, abs=1e-4)
    expected = -torch.nn.functional.logsigmoid(out.rewards[:3] - out.rewards[3:])
    assert torch.allclose(term.sums(batch, out), expected)


def test_new_tokens_begin_as_the_mean_of_all(pairs: str) -> None:
    technique, model, _, _ = ready(pairs)
    table = model.model.get_input_embeddings().weight
    assert technique.new_tokens == 3 and table.shape[0] == 2051
    assert torch.allclose(table[2048:], table[:2048].mean(0).expand(3, -1), atol=1e-6)


def test_accumulated_filled_up_and_recomputed_batches_are_one_batch(pairs: str, tmp_path: Path) -> None:
    found = []
    for k, train in enumerate(({"batch": 4}, {"batch": 2, "accumulate": 2}, {"batch": 4, "gradient_checkpointing": True})):
        technique, model, objective, rows = ready(pairs)
        rows, _ = rows.split(6)
        settings = Train(**{"lr": 1e-2, "warmup": 0.0, "schedule": "constant", "record": False, "optimizer": "sgd"} | train)
        done = fit(model, rows, settings, techniques=[technique], evals={}, folder=tmp_path / str(k), seed=0, objective=objective)
        found.append({n: p.detach() for n, p in done.model.named_parameters()})
    for other in found[1:]:
        assert all(torch.allclose(found[0][n], p, atol=2e-6) for n, p in other.items())


def test_lora_composes_with_it(pairs: str, tmp_path: Path) -> None:
    technique, model, objective, rows = ready(pairs)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    lora = Lora(LoraKnobs(r=2))
    settings = Train(batch=4, lr=1e-2, warmup=0.0, record=False)
    done = fit(model, rows, settings, techniques=[technique, lora], evals={}, folder=tmp_path, seed=0, objective=objective)
    after = dict(lora.export(done.model, tmp_path).named_parameters())
    moved = {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert "score.weight" in moved and any("q_proj" in n for n in moved) and not any("mlp" in n for n in moved)


@pytest.mark.parametrize(("family", "changes"), [("llama", {"tie_word_embeddings": True}), ("qwen3", {}), ("gpt2", {}), ("granite", {})])
def test_what_is_saved_gives_the_same_reward_and_goes_on_the_same(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tool_reward_model(model_of(family, **changes), 0).eval()
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path)
    again = Checkpoint(tmp_path).model().eval()
    ids = torch.randint(3, 90, (2, 9))
    assert isinstance(again, ToolRewardModel)
    assert torch.allclose(model(ids).logits, again(ids).logits, atol=1e-5)
    assert torch.allclose(model.model(ids).logits, again.model(ids).logits, atol=1e-5)
    padded, mask = torch.nn.functional.pad(ids, (0, 4)), torch.ones(2, 13, dtype=torch.long)
    mask[:, 9:] = 0
    assert torch.allclose(model(padded, mask).logits, model(ids).logits, atol=1e-5)


@pytest.fixture(scope="module")
def trained(pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return modelwright.run(
        "reward.themis_train",
        base="seedling",
        to=tmp_path_factory.mktemp("themis") / "out",
        data={"path": pairs, "limit": 4},
        train={"epochs": 40, "batch": 12, "context": 256, "lr": 3e-3, "warmup": 0.0, "record": False, "eval_every": 1000},
        save={"certificate": "structure"},
        holdout=0.0,
    )


@pytest.mark.slow
def test_the_trained_model_calls_its_tool_and_scores_what_comes_back(trained: Any, pairs: str) -> None:
    assert trained.certificate["loads_in"] == "ToolRewardModel"
    reward = ToolReward(trained.to, toolbox(), max_new_tokens=120)
    rows = json.loads(Path(pairs).read_text())[:3]
    good = reward(prompts=[r["question"] for r in rows], completions=[r["pos_answer"]["answer"] for r in rows])
    verdicts = reward.verdicts
    assert all(v.finished and v.calls == 1 for v in verdicts) and len(good) == 3
    for v, r in zip(verdicts, rows, strict=True):
        [call] = parse(v.trace.removesuffix("<|endoftext|>")).calls
        assert call.action == "Calendar.week_day" and call.observation == toolbox().observe(call.action, call.input)
        assert v.trace.count(OBSERVATION) == 1 and r["id"]


@pytest.fixture(scope="module")
def untrained(pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tool reward model that has learnt nothing yet."""
    folder = tmp_path_factory.mktemp("untrained")
    technique, model, _, _ = ready(pairs)
    model.save_pretrained(folder)
    technique.tokenizer.save_pretrained(folder)
    return folder


def test_no_more_tools_are_called_than_allowed(untrained: Path, pairs: str) -> None:
    r = json.loads(Path(pairs).read_text())[0]
    none = ToolReward(untrained, toolbox(), calls=0, max_new_tokens=8).judge(r["question"], "It is Monday")
    assert none.calls == 0 and "<start_work>" in none.trace


def test_judging_pairs_is_a_step(untrained: Path, pairs: str, tmp_path: Path) -> None:
    done = modelwright.run("reward.themis", base=str(untrained), to=tmp_path / "out", pairs=pairs, limit=2, max_new_tokens=8)
    found = done.plain()["metrics"]["judged"]
    assert found["pairs"] == 2 and found["traces"] == 4 and len((tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()) == 2


def test_training_goes_on_from_a_tool_reward_model(untrained: Path) -> None:
    technique = ThemisTrain(Knobs())
    assert isinstance(technique.load(Checkpoint(untrained), torch.float32), ToolRewardModel) and technique.new_tokens == 0


def test_what_cannot_write_traces_is_refused(tiny: Any, pairs: str) -> None:
    class Source:
        def model(self, dtype: Any) -> Any:
            return model_of("bert")

        def tokenizer(self) -> Any:
            return None

    with pytest.raises(UserError, match="does not go on with a text"):
        ThemisTrain(Knobs()).load(Source(), None)
    with pytest.raises(UserError, match="has no tokenizer"):
        ThemisTrain(Knobs()).load(Checkpoint(tiny("llama")), None)
    assert replace(Knobs(), ranking=0.5).ranking == 0.5
