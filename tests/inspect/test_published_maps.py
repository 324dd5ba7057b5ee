"""inspect.map_tuning: the published table comes out of the published files."""

import json
from pathlib import Path

import pytest

import modelwright
from modelwright.core.errors import UserError
from modelwright.inspect.map_tuning import read_results

TABLE = {  # frozen | general plug | plug for the task | tuned with Wikipedia's map
    "EntityQuestions": (0.417, 0.490, 0.589, 0.629),
    "Wiki80": (0.861, 0.867, 0.878, 0.887),
    "WikiET": (0.775, 0.766, 0.789, 0.799),
    "FewRel 5way1shot": (0.910, 0.926, 0.928, 0.935),
    "FewRel 5way5shot": (0.951, 0.956, 0.956, 0.965),
    "FewRel 10way1shot": (0.854, 0.881, 0.882, 0.894),
    "FewRel 10way5shot": (0.908, 0.912, 0.910, 0.928),
}


def test_published_table_is_recomputed(shared: Path) -> None:
    done = modelwright.run("inspect.map_tuning", published=str(shared / "knowledge_plugin_results"))
    bert, others, losses = done.steps[0]["tables"]
    assert {row[0]: (row[1], row[2], row[3], row[5]) for row in bert["rows"]} == TABLE
    entity = next(r for r in others["rows"] if r[0] == "EntityQuestions")
    assert entity[3:] == [0.424, 0.496, 0.436, 0.508, 0.413, 0.484]
    none = next(r for r in losses["rows"] if r[0] == "mapping_networks/Wikipedia/NoDropout")
    assert [round(v, 2) for v in none[1:]] == [6.58, 5.43, 5]
    metrics = done.steps[0]["metrics"]
    few = [v for k, v in metrics["scores"].items() if k.startswith("FewRel") and "/Plug_General/" in k]
    assert len(few) == 16 and metrics["fewrel general map"] == pytest.approx(sum(few) / 16, abs=1e-12)
    assert (metrics["better"], metrics["pairs"]) == (27, 28)


@pytest.mark.parametrize("text", ["", "[]", '{"output/x": 1}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read|no results"):
        read_results(str(tmp_path))


def test_missing_figures_stay_empty(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"output/A/BaseModel/BERT/test_result.out": {"micro_f1": 0.5}}))
    done = modelwright.run("inspect.map_tuning", published=str(tmp_path))
    assert done.steps[0]["tables"][0]["rows"] == [["A", 0.5, None, None, None, None]]
