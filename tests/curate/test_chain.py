"""Curation steps in one recipe, each reading what the one before wrote."""

import json
from pathlib import Path

from modelwright.runner.recipe import parse
from modelwright.runner.run import run_recipe


def test_a_curate_step_reads_the_dataset_of_the_step_before(tmp_path: Path) -> None:
    steps = [{"curate.stdlib": {"parts": ["topics"], "characters": 20_000}}, {"curate.rules": {"use": ["gopher.words"]}}]
    run_recipe(parse({"name": "chain", "steps": steps, "save": str(tmp_path / "out")}))
    rows = [json.loads(line) for line in (tmp_path / "out" / "dataset.jsonl").read_text().splitlines()]
    assert rows and all(r["words"] >= 50 for r in rows)
