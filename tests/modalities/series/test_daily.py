"""Tables as days: rows of any cadence, dates of any order, and what cannot be read."""

from pathlib import Path

import numpy as np
import pytest

from modelwright.core.errors import UserError
from modelwright.modalities.series.daily import parse_dates, read, text


def table(folder: Path, words: str) -> str:
    file = folder / "t.csv"
    file.write_text(words)
    return str(file)


def hours(day: str, values: list[float], more: str = "") -> str:
    return "".join(f"{day},{v}{more}\n" for v in values)


def test_rows_of_a_day_are_summed_or_averaged_and_temperatures_always_averaged(tmp_path: Path) -> None:
    words = "date,value,temperature\n2020-01-02,1,10\n2020-01-01,4,20\n2020-01-02,3,14\n2020-01-01,6,24\n"
    file = table(tmp_path, words)
    days = read(file, date="date", value="value", temperature="temperature")
    assert days.value.tolist() == [10, 4] and days.temperature.tolist() == [22, 12] and text(days.day[0]) == "2020-01-01"
    assert read(file, date="date", value="value", combine="mean").value.tolist() == [5, 2]


def test_row_order_changes_nothing(tmp_path: Path) -> None:
    rows = [f"2020-0{m}-{d:02d},{m * d},{c}\n" for m in (1, 2) for d in range(1, 29) for c in "ba"]
    head, found = "date,value,place\n", []
    for order in (np.arange(len(rows)), np.random.default_rng(0).permutation(len(rows))):
        days = read(table(tmp_path, head + "".join(rows[i] for i in order)), date="date", value="value", group="place")
        found.append((days.day.tolist(), days.value.tolist(), days.groups.tolist(), days.names))
    assert found[0] == found[1] and found[0][3] == ("a", "b")


def test_an_incomplete_day_is_left_out_and_counted(tmp_path: Path) -> None:
    words = "date,value\n" + hours("2020-01-01", [1.0] * 24) + hours("2020-01-02", [1.0] * 20) + hours("2020-01-03", [1.0] * 23)
    days = read(table(tmp_path, words), date="date", value="value")
    assert [text(d) for d in days.day] == ["2020-01-01", "2020-01-03"] and days.facts["incomplete days left out"] == 1


@pytest.mark.parametrize("words", ["2012-01-31", "2012/1/31", "20120131", "31/01/2012", "01/31/2012", "31.01.2012", "2012-01-31T13:00:00Z"])
def test_dates_are_read_in_every_common_form(words: str) -> None:
    assert text(parse_dates([words], "x")[0]) == "2012-01-31"


@pytest.mark.parametrize(
    ("values", "say"),
    [
        (["03/04/2012"], "no day above 12"),
        (["31/01/2012", "01/31/2012"], "day stands first in some rows"),
        (["2012-02-30"], "no such day"),
        (["Monday"], "no date that can be read"),
    ],
)
def test_dates_that_cannot_be_told_apart_are_refused(values: list[str], say: str) -> None:
    with pytest.raises(UserError, match=say):
        parse_dates(values, "column 'date'")


def test_fahrenheit_is_asked_about_and_then_converted(tmp_path: Path) -> None:
    file = table(tmp_path, "date,value,temperature\n" + "".join(f"2020-01-{d:02d},1,{40 + d}\n" for d in range(1, 29)))
    with pytest.raises(UserError, match="no range of degrees Celsius.*--unit fahrenheit"):
        read(file, date="date", value="value", temperature="temperature")
    days = read(file, date="date", value="value", temperature="temperature", unit="fahrenheit")
    assert np.allclose(days.temperature, (np.arange(41, 69) - 32) / 1.8)
    assert read(file, date="date", value="value", temperature="temperature", unit="celsius").temperature.max() == 68


def test_a_gap_in_the_temperature_is_interpolated_and_counted_but_not_a_long_one(tmp_path: Path) -> None:
    rows = [f"2020-01-{d:02d},1,{'' if d == 5 else d}\n" for d in range(1, 29)]
    days = read(table(tmp_path, "date,value,temperature\n" + "".join(rows)), date="date", value="value", temperature="temperature")
    assert days.temperature.tolist() == list(range(1, 29)) and days.facts["days whose temperature was interpolated"] == 1
    rows = [f"2020-01-{d:02d},1,{'NA' if d < 5 else d}\n" for d in range(1, 29)]
    with pytest.raises(UserError, match="missing on 4 of 28 days"):
        read(table(tmp_path, "date,value,temperature\n" + "".join(rows)), date="date", value="value", temperature="temperature")


@pytest.mark.parametrize(
    ("words", "say"),
    [
        ("date,value\n2020-01-01,1\n2020-01-02,1\n2020-01-02,1\n2020-01-03,1\n", "2020-01-02 has 2 rows"),
        ("date,value\n2020-01-01,many\n", "'many', because a number"),
        ("date,value\n2020-01-01,inf\n", "a finite number"),
        ("date,value\n2020-01-01,\n2020-01-02,NA\n", "no row has a number"),
        ("date,value,holiday\n2020-01-01,1,Easter\n", "true or false"),
        ("date,value,holiday\n2020-01-01,1,1\n2020-01-01,1,0\n", "a holiday in some rows"),
        ("day,value\n2020-01-01,1\n", "no column 'date'"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, words: str, say: str) -> None:
    with pytest.raises(UserError, match=say):
        read(table(tmp_path, words), date="date", value="value", holiday="holiday" if "holiday" in words else "")
