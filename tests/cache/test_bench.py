"""cache.bench: the loss of a continuation, and what the report says."""

import json
from pathlib import Path

import pytest
import torch

import modelwright
from families import model_of
from modelwright.cache.engine.measure import continued
from modelwright.cache.evictors.nacl import NACL
from modelwright.core.errors import UserError
from modelwright.runner.recipe import parse
from modelwright.runner.run import run_recipe


def test_the_continuation_s_loss_is_the_model_s_own_without_eviction() -> None:
    model = model_of("llama", max_position_embeddings=128)
    ids = torch.randint(3, 96, (5, 60))
    found = continued(model, ids, 40, batch=2)
    with torch.no_grad():
        logits = model(ids).logits[:, 40:-1]
    assert (found.nll - torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 41:], reduction="none")).abs().max() < 1e-4
    assert torch.equal(found.choice, logits.argmax(-1)) and found.bytes == 40 * 2 * 2 * 2 * 8 * 4
    same, less = continued(model, ids, 40, NACL(keep=1.0)), continued(model, ids, 40, NACL(keep=0.2))
    assert (same.nll - found.nll).abs().max() < 1e-5 and (less.nll - found.nll).abs().max() > 1e-3
    assert less.bytes * 5 == found.bytes


def test_a_real_model_loses_more_with_less_and_the_report_says_so(stories: Path, shared: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text((shared / "grimm" / "GrimmsFairyTales.txt").read_text()[20_000:40_000])
    knobs = {"data": str(text), "context": 192, "continuation": 32, "rows": 8, "tasks": ["copy"]}
    found = modelwright.run("cache.bench", base=stories, methods=["nacl", "random", "snapkv"], keep=[0.5, 0.05], **knobs)
    rows = {(r["cache"], r["keep"]): r for r in found.steps[0]["metrics"]["rows"]}
    assert rows["full cache", 1.0]["agreement"] == 1 and rows["full cache", 1.0]["rise"] == 0
    assert rows["random", 0.05]["nll"] > rows["random", 0.5]["nll"] > 0
    assert rows["random", 0.05]["agreement"] < rows["random", 0.5]["agreement"] < 1
    assert abs(rows["nacl", 0.5]["cache_bytes"] / rows["full cache", 1.0]["cache_bytes"] - 0.5) < 0.02
    assert list(found.steps[0]["metrics"]["left_out"]) == ["snapkv at 0.05"]
    html = found.report.html()
    assert "Real text read on" in html and "Left out" in html
    json.dumps(found.plain())


def test_bad_input_is_refused(tiny, tmp_path: Path) -> None:  # noqa: ANN001
    for words, knobs in {
        "nothing to measure": {},
        "keep=1.5 is out of range": {"tasks": ["recall"], "keep": [1.5]},
        "unknown way to evict 'naclo'": {"tasks": ["recall"], "methods": ["naclo"]},
        "unknown task": {"tasks": ["recal"]},
        "unknown way to evict 'snpkv'; did you mean 'snapkv'": {"tasks": ["recall"], "settings": {"snpkv": {"observe": 4}}},
        "settings for h2o have no use": {"tasks": ["recall"], "methods": ["nacl"], "settings": {"h2o": {"recent": 0.1}}},
        "sinks=-3 is out of range": {"tasks": ["recall"], "settings": {"streaming_llm": {"sinks": -3}}},
    }.items():
        with pytest.raises(UserError, match=words):
            modelwright.run("cache.bench", base=tiny("llama"), **knobs)
    (tmp_path / "short.jsonl").write_text(json.dumps({"input_ids": [5] * 30}) + "\n")
    with pytest.raises(UserError, match="the text has no 48 tokens"):
        modelwright.run("cache.bench", base=tiny("llama"), data=str(tmp_path / "short.jsonl"), context=40, continuation=8)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_longer_than_the_model_s_context_is_refused(kind: str, tiny, tmp_path: Path) -> None:  # noqa: ANN001
    (tmp_path / "t.jsonl").write_text(json.dumps({"input_ids": [5] * 300}) + "\n")
    how = {"base": tiny(kind), "methods": ["random"], "keep": [0.5], "rows": 2}
    with pytest.raises(UserError, match="65 tokens do not fit, because the model's context is 64, context and continuation together"):
        modelwright.run("cache.bench", data=str(tmp_path / "t.jsonl"), context=45, continuation=20, **how)
    for task, answer in (("copy", 16), ("passkey", 4), ("recall", 1)):
        with pytest.raises(UserError, match="65 tokens do not fit, because .* question and answer of " + task):
            modelwright.run("cache.bench", tasks=[task], context=65 - answer, **how)
        modelwright.run("cache.bench", tasks=[task], context=64 - answer, **how)
    modelwright.run("cache.bench", data=str(tmp_path / "t.jsonl"), context=44, continuation=20, **how)


@pytest.mark.parametrize("rows", [1, 2])
def test_it_says_how_many_rows_it_measured(rows: int, tiny, tmp_path: Path) -> None:  # noqa: ANN001
    ids = torch.randint(3, 96, (30 * rows + 5,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "t.jsonl").write_text(json.dumps({"input_ids": ids}) + "\n")
    how = {
        "base": tiny("llama"),
        "data": str(tmp_path / "t.jsonl"),
        "methods": ["random"],
        "keep": [0.5],
        "context": 20,
        "continuation": 10,
    }
    found = modelwright.run("cache.bench", rows=8, **how)
    metrics, html = found.steps[0]["metrics"], found.report.html()
    assert metrics["texts"] == rows and f"over {rows} row" in html and "of the 8 that were asked for" in html
    evicted = metrics["rows"][1]
    assert (evicted["rise_low"] is None) == (rows == 1) == (" to " not in html.split("Real text read on")[1].split("</table>")[0])
    assert "asked for" not in modelwright.run("cache.bench", rows=rows, **how).report.html()


def test_it_reads_what_an_earlier_step_curated(stories: Path, tmp_path: Path) -> None:
    steps = [
        {"curate.stdlib": {"parts": ["docstrings"], "characters": 20_000}},
        {"cache.bench": {"methods": ["random"], "keep": [0.5], "context": 64, "continuation": 8, "rows": 2}},
    ]
    found = run_recipe(parse({"base": str(stories), "steps": steps, "save": {"to": str(tmp_path / "out")}}))
    assert found.steps[1]["metrics"]["rows"][0]["nll"] > 0
    assert found.steps[1]["inputs"].keys() == {"checkpoint", "dataset"}
