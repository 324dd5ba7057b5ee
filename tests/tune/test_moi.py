"""tune.moi: chunks hold one example of each domain and do not see each other; its controls are what they claim to be."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import model_of
from modelwright import registry
from modelwright.core.data.rows import IGNORE, Rows, collate
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Source, Train
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train.technique import LossTerm, combine
from modelwright.core.train.trainer import forward
from modelwright.testing import check_method
from modelwright.tune.c_rlft import CRlft
from modelwright.tune.c_rlft import Knobs as CRlftKnobs
from modelwright.tune.moi import Knobs, Moi, balanced, parted
from small import Fatal, far, go, same, weights

SYSTEMS = {"talk": "You talk.", "code": "You write code.", "sums": "You add."}
SIZES = {"talk": 2, "code": 4, "sums": 8}


def lines(sizes: dict[str, int] = SIZES, long: int = 0) -> list[dict[str, Any]]:
    """Chats whose answer names their domain and number."""
    found = []
    for name, n in sizes.items():
        for i in range(n):
            answer = f"{name} {chr(97 + i)}" + " more" * (i % 3 + long * (i == 1))
            found.append({"messages": [{"role": "user", "content": "go on"}, {"role": "assistant", "content": answer}], "domain": name})
    return found


def data_of(folder: Path, rows: list[dict[str, Any]], name: str = "chats") -> Data:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Data(path=str(folder / f"{name}.jsonl"), column="messages", chat_template="turns")


def made(folder: Path, rows: list[dict[str, Any]] | None = None, context: int = 256, **knobs: Any) -> tuple[Moi, Rows]:
    """The technique and its rows."""
    data = data_of(folder, lines() if rows is None else rows)
    technique = Moi(Knobs(**{"systems": SYSTEMS, "data": data, "holdout": 0.0, **knobs}))
    found = technique.rows(technique.knobs.data, tokenizer(), 2048, Train(context=context, batch=2), 0)
    assert found is not None
    return technique, found


def tokenizer() -> Any:
    return Checkpoint("seedling").tokenizer()


def texts(rows: Rows) -> list[str]:
    """The texts of all rows, each what sees itself alone."""
    t, found = tokenizer(), []
    for i in range(len(rows)):
        row = rows[i]
        ids, n = row["input_ids"], int(row["length"])
        segments = row.get("segments", torch.zeros(len(ids)))[:n]
        found += [t.decode(ids[:n][segments == s]) for s in segments.unique_consecutive()]
    return found


# ---- chunks ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["fixed", "random"])
def test_every_chunk_holds_one_example_of_each_domain_and_the_largest_domain_once(order: str, tmp_path: Path) -> None:
    technique, rows = made(tmp_path, order=order)
    chunks = texts(rows)
    assert len(chunks) == 8 == technique.facts()["chunks"] and rows.packed
    seen: Counter[str] = Counter()
    for chunk in chunks:
        places = [chunk.index(p) for p in SYSTEMS.values()]
        assert all(chunk.count(p) == 1 for p in SYSTEMS.values()) and (order == "random" or places == sorted(places))
        for name, prompt in SYSTEMS.items():
            own = chunk[chunk.index(prompt) :].split("Assistant: ")[1]
            assert own.startswith(name)
            seen[own.split("<")[0].removesuffix(" more").removesuffix(" more")] += 1
    for name, n in SIZES.items():
        each = [v for k, v in seen.items() if k.startswith(name)]
        assert len(each) == n and set(each) == {8 // n}


def test_small_pools_are_repeated_evenly() -> None:
    pools = [[(np.array([d, i]), np.array([True])) for i in range(n)] for d, n in enumerate((3, 10))]
    chunks = balanced(pools, "fixed", np.random.default_rng(0))
    counts = Counter(int(c[0][0][1]) for c in chunks)
    assert len(chunks) == 10 and set(counts.values()) == {3, 4} and sorted(int(c[1][0][1]) for c in chunks) == list(range(10))


def test_a_chunk_that_is_too_long_is_parted_between_examples_and_a_long_example_left_out(tmp_path: Path) -> None:
    technique, rows = made(tmp_path, context=70)
    assert technique.facts()["chunks parted at the context"] > 0 and rows.width == 70
    for part in texts(rows):
        assert part.count("System:") == part.count("Assistant:") >= 1 and part.startswith("System:")
    technique, _ = made(tmp_path, lines(long=300))
    left = {name: f["left out: longer than the context"] for name, f in technique.facts()["domains"].items()}
    assert left == dict.fromkeys(SIZES, 1)
    member = (np.zeros(5), np.zeros(5, bool))
    assert [len(p) for p in parted([member] * 5, 12)] == [2, 2, 1]


# ---- what sees what ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model() -> Any:
    return model_of("llama", vocab_size=2048, max_position_embeddings=256)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_no_edit_in_another_chunk_changes_the_logits_of_a_chunk(kind: str, tmp_path: Path) -> None:
    model, (_, rows) = model_of(kind, vocab_size=2048, max_position_embeddings=256), made(tmp_path)
    batch = collate([rows[0]])
    segments = batch["segments"][0]
    first = segments == segments[0]
    assert len(segments.unique()) >= 2 and batch["position_ids"][0].tolist() == [
        i for s in segments.unique_consecutive() for i in range(int((segments == s).sum()))
    ]
    edited = batch | {"input_ids": torch.where(first[None], batch["input_ids"], (batch["input_ids"] + 7) % 2000)}
    with torch.no_grad():
        a, b = (forward(model, x).logits[0] for x in (batch, edited))
        c = forward(model, batch | {"input_ids": torch.where(first[None], (batch["input_ids"] + 7) % 2000, batch["input_ids"])}).logits[0]
    assert torch.equal(a[first], b[first]) and torch.equal(a[~first], c[~first]) and not torch.equal(a[~first], b[~first])


def test_inside_a_chunk_later_domains_see_earlier_ones(model: Any, tmp_path: Path) -> None:
    _, rows = made(tmp_path)
    batch = collate([rows[0]])
    n = int((batch["segments"][0] == batch["segments"][0, 0]).sum())
    changed = batch["input_ids"].clone()
    changed[0, 3] += 1
    with torch.no_grad():
        a, b = (forward(model, x).logits[0] for x in (batch, batch | {"input_ids": changed}))
    assert torch.equal(a[:3], b[:3]) and float((a[n - 1] - b[n - 1]).abs().max()) > 0


def test_one_chunk_in_a_row_is_plain_concatenation(model: Any, tmp_path: Path) -> None:
    _, rows = made(tmp_path, context=90)
    batch = collate([rows[0]])
    assert len(batch["segments"].unique()) == 1
    with torch.no_grad():
        plain = model(input_ids=batch["input_ids"], use_cache=False).logits
        assert torch.allclose(forward(model, batch).logits, plain, atol=1e-6)


def test_isolated_examples_give_the_logits_of_examples_alone(model: Any, tmp_path: Path) -> None:
    _, rows = made(tmp_path, attention="example")
    assert all(t.count("System:") == 1 for t in texts(rows)) and len(texts(rows)) == 24
    batch = collate([rows[0]])
    with torch.no_grad():
        whole = forward(model, batch).logits[0]
        for s in batch["segments"][0].unique():
            here = batch["segments"][0] == s
            alone = model(input_ids=batch["input_ids"][:, here], use_cache=False).logits[0]
            assert torch.allclose(whole[here], alone, atol=1e-5)


def test_controls_pack_everything_or_nothing(tmp_path: Path) -> None:
    _, seen = made(tmp_path, attention="pack")
    assert not seen.packed and sum(t.count("Assistant:") for t in texts(seen)) == 24 and len(seen) < 8
    technique, mixed = made(tmp_path, sampling="random")
    assert sum(t.count("Assistant:") for t in texts(mixed)) == 14 and technique.facts()["chunks"] == 5
    _, single = made(tmp_path, sampling="sequence")
    assert len(single) == 14 and not single.packed and all(t.count("System:") == 1 for t in texts(single))


# ---- the loss ------------------------------------------------------------------------------------------------------------
def test_weights_make_the_mean_over_tokens_examples_or_chunks(model: Any, tmp_path: Path) -> None:
    term, totals = LossTerm(), {}
    for loss in ("token", "instruction", "chunk"):
        _, rows = made(tmp_path, loss=loss)
        batch = collate([rows[i] for i in range(len(rows))])
        totals[loss] = float(term.count(batch))
        learnt = batch["labels"] != IGNORE
        assert torch.equal(learnt, batch["weights"] > 0)
        if loss == "chunk":
            each = [float(batch["weights"][batch["segments"] == s].sum()) for s in batch["segments"].unique() if s >= 0]
            assert np.allclose(each, 1, atol=1e-6)
    assert totals["instruction"] == pytest.approx(24, abs=1e-4) and totals["chunk"] == pytest.approx(8, abs=1e-4)
    assert totals["token"] == round(totals["token"]) > 24


def test_answers_of_one_length_weigh_the_same_under_every_mean(model: Any, tmp_path: Path) -> None:
    even = [
        {"messages": [{"role": "user", "content": f"n {i}"}, {"role": "assistant", "content": "a b"}], "domain": d}
        for d, n in SIZES.items()
        for i in range(n)
    ]
    losses = []
    for loss in ("token", "instruction", "chunk"):
        _, rows = made(tmp_path, even, loss=loss)
        batch = collate([rows[i] for i in range(len(rows))])
        with torch.no_grad():
            losses.append(float(LossTerm().sums(batch, forward(model, batch)).sum() / LossTerm().count(batch)))
    assert max(losses) - min(losses) < 1e-5


# ---- evaluation and what is held out ------------------------------------------------------------------------------------
def test_evaluation_data_has_the_default_prompt_and_one_example_a_row(tmp_path: Path) -> None:
    technique, _ = made(tmp_path, default="You help.")
    own = [{"messages": [{"role": "system", "content": "Mine."}, *r["messages"]]} for r in lines({"talk": 1})]
    rows = technique.rows(data_of(tmp_path, [*lines({"x": 2}), *own], "held"), tokenizer(), 2048, Train(context=256), 0)
    assert rows is not None and not rows.packed and len(rows) == 3
    found = texts(rows)
    assert sum("System: You help." in t for t in found) == 2 and sum("System: Mine." in t for t in found) == 1


@pytest.mark.parametrize("holdout", [0.05, 0.2, 0.5])
def test_what_is_held_out_was_never_learnt(holdout: float, tmp_path: Path) -> None:
    _, rows = made(tmp_path, lines({"talk": 4, "code": 8, "sums": 20}), holdout=holdout)
    at = max(1, len(rows) - max(1, round(len(rows) * holdout)))
    learnt, held = ({a.split("<")[0] for t in texts(part) for a in t.split("Assistant: ")[1:]} for part in rows.split(at))
    assert held and learnt and not held & learnt


# ---- through the loop --------------------------------------------------------------------------------------------------
def small(folder: Path) -> tuple[Any, Rows]:
    return model_of("llama", vocab_size=2048, max_position_embeddings=256), made(folder, context=90)[1]


def test_an_accumulated_step_is_one_pass(tmp_path: Path) -> None:
    found = []
    for batch, accumulate in ((1, 4), (4, 1)):
        model, rows = small(tmp_path)
        go(made(tmp_path)[0], model, tmp_path / f"{batch}", rows, batch=batch, accumulate=accumulate, lr=1e-3)
        found.append(weights(model))
    assert far(*found) < 1e-5


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run(name: str, stop: int | None = None) -> dict[str, torch.Tensor]:
        model, rows = small(tmp_path)
        go(made(tmp_path)[0], model, tmp_path / name, rows, stop, batch=1, accumulate=2, save_every=1)
        return weights(model)

    want = run("whole")
    with pytest.raises(Fatal):
        run("broken", stop=2)
    assert same(run("broken"), want)


@pytest.mark.parametrize("beside", ["migu", "hft", "key_value", "lora"])
def test_it_trains_beside(beside: str, tmp_path: Path) -> None:
    model, rows = small(tmp_path)
    other = registry.techniques_named(beside, {})
    out = go([*other, made(tmp_path)[0]], model, tmp_path / "out", rows, batch=4, epochs=1)
    assert len(out.liveness) == 2


def test_two_ways_to_make_rows_are_refused() -> None:
    two = CRlft(CRlftKnobs(weights={"a": 1.0}, conditions={"a": "A"}))
    with pytest.raises(UserError, match="do not combine, because each makes the rows its own way"):
        combine([Moi(Knobs()), two], set())


def test_several_files_are_domains_by_their_names(tmp_path: Path) -> None:
    files = [str(data_of(tmp_path, lines({name: n}), name).path) for name, n in SIZES.items()]
    data = Data(sources=[Source(path=f) for f in files], chat_template="turns")
    technique = Moi(Knobs(systems=SYSTEMS, data=data, holdout=0.0))
    rows = technique.rows(data, tokenizer(), 2048, Train(context=256), 0)
    assert rows is not None and technique.facts()["chunks"] == 8
    assert {n: f["examples"] for n, f in technique.facts()["domains"].items()} == SIZES


def test_whole_run_tells_what_was_packed(tmp_path: Path) -> None:
    made_of = check_method(
        "tune.moi",
        {"systems": {"sums": "You add.", "talk": "You talk."}, "train": {"context": 96, "batch": 4}, "save": {"certificate": "structure"}},
        tmp_path,
        make="domains",
    )
    facts = made_of.steps[0]["facts"]["moi"]
    assert facts["domains"]["sums"]["examples"] == 18 and facts["held out examples"] == 2


# ---- bad input -----------------------------------------------------------------------------------------------------------
def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    def refused(words: str, rows: list[dict[str, Any]], **knobs: Any) -> None:
        with pytest.raises(UserError, match=words):
            made(tmp_path, rows, **knobs)

    refused("the domain 'sums' has no example, because", lines({"talk": 2, "code": 2}))
    refused("row 3 is of the domain 'cod', because systems has no prompt for it; did you mean 'code'", lines({"talk": 2, "cod": 2}))
    refused("has no column 'domain'", [{"messages": r["messages"]} for r in lines()])
    refused("has no example that can be used", lines(), context=8)
    refused("holds no chats", [{"messages": "plain text", "domain": "talk"}])
    with pytest.raises(UserError, match="systems has 1 domain"):
        Moi(Knobs(systems={"a": "b"}))
    data = replace(data_of(tmp_path, lines()), chat_template=str(tmp_path / "no-system"))
    (tmp_path / "no-system").write_text(
        "{% for m in messages if m['role'] != 'system' %}{{ m['role'].title() + ': ' + m['content'] + eos_token }}{% endfor %}"
    )
    technique = Moi(Knobs(systems=SYSTEMS, data=data))
    with pytest.raises(UserError, match="no place for a system prompt"):
        technique.rows(technique.knobs.data, tokenizer(), 2048, Train(context=256), 0)
