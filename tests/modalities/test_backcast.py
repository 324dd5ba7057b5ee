"""Backcasting: exact totals, nothing seen of what is hidden, and the real series beside its controls."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import modelwright
from modelwright.core.errors import UserError
from modelwright.modalities.backcast import Backcaster, Knobs, backcast
from modelwright.modalities.series.daily import Days, read
from modelwright.modalities.series.learner import regressor
from modelwright.modalities.series.rebuild import rebuild
from modelwright.modalities.series.totals import keys, sums

pytest.importorskip("sklearn", reason="the extra `series` is not installed")
DAYS = str(Path(__file__).parent / "days.csv")
USUAL = {"table": DAYS, "value": "value", "temperature": "temperature", "holiday": "holiday"}
RIDGE = {"learner": "Ridge"}
FEW_TREES = {"settings": {"max_iter": 60, "learning_rate": 0.2}}


def load(**more) -> Days:
    return read(DAYS, date="date", value="value", temperature="temperature", holiday="holiday", **more)


def quick() -> Backcaster:
    return Backcaster(regressor("Ridge", {}), "month")


def written(folder: Path) -> list[dict[str, str]]:
    with open(folder / "out" / "days.csv") as file:
        return list(csv.DictReader(file))


def split(days: Days, year: int) -> tuple[Days, Days]:
    return days.take(days.year != year), days.take(days.year == year)


@pytest.mark.parametrize("totals", ["month", "quarter", "year"])
def test_reconstructed_days_add_up_to_their_totals(totals: str) -> None:
    seen, hidden = split(load(), 2021)
    one = rebuild(Backcaster(regressor("Ridge", {}), totals), seen, hidden)
    assert one.mass_error(totals) < 1e-12 and not np.array_equal(one.found, hidden.value)


def test_the_hidden_days_are_not_seen() -> None:
    """Moving value from one hidden day to another of its month changes nothing that is reconstructed."""
    seen, hidden = split(load(), 2021)
    moved = hidden.value.copy()
    moved[3], moved[9] = moved[3] + 40, moved[9] - 40
    other = Days(hidden.day, moved, hidden.temperature, hidden.holiday)
    assert np.allclose(rebuild(quick(), seen, hidden).found, rebuild(quick(), seen, other).found, rtol=1e-12)


def test_scaling_totals_or_levels_scales_or_leaves_the_result() -> None:
    seen, hidden = split(load(), 2021)
    total = sums(hidden.value, keys(hidden, "month"))[1]
    base = rebuild(quick(), seen, hidden, total).found
    assert np.allclose(rebuild(quick(), seen, hidden, 3 * total).found, 3 * base, rtol=1e-12)
    richer = Days(seen.day, 7 * seen.value, seen.temperature, seen.holiday)
    assert np.allclose(rebuild(quick(), richer, hidden, total).found, base, rtol=1e-9)


def test_the_order_of_countries_changes_nothing(tmp_path: Path) -> None:
    with open(DAYS) as file:
        rows = list(csv.DictReader(file))
    found = []
    for order in (("a", "b"), ("b", "a")):
        file = tmp_path / f"{order[0]}.csv"
        file.write_text(
            "date,value,temperature,place\n"
            + "".join(f"{r['date']},{float(r['value']) * (2 if p == 'b' else 1)},{r['temperature']},{p}\n" for p in order for r in rows)
        )
        days = read(str(file), date="date", value="value", temperature="temperature", group="place")
        found.append(rebuild(quick(), *split(days, 2021)).found)
    assert np.array_equal(*found)
    assert np.allclose(found[0][365:], 2 * found[0][:365], rtol=0.05)


def test_days_beyond_the_temperatures_learnt_from_are_clamped_and_counted() -> None:
    seen, hidden = split(load(), 2021)
    hot = hidden.temperature.copy()
    hot[100] = 45
    one = rebuild(quick(), seen, Days(hidden.day, hidden.value, hot, hidden.holiday))
    before = rebuild(quick(), seen, hidden)
    assert one.beyond == before.beyond + 1 and np.isfinite(one.found).all()
    capped = hidden.temperature.copy()
    capped[100] = seen.temperature.max()
    assert np.array_equal(one.found, rebuild(quick(), seen, Days(hidden.day, hidden.value, capped, hidden.holiday)).found)


def test_each_year_is_left_out_in_turn_and_the_learnt_shape_beats_both_controls(tmp_path: Path) -> None:
    m = modelwright.run("modalities.backcast", to=tmp_path / "out", **USUAL, **FEW_TREES).plain()["metrics"]
    assert list(m["years"]) == ["2021", "2022"]
    for scores in (m, *m["years"].values()):
        learned = scores.get("learned", scores)
        assert learned["r2"] > scores["climatology"]["r2"] + 0.1 > scores["flat"]["r2"] + 0.1
    assert m["mass_error"] < 1e-12 and 0.8 < m["interval"]["coverage"] <= 1
    rows = written(tmp_path)
    assert len(rows) == 730 and all(float(r["low"]) <= float(r["value"]) <= float(r["high"]) for r in rows)
    assert np.mean([float(r["low"]) <= float(r["truth"]) <= float(r["high"]) for r in rows]) == pytest.approx(m["interval"]["coverage"])


def test_known_totals_give_days_to_dates_without_values(tmp_path: Path) -> None:
    with open(DAYS) as file:
        rows = list(csv.DictReader(file))
    blank = tmp_path / "blank.csv"
    values = [(r["date"], "" if r["date"] < "2022" else r["value"], r["temperature"]) for r in rows]
    blank.write_text("date,value,temperature\n" + "".join(f"{d},{v},{t}\n" for d, v, t in values))
    known = tmp_path / "known.csv"
    known.write_text("period,total\n" + "".join(f"2021-{m:02d},{1000 + m}\n" for m in range(1, 12)) + "1999-01,5\n")
    knobs = {"table": str(blank), "value": "value", "temperature": "temperature", "known": str(known), **RIDGE}
    result = modelwright.run("modalities.backcast", to=tmp_path / "out", **knobs)
    m = result.plain()["metrics"]
    assert m["periods"] == 11 and m["days"] == 365 - 31 and m["mass_error"] < 1e-12
    assert result.steps[0]["facts"]["totals without days"] == 1
    rows = written(tmp_path)
    march = sum(float(r["value"]) for r in rows if r["date"].startswith("2021-03"))
    assert march == pytest.approx(1003, rel=1e-12) and {r["truth"] for r in rows} == {""}


@pytest.mark.slow
def test_the_same_seed_and_table_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        modelwright.run("modalities.backcast", to=tmp_path / name, **USUAL, **FEW_TREES, hide=[2021])
    assert (tmp_path / "a" / "days.csv").read_bytes() == (tmp_path / "b" / "days.csv").read_bytes()


@pytest.mark.parametrize(
    ("knobs", "say"),
    [
        ({"hide": [1990]}, "no days of 1990"),
        ({"hide": [2021, 2022]}, "all of 2021, 2022 would be hidden"),
        ({"learner": "LogisticRegressor"}, "no regressor 'LogisticRegressor'"),
        ({"learner": "os:nothing"}, "cannot be imported"),
        ({"settings": {"max_leaves": 3}}, "no setting 'max_leaves'.*max_leaf_nodes"),
        ({"value": "valeu"}, "did you mean 'value'"),
    ],
)
def test_what_cannot_work_is_one_sentence(knobs: dict, say: str) -> None:
    with pytest.raises(UserError, match=say):
        modelwright.run("modalities.backcast", **USUAL | knobs)


def test_negative_months_are_named(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("date,value\n" + "".join(f"2020-{m:02d}-{d:02d},{-1 if m == 2 else 1}\n" for m in range(1, 13) for d in range(1, 29)))
    with pytest.raises(UserError, match="1 of 12 months have a negative total, 2020-02 first"):
        modelwright.run("modalities.backcast", table=str(file), value="value")


def test_victoria_is_reconstructed_from_monthly_and_from_yearly_totals(shared: Path, tmp_path: Path) -> None:
    from modelwright.core.step import StepContext

    file = shared / "co2_vic_electricity" / "vic_electricity.csv"
    names = {"value": "Demand", "temperature": "Temperature", "date": "Date", "holiday": "Holiday"}
    found = {t: backcast(Knobs(table=str(file), hide=[2012], totals=t, **names), StepContext(tmp_path)).metrics for t in ("month", "year")}
    assert found["month"]["r2"] >= 0.92 and found["year"]["r2"] >= 0.88
    assert [round(found["month"][k]["r2"], 2) for k in ("flat", "climatology")] == [0.31, 0.59]
    assert max(m["mass_error"] for m in found.values()) < 1e-12
    json.dumps(found)


def test_national_totals_of_every_year_are_met(shared: Path) -> None:
    """Yearly totals 1959 to 2018 of the Global Carbon Budget, given days by the calendar alone; leap years too."""
    with open(shared / "co2_global_carbon_budget" / "territorial-emissions.csv") as file:
        rows = [r for r in csv.DictReader(file) if r["Code"] in ("AUS", "JPN") and r["Emissions"]]
    seen = load()
    seen = Days(seen.day, seen.value)
    day = np.arange(np.datetime64("1959-01-01"), np.datetime64("2019-01-01")).astype(np.int64)
    for code in ("AUS", "JPN"):
        total = np.array([float(r["Emissions"]) for r in sorted(rows, key=lambda r: r["Year"]) if r["Code"] == code])
        past = Days(day, np.full(len(day), np.nan))
        found = Backcaster(regressor("Ridge", {}), "year").fit(seen).predict(past, total)
        assert np.abs(sums(found, past.year)[1] / total - 1).max() < 1e-12 and len(total) == 60


def test_sectors_of_the_carbon_monitor_close_on_the_nations(shared: Path) -> None:
    folder = shared / "co2_carbon_monitor_annual"
    with open(folder / "EmissionsAgg.csv") as file:
        nations = {r["emissions_id"]: float(r["total_emissions"]) for r in csv.DictReader(file)}
    sectors = dict.fromkeys(nations, 0.0)
    with open(folder / "EmissionsBySector.csv") as file:
        for r in csv.DictReader(file):
            sectors[r["emissions_id"]] += float(r["emissions_value"])
    name, total = zip(*sorted(nations.items()), strict=True)
    assert max(abs(sectors[n] / nations[n] - 1) for n in name) < 1e-6
    day = np.arange(np.datetime64("2019-01-01"), np.datetime64("2020-01-01")).astype(np.int64)
    group = np.repeat(np.arange(len(name)), 365)
    past = Days(np.tile(day, len(name)), np.full(365 * len(name), np.nan), group=group, names=name)
    seen = load()
    seen = Days(seen.day, seen.value, group=np.zeros(len(seen), np.int64), names=name)
    found = Backcaster(regressor("Ridge", {}), "year").fit(seen).predict(past, np.array(total))
    assert np.abs(sums(found, group)[1] / np.array(total) - 1).max() < 1e-12
