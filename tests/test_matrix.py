"""One test runs every method on every family it fits: it saves, and a stock class loads what was saved."""

import json
from pathlib import Path

import pytest

import modelwright
from matrix import ROWS

CASES = [(name, family) for name, row in ROWS.items() for family in row.families]


@pytest.mark.parametrize(("name", "family"), CASES, ids=[f"{n}-{f}" if f else n for n, f in CASES])
def test_method_saves_what_a_stock_class_loads(name: str, family: str, tiny, tmp_path: Path) -> None:
    row, knobs = ROWS[name], dict(ROWS[name].knobs)
    if row.data:
        data = tmp_path / "data.jsonl"
        lines = (
            [{"input_ids": [(7 * i + j) % 90 + 3 for j in range(20)]} for i in range(12)] if family else [{"text": "one two three " * 50}]
        )
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        knobs["data"] = str(data)
    base = tiny(family) if family else None
    result = modelwright.run(name, base=base, to=tmp_path / "out", **knobs)
    assert result.to == tmp_path / "out" and not list(tmp_path.glob("out.*"))
    assert (result.to / "report.html").stat().st_size > 2000
    if result.certificate:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(result.to)
        assert type(model).__name__ == result.certificate["loads_in"] == row.loads_in.get(family, result.certificate["loads_in"])
        assert sum(p.numel() for p in model.parameters()) == result.certificate["params_total"]
        assert result.certificate["passed"] in (True, None)
