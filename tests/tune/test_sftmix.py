"""tune.sftmix: the cheap form is the dense one, pairs are balanced, nothing depends on how a step is cut, bad input is one sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from pyarrow import parquet
from torch import Tensor

import modelwright
from families import model_of
from modelwright import registry
from modelwright.core.data.packing import Texts, packed, padded
from modelwright.core.data.rows import IGNORE, Rows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train import head
from modelwright.core.train.objective import NextToken
from modelwright.core.train.recorder import SCHEMA
from modelwright.tune import full, migu
from modelwright.tune.mixing import confidence
from modelwright.tune.mixing.confidence import recorded
from modelwright.tune.mixing.pairs import PairedRows, examples_of, halves
from modelwright.tune.mixing.states import Mixing
from modelwright.tune.sftmix import Knobs, SftMix
from small import Fatal, far, go, rows, same, weights


def mixer(**knobs: Any) -> SftMix:
    """With random halves, which need no reference run."""
    technique = SftMix(Knobs(**{"split": "random", **knobs}))
    technique._seed = 0
    return technique


def answers(n: int = 8, several: bool = False) -> Rows:
    """Texts of uneven lengths whose first tokens are not learnt, padded or packed."""
    g, texts = torch.Generator().manual_seed(3), Texts()
    for _ in range(n):
        length = int(torch.randint(5, 13, (), generator=g))
        texts.ids.append(torch.randint(3, 90, (length,), generator=g).tolist())
        texts.weights.append([0.0] * 3 + [1.0] * (length - 3))
    return packed(texts, 26, 2, 0) if several else padded(texts, 26)


def batch_of(model: Any, data: Any, technique: SftMix | None = None) -> tuple[Mixing, dict[str, Tensor]]:
    """The objective and the one batch of all pairs of some rows."""
    technique = technique or mixer()
    objective = technique.objective(model, None, Train(), 0)
    made = technique.prepare(data)
    batch = objective.collate([made[i] for i in range(len(made))])
    objective.prepare(batch, 4)
    return objective, batch


def mixed(model: Any, objective: Mixing, batch: dict[str, Tensor]) -> Tensor:
    """The summed loss of the mixed tokens."""
    objective.install(model)
    try:
        found = objective.forward(model, batch, (batch["labels"][:, 1:] != IGNORE).float()).mixed
    finally:
        objective.remove()
    assert found is not None
    return found


def dense(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The same with targets as wide as the vocabulary and the head written out."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
    hidden, labels = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    c, u, lam = batch["mix_c"], batch["mix_u"], batch["mix_lam"][:, None]
    logits = model.lm_head(lam * hidden[c] + (1 - lam) * hidden[u])
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits / getattr(model.config, "logits_scaling", 1.0)
    wide = logits.shape[-1]
    return F.cross_entropy(logits, lam * F.one_hot(labels[c], wide) + (1 - lam) * F.one_hot(labels[u], wide), reduction="sum")


# ---- the loss --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "granite"])
@pytest.mark.parametrize("several", [False, True], ids=["padded", "packed"])
def test_cheap_form_and_its_gradients_are_those_of_dense_soft_labels(kind: str, several: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(head, "_LOGITS", 96 * 5)  # chunks of five tokens
    model = model_of(kind)
    objective, batch = batch_of(model, answers(several=several))
    assert len(batch["mix_c"]) > 10 and 0 < float(batch["mix_lam"].min()) < float(batch["mix_lam"].max()) < 1
    ours, theirs = mixed(model, objective, batch), dense(model, batch)
    assert torch.allclose(ours, theirs, rtol=1e-6)
    model.zero_grad()
    ours.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    theirs.backward()
    assert far(got, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}) < 1e-5


def test_lambda_one_is_the_confident_example_on_the_shared_length_and_a_swapped_pair_is_the_same() -> None:
    model = model_of("llama")
    objective, batch = batch_of(model, answers())
    logits, labels = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1], batch["labels"][:, 1:]
    alone = F.cross_entropy(logits.flatten(0, 1)[batch["mix_c"]], labels.flatten()[batch["mix_c"]], reduction="sum")
    assert torch.allclose(mixed(model, objective, batch | {"mix_lam": torch.ones(len(batch["mix_c"]))}), alone, rtol=1e-6)
    swapped = batch | {"mix_c": batch["mix_u"], "mix_u": batch["mix_c"], "mix_lam": 1 - batch["mix_lam"]}
    assert torch.allclose(mixed(model, objective, swapped), mixed(model, objective, batch), rtol=1e-6)


def test_mixing_states_is_no_mixture_of_the_two_losses() -> None:
    model = model_of("llama")
    objective, batch = batch_of(model, answers())
    half = torch.full((len(batch["mix_c"]),), 0.5)
    grads = []
    for lam in (half, torch.ones_like(half), torch.zeros_like(half)):
        model.zero_grad()
        mixed(model, objective, batch | {"mix_lam": lam}).backward()
        grads.append(model.lm_head.weight.grad.clone())
    assert float((grads[0] - (grads[1] + grads[2]) / 2).norm() / grads[0].norm()) > 0.05


def test_pairs_are_cut_to_the_shorter_answer_and_meet_token_by_token() -> None:
    data = answers()
    _, batch = batch_of(model_of("llama"), data)
    learnt, wide = batch["labels"][:, 1:] != IGNORE, batch["labels"].shape[1] - 1
    at = 0
    for pair, (a, b) in enumerate(batch["mix_ids"].tolist()):
        rows_of = [(batch["example_id"] == e).nonzero().item() for e in (a, b)]
        n = min(int(learnt[r].sum()) for r in rows_of)
        here = slice(at, at + n)
        assert bool((batch["mix_pair"][here] == pair).all())
        for where, r in zip((batch["mix_c"], batch["mix_u"]), rows_of, strict=True):
            assert where[here].tolist() == (r * wide + learnt[r].nonzero()[:, 0][:n]).tolist()
        at += n
    assert at == len(batch["mix_c"])


def test_packed_pairs_give_the_loss_of_padded_ones() -> None:
    model = model_of("llama")
    sums = []
    for several in (False, True):
        data = answers(several=several)
        every = {e.id: e for e in examples_of(data)}
        technique = mixer()
        objective = technique.objective(model, None, Train(), 0)
        made = PairedRows(data, technique._plan([[every[2 * i], every[2 * i + 1]] for i in range(4)], data), {})
        batch = objective.collate([made[i] for i in range(len(made))])
        objective.prepare(batch, 1)
        sums.append((mixed(model, objective, batch).item(), len(batch["mix_c"])))
    assert sums[0][1] == sums[1][1] and abs(sums[0][0] - sums[1][0]) < 1e-4 * sums[0][0]


# ---- through the loop --------------------------------------------------------------------------------------------------
def test_mu_zero_is_tune_full_on_the_same_batches_bit_for_bit(tmp_path: Path) -> None:
    data, models = rows(8), [model_of("llama"), model_of("llama")]
    technique = mixer(mu=0)
    go(technique, models[0], tmp_path / "a", data, batch=4, epochs=3)
    flat = [e.id for p in technique.prepare(data).plan for e in p]
    order = Rows(data.ids[flat], data.labels[flat], data.lengths[flat])

    class InOrder(full.Full):
        """tune.full on the same sequences in the order of the pairs, as one item a batch."""

        def objective(self, model: Any, tokenizer: Any, train: Train, seed: int) -> Any:
            class Flat(NextToken):
                def collate(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
                    ids = [i for r in items if "input_ids" in r for i in (2 * r["example_id"], 2 * r["example_id"] + 1)]
                    return super().collate([order[i] for i in ids])

            return Flat(model, None, seed)

        def prepare(self, rows: Any) -> Any:
            return Rows(order.ids[::2], order.labels[::2], order.lengths[::2])

    go(InOrder(full.Knobs()), models[1], tmp_path / "b", order, batch=4, epochs=3)
    assert same(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("several", [False, True], ids=["padded", "packed"])
def test_an_accumulated_step_is_one_pass(several: bool, tmp_path: Path) -> None:
    found = []
    for batch, accumulate in ((1, 4), (4, 1)):
        model = model_of("llama")
        go(mixer(mu=1.0), model, tmp_path / f"{batch}", answers(13, several), batch=batch, accumulate=accumulate, epochs=1, lr=1e-3)
        found.append(weights(model))
    assert far(found[0], found[1]) < 1e-5


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch": 1, "accumulate": 2, "epochs": 2, "save_every": 1}
    whole, broken = model_of("llama"), model_of("llama")
    go(mixer(), whole, tmp_path / "whole", answers(), **options)
    with pytest.raises(Fatal):
        go(mixer(), broken, tmp_path / "broken", answers(), stop=2, **options)
    again = model_of("llama")
    go(mixer(), again, tmp_path / "broken", answers(), **options)
    assert same(weights(again), weights(whole))


@pytest.mark.parametrize("kind", ["llama, bf16", "qwen3, tied", "gpt2", "mixtral"])
def test_other_models_and_recomputation_train(kind: str, tmp_path: Path) -> None:
    name, _, what = kind.partition(", ")
    model = model_of(name, dtype="bfloat16" if what == "bf16" else "float32", **({"tie_word_embeddings": True} if what == "tied" else {}))
    out = go(mixer(), model, tmp_path / "plain", answers(), batch=2, gradient_checkpointing=True, epochs=1)
    assert "4 pairs, 0 examples without a partner" in out.liveness[0]


def test_mix_alone_learns_from_nothing_else(tmp_path: Path) -> None:
    whole, alone = model_of("llama"), model_of("llama")
    go(mixer(), whole, tmp_path / "a", answers(), batch=2)
    go(mixer(ntp=False), alone, tmp_path / "b", answers(), batch=2)
    assert far(weights(alone), weights(whole)) > 1e-3


# ---- beside other methods ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "beside", [("hft", {}), ("key_value", {}), ("key_value", {"adapt": "lora", "r": 2}), ("lora", {"r": 2}), ("migu", {})]
)
def test_it_trains_beside(beside: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    other = registry.techniques_named(*beside)
    plain, both = model_of("llama"), model_of("llama")
    a = go(registry.techniques_named(*beside), plain, tmp_path / "a", mixer().prepare(answers()).inner, batch=2, epochs=1)  # type: ignore[arg-type]
    b = go([*other, mixer()], both, tmp_path / "b", answers(), batch=2, epochs=1)
    before = weights(model_of("llama"))
    changed = [{n for n, p in weights(o.model).items() if n in before and not torch.equal(p, before[n])} for o in (a, b)]
    assert changed[0] == changed[1] and len(b.liveness) == 2


def test_what_reads_all_logits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sftmix does not combine with a method that reads all logits"):
        go([migu.Migu(migu.Knobs(head=True)), mixer()], model_of("llama"), tmp_path, answers())


# ---- halves and confidence -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [2, 7, 10])
def test_halves_are_split_by_rank_and_ties_by_lot(n: int) -> None:
    a, b = halves(np.arange(n, dtype=float), 0)
    assert len(a) == len(b) == n // 2 and min(a) > max(b) and not set(a) & set(b)
    tied = np.zeros(40)
    assert sorted(sum(halves(tied, 0), [])) == list(range(40)) and set(halves(tied, 0)[0]) != set(halves(tied, 1)[0])


def record(file: Path, losses: list[list[float]], learnt: list[int]) -> str:
    """A dynamics.parquet with the losses of each example by pass."""
    lines = [
        {"step": c + 1, "kind": "train", "example": i, "loss": loss, "tokens": learnt[i], "lr": 1e-3}
        for i, each in enumerate(losses)
        for c, loss in enumerate(each)
    ]
    parquet.write_table(pa.Table.from_pylist(lines, SCHEMA), file)
    return str(file)


def test_recorded_confidence_is_the_negative_mean_of_perplexities(tmp_path: Path) -> None:
    examples = examples_of(answers(4))
    losses = [[1.0, 3.0], [2.0, 2.0], [0.5, 0.5], [2.5, 0.1]]
    found = recorded(Path(record(tmp_path / "d.parquet", losses, [e.learnt for e in examples])), examples)
    assert np.allclose(found, [-np.exp(x).mean() for x in losses], rtol=1e-6)
    once = recorded(Path(record(tmp_path / "e.parquet", [x[:1] for x in losses], [e.learnt for e in examples])), examples)
    assert once.argsort().tolist() == np.argsort([-x[0] for x in losses]).tolist()  # falls with the loss


@pytest.mark.parametrize("several", [False, True], ids=["padded", "packed"])
def test_a_run_of_the_same_rows_tells_the_confidence(several: bool, tmp_path: Path) -> None:
    data, model = answers(several=several), model_of("llama")
    out = go(full.Full(full.Knobs()), model, tmp_path / "full", data, record=True, batch=2)
    technique = mixer(split="confidence", record=str(out.dynamics))
    technique.prepare(data)
    found = technique.facts()["mean perplexity"]
    assert technique.facts()["pairs"] == 4 and 1 < found["confident"] < found["unconfident"]


def test_reference_run_is_made_once_and_changes_nothing_else(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MODELWRIGHT_CACHE", str(tmp_path / "cache"))
    found = []
    for i in range(2):
        technique, model = mixer(split="confidence", checkpoints=2), model_of("llama")
        technique.source = Checkpoint(tiny("llama"))
        go(technique, model, tmp_path / str(i), answers(), batch=2, epochs=1)
        found.append((weights(model), technique.facts()["mean perplexity"]))
        monkeypatch.setattr(confidence, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert found[0][1]["confident"] < found[0][1]["unconfident"] and len(list((tmp_path / "cache" / "confidence").iterdir())) == 1


def test_whole_run_on_packed_chats(tmp_path: Path) -> None:
    lines = [
        {"messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": f"it is {i + 1} " * (1 + i % 4)}]}
        for i in range(9)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    made = modelwright.run(
        "tune.sftmix",
        base="seedling",
        to=tmp_path / "out",
        data={"path": str(tmp_path / "chats.jsonl"), "chat_template": "turns"},
        holdout=0,
        checkpoints=1,
        train={"batch": 2, "context": 64},
        save={"certificate": "structure"},
    )
    facts = made.steps[0]["facts"]["sftmix"]
    assert facts["pairs"] == 4 and facts["without a partner"] == 1


# ---- bad input -----------------------------------------------------------------------------------------------------------
def test_bad_input_is_one_sentence(tmp_path: Path, tiny: Any) -> None:
    def refused(words: str, data: Rows, **knobs: Any) -> None:
        technique = SftMix(Knobs(**knobs))
        technique._seed = 0
        with pytest.raises(UserError, match=words):
            technique.prepare(data)

    data = answers(4)
    learnt = [e.learnt for e in examples_of(data)]
    refused("the data has 1 example to learn from", answers(1))
    refused("nothing tells the confidence", data)
    refused("all examples have the same confidence", data, record=record(tmp_path / "a.parquet", [[1.0]] * 4, learnt))
    refused("no loss for 1 of 4 examples", data, record=record(tmp_path / "b.parquet", [[1.0], [2.0], [3.0]], learnt))
    refused("learnt tokens for example", data, record=record(tmp_path / "c.parquet", [[1.0], [2.0], [3.0], [4.0]], [99] * 4))
    refused("not finite", data, record=record(tmp_path / "d.parquet", [[1.0], [float("nan")], [3.0], [4.0]], learnt))
    refused("holds no recorded run", data, record=str(tmp_path / "nothing.parquet"))
    (tmp_path / "text.parquet").write_text("no table")
    refused("is no record of a run", data, record=str(tmp_path / "text.parquet"))
    with pytest.raises(UserError, match="a batch holds pairs"):
        mixer().settings(data, Train(batch=3))
    assert mixer().settings(data, Train(batch=6)) == replace(Train(), batch=3)
    with pytest.raises(UserError, match="mu is 0 and ntp is false"):
        mixer(mu=0, ntp=False)
    for kind in ("t5", "bert"):
        with pytest.raises(UserError, match="sftmix cannot tune"):
            mixer().objective(model_of(kind), None, Train(), 0)
