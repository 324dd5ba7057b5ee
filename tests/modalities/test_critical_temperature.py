"""The critical temperature: planted ones found, absent ones refused, the real one in its interval."""

from pathlib import Path

import numpy as np
import pytest

import modelwright
from modelwright.core.errors import UserError
from modelwright.modalities.critical_temperature import detrend, extremes
from modelwright.modalities.series.daily import Days
from modelwright.modalities.series.hinge import Hinge

DAYS = str(Path(__file__).parent / "days.csv")
USUAL = {"table": DAYS, "value": "value", "temperature": "temperature", "holiday": "holiday", "draws": 200}


def found(**more) -> dict:
    return modelwright.run("modalities.critical_temperature", **USUAL | more).plain()["metrics"]


def series(folder: Path, rule, years: int = 2) -> str:
    day = np.arange(np.datetime64("2021-01-01"), np.datetime64(f"{2021 + years}-01-01"))
    t = 15 - 9 * np.cos(2 * np.pi * np.arange(len(day)) / 365) + np.random.default_rng(0).normal(0, 2, len(day))
    file = folder / "s.csv"
    rows = "".join(f"{d},{v},{w}\n" for d, v, w in zip(day, rule(t), t, strict=True))
    file.write_text("date,value,temperature\n" + rows)
    return str(file)


def test_the_planted_temperature_lies_in_its_interval_and_the_hinge_explains_most() -> None:
    m = found()
    low, high = m["interval"]
    assert low <= 16 <= high and high - low < 1.5 and abs(m["tc"] - 16) < 0.3 and m["both_signs"] == 1
    assert m["r2"] > m["others"]["parabola"]["r2"] > m["others"]["line"]["r2"] >= m["others"]["none"]["r2"]
    assert m["r2"] > m["others"]["hinge_without_calendar"]["r2"] + 0.2
    assert m["below"] == pytest.approx(-2.0 / 1.02, rel=0.1) and m["above"] == pytest.approx(3.0 / 1.02, rel=0.1)
    assert abs(m["others"]["parabola"]["lowest"] - 16) < 2 and abs(m["others"]["local"]["lowest"] - 16) < 2


@pytest.mark.parametrize("rule", [lambda t: 100 + t, lambda t: 100 - np.abs(t - 15)], ids=["line", "roof"])
def test_without_a_fall_and_a_rise_there_is_none(tmp_path: Path, rule) -> None:
    result = modelwright.run("modalities.critical_temperature", **USUAL | {"table": series(tmp_path, rule), "holiday": ""})
    m = result.plain()["metrics"]
    assert m["tc"] is None and m["interval"] is None and "extreme_days" not in m
    assert "no critical temperature" in result.steps[0]["text"]


def test_the_unit_of_the_value_changes_nothing(tmp_path: Path) -> None:
    one = found(table=series(tmp_path, lambda t: 100 + np.abs(t - 15)), holiday="")
    two = found(table=series(tmp_path, lambda t: 1e6 * (100 + np.abs(t - 15))), holiday="")
    assert one["tc"] == pytest.approx(two["tc"], abs=1e-6) and one["above"] == pytest.approx(two["above"], rel=1e-6)


def test_a_trend_is_divided_out_of_two_years_and_said_to_stay_in_one(tmp_path: Path) -> None:
    day = np.arange(1096)
    flat, growing = Days(day, 100 + 20.0 * (day % 365 < 180)), Days(day, (100 + 20.0 * (day % 365 < 180)) * 1.0005**day)
    assert np.abs(detrend(growing)[0] - detrend(flat)[0])[183:-183].max() < 0.02 < np.ptp(growing.value / growing.value.mean()) / 10
    m = found(table=series(tmp_path, lambda t: 100 + np.abs(t - 15), years=1), holiday="")
    assert m["detrended"] is False and abs(m["tc"] - 15) < 0.1


def test_extreme_days_are_counted_by_the_base_years() -> None:
    day = np.arange(730) + 18262  # 2020 and 2021
    t = np.concatenate([np.linspace(0, 20, 366), np.linspace(0, 20, 364) + 5])
    rows = extremes(Days(day, np.ones(730), t), Hinge(10.0, -0.01, 0.02, 1.0), [2020])
    assert [(r["year"], r["days"]) for r in rows] == [(2020, 366), (2021, 364)]
    assert rows[0]["hot"] == rows[0]["cold"] == 19 and rows[1]["cold"] == 0 and rows[1]["hot"] == int((t[366:] > 19).sum())
    assert rows[1]["extra"] == pytest.approx(100 * 0.02 * np.maximum(t[366:] - np.quantile(t[:366], 0.95), 0).sum())


@pytest.mark.parametrize(
    ("more", "say"),
    [
        ({"base_years": [1990]}, "no days of 1990"),
        ({"block": 300}, "730 days have a value, because 900"),
        ({"temperature": "holiday2"}, "no column 'holiday2'"),
    ],
)
def test_what_cannot_work_is_one_sentence(more: dict, say: str) -> None:
    with pytest.raises(UserError, match=say):
        found(**more)


def test_equal_temperatures_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("date,value,temperature\n" + "".join(f"2020-{m:02d}-{d:02d},1,20\n" for m in range(1, 13) for d in range(1, 29)))
    with pytest.raises(UserError, match="all temperatures are equal"):
        found(table=str(file), holiday="")


def test_victoria_turns_at_about_17_8_degrees(shared: Path) -> None:
    file = str(shared / "co2_vic_electricity" / "vic_electricity.csv")
    m = found(table=file, value="Demand", temperature="Temperature", date="Date", holiday="Holiday")
    low, high = m["interval"]
    assert 17.0 <= m["tc"] <= 17.9 and 16.9 < low < m["tc"] < high < 18.2 and m["days"] == 1096
    assert m["r2"] == pytest.approx(0.855, abs=5e-3) and m["others"]["line_without_calendar"]["r2"] < 0.002 and m["both_signs"] == 1
