"""The demo, small: every number in the table is there and the page opens on them."""

import json
from pathlib import Path

import pytest

from modelwright.cli.demo import run_demo
from modelwright.core.errors import UserError


@pytest.mark.slow
def test_demo_on_a_person_s_own_model_and_text(stories: Path, shared: Path, tmp_path: Path) -> None:
    numbers = run_demo(base=str(stories), data=str(shared / "tinyshakespeare"), to=str(tmp_path / "demo"), tokens="6k", as_json=True)
    moe, dense = numbers["moe"], numbers["dense"]
    assert numbers["certificate"]["passed"] and moe["new_before"] == pytest.approx(dense["new_before"], abs=1e-4)
    assert moe["new_after"] < moe["new_before"] and dense["new_after"] < dense["new_before"], "both learn"
    assert moe["params_total"] > moe["params_active"] > dense["params_total"]
    for layer in numbers["expert_load"]["share"]:
        assert sum(layer) == pytest.approx(1, abs=1e-5)
    page = Path(numbers["report"]).read_text()
    assert f"{moe['new_after']:.3f}" in page and page.count("<svg") == 10
    assert json.loads((tmp_path / "demo" / "report.json").read_text())["seed"] == 0
    assert (tmp_path / "demo" / "moe" / "modelwright.json").is_file()


def test_bad_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="whole number"):
        run_demo(tokens="many", to=str(tmp_path / "d"))
    assert not list(tmp_path.iterdir())
