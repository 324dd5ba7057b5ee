"""reward.themis: recorded traces come out letter for letter; what is wrong with the recorded ones is counted; bad input is one sentence."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import modelwright
from modelwright.core.errors import UserError
from modelwright.testing import made


@pytest.fixture(scope="module")
def tara(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return modelwright.run("reward.themis", to=tmp_path_factory.mktemp("tara") / "out", replay=str(shared / "tara"), schema=True)


def test_all_recorded_observations_come_out_the_same(tara: Any) -> None:
    found = tara.plain()["metrics"]["replay"]
    assert found["same"] == {
        "calendar: Calendar": {"same": 852, "of": 852},
        "multi tools: Calendar": {"same": 1152, "of": 1152},
        "multi tools: history_weather": {"same": 1152, "of": 1152},
        "weather: history_weather": {"same": 1268, "of": 1268},
        "translator: translate": {"same": 600, "of": 600},
    }
    assert found["round trips"] == {"same": 9360, "of": 9360}
    assert found["files"]["code_train"]["tools"] == {"code_run": {"calls": 972}}
    assert len(json.loads((tara.to / "tools.json").read_text())) == 9


def test_calculator_observations_give_the_right_answer_away_in_both_splits(tara: Any) -> None:
    files = tara.plain()["metrics"]["replay"]["files"]
    assert files["calculator_train"]["leaks"]["quotes it and the answer is another"] == 644
    assert files["calculator_test"]["leaks"] == {
        "quotes the right answer": 132, "quotes it and the answer is another": 0, "the bad answer is the right number": 154
    }  # fmt: skip


def test_a_changed_observation_is_told_with_its_input(tmp_path: Path) -> None:
    folder = Path(made("recorded", tmp_path)["replay"])
    file = folder / "calendar_train.json"
    rows = json.loads(file.read_text())
    rows[0]["pos_answer"]["actions"]["Observation"] = "Doomsday"
    file.write_text(json.dumps(rows))
    done = modelwright.run("reward.themis", to=tmp_path / "out", replay=str(folder)).plain()
    assert done["metrics"]["replay"]["same"] == {"calendar: Calendar": {"same": 23, "of": 24}}
    assert "2020-01-01: Wednesday, recorded Doomsday" in json.dumps(done["steps"][0]["facts"])


def test_pairs_with_calculator_observations_made_again_can_be_read(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    rows = json.loads(gzip.decompress((shared / "tara" / "calculator_train.json.gz").read_bytes()))[:5]
    (tmp_path / "traces" / "calculator_train.json").write_text(json.dumps(rows))
    modelwright.run("reward.themis", to=tmp_path / "out", replay=str(tmp_path / "traces"), rerun=True)
    from modelwright.reward.tools.replay import read_pairs

    again = read_pairs(tmp_path / "out" / "rerun" / "calculator_train.jsonl")
    assert len(again) == 5 and again[0].chosen.trace.calls[0].observation.startswith("All results are right")
    assert again[0].chosen.trace.rationale == rows[0]["pos_answer"]["score_agent"]["explanation"]


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is nothing to do"):
        modelwright.run("reward.themis", to=tmp_path / "a")
    with pytest.raises(UserError, match="holds no traces"):
        modelwright.run("reward.themis", to=tmp_path / "a", replay=str(tmp_path))
    (tmp_path / "x_train.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"holds no traced pairs.*row 1"):
        modelwright.run("reward.themis", to=tmp_path / "a", replay=str(tmp_path))
    (tmp_path / "x_train.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        modelwright.run("reward.themis", to=tmp_path / "a", replay=str(tmp_path))
    with pytest.raises(UserError, match="judged by a model"):
        modelwright.run("reward.themis", to=tmp_path / "a", pairs=str(tmp_path / "x_train.json"))
    with pytest.raises(UserError, match="writes no traces"):
        modelwright.run("reward.themis", base="seedling", to=tmp_path / "a", pairs=made("traces", tmp_path)["data"])
    assert not (tmp_path / "a").exists()
