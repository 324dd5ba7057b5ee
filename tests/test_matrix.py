"""One test runs every method on every family it fits: it saves, and a stock class loads what was saved."""

import json
from pathlib import Path

import pytest

import modelwright
from matrix import ROWS


def _chats(folder: Path) -> dict[str, str]:
    rows = [
        {
            "messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": f"it is {i + 1}"}],
            "source": ("good", "bad")[i % 2],
        }
        for i in range(24)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"data": str(folder / "chats.jsonl")}


def _fact(folder: Path) -> dict[str, str]:
    (folder / "fact.json").write_text(json.dumps({"prompt": "import os is", "new": "red", "true": "blue", "neighbours": ["import re is"]}))
    return {"fact": str(folder / "fact.json")}


def _matrix(folder: Path) -> dict[str, str]:
    (folder / "m.json").write_text(json.dumps({"tasks": ["a", "b"], "matrix": [[90, 10], [70, 80]]}))
    return {"matrix": str(folder / "m.json")}


_MADE = {"chats": _chats, "fact": _fact, "matrix": _matrix}
CASES = [(name, family) for name, row in ROWS.items() for family in row.families]


@pytest.mark.parametrize(("name", "family"), CASES, ids=[f"{n}-{f}" if f else n for n, f in CASES])
def test_method_saves_what_a_stock_class_loads(name: str, family: str, tiny, tmp_path: Path) -> None:
    row, knobs = ROWS[name], dict(ROWS[name].knobs)
    if isinstance(row.data, str):
        knobs |= _MADE[row.data](tmp_path)
    elif row.data:
        data = tmp_path / "data.jsonl"
        lines = (
            [{"input_ids": [(7 * i + j) % 90 + 3 for j in range(20)]} for i in range(12)] if family else [{"text": "one two three " * 50}]
        )
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        knobs["data"] = str(data)
    base = "seedling" if family == "seedling" else tiny(family) if family else None
    knobs = {k: str(base) if v == "BASE" else v for k, v in knobs.items()}
    result = modelwright.run(name, base=base, to=tmp_path / "out", **knobs)
    assert result.to == tmp_path / "out" and not list(tmp_path.glob("out.*"))
    assert (result.to / "report.html").stat().st_size > 2000
    if result.certificate:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(result.to)
        assert type(model).__name__ == result.certificate["loads_in"] == row.loads_in.get(family, result.certificate["loads_in"])
        assert sum(p.numel() for p in model.parameters()) == result.certificate["params_total"]
        assert result.certificate["passed"] in (True, None)
