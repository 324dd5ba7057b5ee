"""reward.train: exact optima and identities of the losses, TRL's loss, what a run saves, what is refused and counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import modelwright
from families import model_of
from modelwright.core.data.rows import TokenRows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.model.checkpoint import SEEDLING, Checkpoint
from modelwright.core.train.loop import fit
from modelwright.models.reward import RewardFunction
from modelwright.reward.train import Knobs, Lengths, TrainReward, bias_loss, divergent_loss, pearson, prompt_end, ranking_loss
from modelwright.tune.hft import Hft
from modelwright.tune.hft import Knobs as HftKnobs
from modelwright.tune.lora import Knobs as LoraKnobs
from modelwright.tune.lora import Lora
from modelwright.tune.migu import Knobs as MiguKnobs
from modelwright.tune.migu import Migu

END = [91, 92]


class PairsInMemory(TokenRows):
    """Pairs of token ids behind prompts that end with the same two tokens."""

    facts: dict[str, Any] = {}
    stops: list[int] = []
    bytes, width, packed = 0, 16, False

    def __init__(self, n: int = 6, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.made = []
        for i in range(n):
            prompt = torch.cat([torch.randint(3, 90, (2 + i % 3,), generator=g), torch.tensor(END)])
            both = [torch.cat([prompt, torch.randint(3, 90, (3 + (i + k) % 4,), generator=g)]) for k in range(2)]
            sizes = {"chosen_from": len(prompt), "rejected_from": len(prompt), "length": torch.tensor(max(map(len, both)))}
            self.made.append({"chosen": both[0], "rejected": both[1], "example_id": i, **sizes})

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.made[i]

    def split(self, at: int) -> Any:
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        return sum(len(r["chosen"]) + len(r["rejected"]) for r in self.made)


class Source:
    """Stands for a checkpoint."""

    def __init__(self, family: str):
        self.family = family

    def model(self, dtype: Any = None) -> Any:
        return model_of(self.family)


def trained(family: str, folder: Path, others: tuple[Any, ...] = (), rows: Any = None, train: dict[str, Any] | None = None, **knobs: Any):
    """A model trained for a few steps, and the technique that did it."""
    technique = TrainReward(Knobs(**knobs))
    model = technique.load(Source(family), None)
    model.config.pad_token_id = 0
    settings = Train(**{"batch": 4, "epochs": 2, "lr": 1e-2, "warmup": 0.0, "schedule": "constant", "record": False} | (train or {}))
    done = fit(
        model, rows or PairsInMemory(), settings, techniques=[technique, *others], evals={}, folder=folder, seed=0
    )  # fmt: skip
    return done, technique


def batch_of(model: Any, **knobs: Any) -> tuple[Any, dict[str, Tensor]]:
    """The objective, and a batch of all pairs."""
    objective = TrainReward(Knobs(**knobs)).objective(model, None, Train(), 0)
    rows = PairsInMemory()
    return objective, objective.collate([rows[i] for i in range(len(rows))])


# ---- the losses --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("eta", "margin"), [(0.01, 3.3593), (0.05, 2.1280), (0.1, 1.6335)])
def test_a_pair_alone_settles_at_the_known_margin(eta: float, margin: float) -> None:
    rewards, bias = torch.tensor([0.5, -0.2], dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([rewards, bias], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (ranking_loss(*rewards.chunk(2)) + eta * bias_loss(rewards, bias.expand(2))).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float((rewards[0] - rewards[1]).detach()) == pytest.approx(margin, abs=1e-4)
    assert float(bias.detach()) == pytest.approx(float(rewards.mean()), abs=1e-6)


def test_the_bias_loss_is_a_fit_to_the_mean_and_a_bound_on_the_margin() -> None:
    a, b, c = torch.randn(3, 20, dtype=torch.float64)
    found = bias_loss(torch.cat([a, b]), c.repeat(2))
    assert torch.allclose(found, 2 * (c - (a + b) / 2) ** 2 + (a - b) ** 2 / 2)


def test_detached_the_bias_moves_and_the_reward_does_not() -> None:
    rewards, bias = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    bias_loss(rewards, bias, detach=True).sum().backward()
    assert rewards.grad is None and bool((bias.grad != 0).all())


def test_divergent_loss_equals_a_plain_loop() -> None:
    g = torch.Generator().manual_seed(0)
    tokens, ids = torch.randn(8, 9, generator=g), torch.randint(0, 3, (8, 9), generator=g)
    last = torch.tensor([8, 5, 7, 8, 6, 8, 8, 3])
    for k in range(4):
        ids[k + 4, : k + 1] = ids[k, : k + 1]
        ids[k + 4, k + 1] = ids[k, k + 1] + 1
    for k, loss in enumerate(divergent_loss(tokens, last, ids, margin=0.1)):
        a, b, la, lb = tokens[k], tokens[k + 4], int(last[k]), int(last[k + 4])
        each = [-torch.nn.functional.logsigmoid(a[min(t, la)] - b[min(t, lb)] - 0.1) for t in range(k + 1, max(la, lb) + 1)]
        assert float(loss) == pytest.approx(float(torch.stack(each).mean()), abs=1e-6)


def test_correlation_is_pearson_s_and_harmless_where_nothing_varies() -> None:
    a, b = torch.randn(2, 30)
    assert float(pearson(a, b)) == pytest.approx(float(torch.corrcoef(torch.stack([a, b]))[0, 1]), abs=1e-5)
    flat = torch.ones(30, requires_grad=True)
    pearson(flat, b).backward()
    assert bool(flat.grad.isfinite().all())


def test_without_a_bias_the_loss_is_trl_s(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl.trainer.reward_trainer")
    model = TrainReward(Knobs()).load(Source("llama"), None)
    torch.nn.init.normal_(model.score.weight)
    model.config.pad_token_id = 0
    objective, batch = batch_of(model, margin=0.3)
    found = objective.forward(model.eval(), batch, torch.ones(6, 1)).total / 6
    from modelwright.models.reward import stock

    theirs, rows = stock(model).eval(), PairsInMemory()
    collated = trl.DataCollatorForPreference(pad_token_id=0)(
        [{"chosen_ids": r["chosen"].tolist(), "rejected_ids": r["rejected"].tolist(), "margin": 0.3} for r in rows.made]
    )

    class Stub:  # what RewardTrainer.compute_loss asks of a trainer
        model = theirs
        args = type("Args", (), {"center_rewards_coefficient": None})
        accelerator = type("Alone", (), {"gather": staticmethod(lambda x: x), "gather_for_metrics": staticmethod(lambda x: x)})
        _metrics: Any = {m: __import__("collections").defaultdict(list) for m in ("train", "eval")}
        _total_train_tokens, _tp_size = 0, 1

    loss = trl.RewardTrainer.compute_loss(Stub(), theirs, dict(collated))
    assert float(loss.detach()) == pytest.approx(float(found.detach()), abs=1e-6)


def test_pbc_adds_eta_times_the_bias_loss_and_the_bias_is_the_same_for_both_answers() -> None:
    model = TrainReward(Knobs(debias="pbc")).load(Source("qwen2"), None)
    for head in (model.score, model.prompt_bias):
        torch.nn.init.normal_(head.weight)
    technique = TrainReward(Knobs(debias="pbc", center=0.1))
    objective, batch = batch_of(model, debias="pbc")
    out = objective.forward(model.eval(), batch, torch.ones(6, 1))
    bias, centre = technique.terms()
    assert torch.allclose(out.bias.chunk(2)[0], out.bias.chunk(2)[1], atol=1e-5), "the prompt's end is before the answer"
    a, b = out.rewards.chunk(2)
    assert torch.allclose(bias.sums(batch, out), (a - out.bias[:6]) ** 2 + (b - out.bias[6:]) ** 2, rtol=1e-4) and bias.weight == 0.05
    assert torch.allclose(centre.sums(batch, out), (a + b) ** 2) and centre.weight == 0.1 and int(bias.count(batch)) == 6


def test_length_terms_are_the_papers() -> None:
    for debias in ("odin", "lpbc"):
        technique = TrainReward(Knobs(debias=debias, eta_l=0.5))
        model = technique.load(Source("llama"), None)
        for n, p in model.named_parameters():
            if n.split(".")[0] in ("score", "prompt_bias", "length_score", "length_bias"):
                torch.nn.init.normal_(p)
        objective, batch = batch_of(model, debias=debias)
        out = objective.forward(model.eval(), batch, torch.ones(6, 1))
        [term] = [t for t in technique.terms() if isinstance(t, Lengths)]
        length = batch["answer"].sum(1).float()
        q, by = (out.rewards, out.length_rewards) if debias == "odin" else (out.rewards - out.bias, out.length_rewards - out.length_bias)
        expected = pearson(q, length).abs() - pearson(by, length)
        if debias == "odin":
            expected = expected + (model.score.weight @ model.length_score.weight.T).abs().sum()
        assert torch.allclose(term.sums(batch, out).sum(), expected, atol=1e-5) and term.weight == 0.5
        both = out.rewards + out.length_rewards
        assert torch.allclose(out.losses[:, 0], ranking_loss(*both.chunk(2)).detach(), atol=1e-6)


# ---- runs --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("debias", ["none", "pbc", "odin", "lpbc"])
def test_training_lowers_the_loss_whatever_is_debiased(debias: str, tmp_path: Path) -> None:
    done, technique = trained("llama", tmp_path, train={"epochs": 15, "batch": 6}, debias=debias)
    objective, batch = batch_of(done.model, debias=debias)
    assert float(objective.forward(done.model.eval(), batch, torch.ones(6, 1)).total) / 6 < 0.5
    assert done.model.config.prompt_end == (END if debias in ("pbc", "lpbc") else None)


def test_accumulated_batches_are_one_batch_though_the_last_is_filled_up(tmp_path: Path) -> None:
    weights = []
    for k, train in enumerate(({"batch": 4}, {"batch": 2, "accumulate": 2}, {"batch": 4, "gradient_checkpointing": True})):
        done, _ = trained("llama", tmp_path / str(k), train=train | {"lr": 1e-3, "optimizer": "sgd"}, debias="pbc")
        weights.append({n: p.detach() for n, p in done.model.named_parameters()})
    for other in weights[1:]:
        assert all(torch.allclose(weights[0][n], p, atol=1e-6) for n, p in other.items())


@pytest.mark.parametrize("other", [Lora(LoraKnobs(r=2)), Hft(HftKnobs()), Migu(MiguKnobs())], ids=lambda t: t.name)
def test_ways_to_tune_compose_with_it(other: Any, tmp_path: Path) -> None:
    done, technique = trained("llama", tmp_path, (other,), debias="pbc")
    model = done.model
    for t in (technique, other):
        model = t.export(model, tmp_path)
    assert type(model).__name__ == "RewardModel" and not any("lora" in n for n, _ in model.named_parameters())
    frozen = model_of("llama").model.state_dict()["layers.0.mlp.up_proj.weight"]
    moved = not torch.equal(model.model.layers[0].mlp.up_proj.weight, frozen)
    assert moved == (other.name == "migu") or other.name == "hft"
    assert float(model.prompt_bias.weight.detach().std()) > 0


def write(folder: Path, pairs: list[dict[str, Any]]) -> str:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    return str(folder / "pairs.jsonl")


WORDS = ("apple", "boat", "cloud", "drum", "egg", "fox", "gate", "hill", "island", "jar", "key", "lamp")
GOOD = [{"prompt": f"Say {w}.\nAnswer:", "chosen": f" {w}", "rejected": " no"} for w in WORDS]
SHORT = {"epochs": 10, "batch": 6, "context": 64, "lr": 2e-3, "warmup": 0.0}
SAVE = {"certificate": "structure"}


@pytest.fixture(scope="module")
def pbc(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pbc")
    data = write(folder, [*GOOD, {**GOOD[0], "rejected": " apple"}, {**GOOD[0], "rejected": " no" * 100}])
    return modelwright.run("reward.train", base="seedling", to=folder / "out", data=data, debias="pbc", train=SHORT, save=SAVE)


def test_a_run_ranks_its_pairs_and_its_folder_is_a_reward_function(pbc: Any) -> None:
    reward = RewardFunction(pbc.to)
    prompts = [p["prompt"] for p in GOOD]
    good, bad = (reward(prompts=prompts, completions=[p[k] for p in GOOD]) for k in ("chosen", "rejected"))
    assert sum(g > b for g, b in zip(good, bad, strict=True)) >= 11
    ids, begin = reward.encode(prompts[0], GOOD[0]["chosen"])
    end = reward.model.config.prompt_end
    assert end and ids[begin - len(end) : begin] == end, "the tokens that end every prompt were found"
    mask = torch.ones(1, len(ids), dtype=torch.long)
    assert torch.equal(reward.score(torch.tensor([ids]), mask), reward.score(torch.tensor([ids]), mask, torch.tensor([begin])))


def test_equal_and_long_pairs_are_counted_and_the_start_is_ln_2(pbc: Any) -> None:
    report = json.dumps(pbc.plain(), default=str)
    assert "left out: chosen and rejected are equal" in report and "left out: longer than the context" in report
    assert "cancels in the advantages of GRPO and RLOO" in report


def test_plain_training_gives_a_stock_classifier_that_can_be_trained_on(tmp_path: Path) -> None:
    data = write(tmp_path, GOOD)
    short = SHORT | {"epochs": 1}
    first = modelwright.run("reward.train", base="seedling", to=tmp_path / "a", data=data, train=short, save=SAVE)
    assert first.certificate["loads_in"] == "LlamaForSequenceClassification"
    second = TrainReward(Knobs(debias="pbc"))
    model = second.load(Checkpoint(first.to), None)
    assert second.fresh == ["prompt_bias"]
    assert torch.equal(model.score.weight, Checkpoint(first.to).model().score.weight), "the head that is there is kept"


def test_answers_without_a_prompt_are_refused_where_its_bias_is_wanted() -> None:
    rows = PairsInMemory(2)
    rows.made[1] |= {"chosen_from": 0, "rejected_from": 0}
    with pytest.raises(UserError, match="pair 2 has no prompt"):
        prompt_end(rows)


def test_a_marker_that_also_stands_in_an_answer_is_not_used() -> None:
    rows = PairsInMemory(3)
    assert prompt_end(rows) == END
    rows.made[2]["rejected"] = torch.cat([rows.made[2]["rejected"], torch.tensor([*END, 5])])
    assert prompt_end(rows) == []


def test_same_seed_same_heads(tmp_path: Path) -> None:
    a, b = (trained("llama", tmp_path / n, train={"epochs": 1})[0].model.score.weight for n in "ab")
    assert torch.equal(a, b) and SEEDLING.is_dir()
