"""The law gives the published figures, counts both halves, and says where it does not hold."""

import json

import pytest

from modelwright.cli import app as cli
from modelwright.core.errors import UserError
from modelwright.core.step import StepContext
from modelwright.reshape.growth_plan import Knobs, growth_plan, speed_up

PUBLISHED = [(8e9, 15e12, 6.58), (7e9, 2e12, 11.11), (13e9, 2e12, 15.84), (70e9, 2e12, 42.48)]


def plan(tmp_path, **knobs):
    return growth_plan(Knobs(**knobs), StepContext(tmp_path))


@pytest.mark.parametrize(("params", "tokens", "billions"), PUBLISHED)
def test_published_growth_timing_is_met_to_the_last_digit(params: float, tokens: float, billions: float, tmp_path) -> None:
    assert plan(tmp_path, params=params, tokens=tokens).metrics["growth_tokens_billions"] == billions


def test_figures_are_those_of_the_recorded_table(shared, tmp_path) -> None:
    rows = json.loads((shared / "published_numbers" / "gstack_growth_timing.json").read_text())["rows"]
    assert len(rows) == 4
    for row in rows:
        assert round(plan(tmp_path, params=row["N"], tokens=row["D"]).metrics["growth_tokens"] / 1e7) == round(row["d_published"] / 1e7)


def test_published_growth_timing_comes_out_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["reshape", "growth-plan", "--params", "7e9", "--tokens", "2e12", "--json"])
    assert not caught.value.code
    assert json.loads(capsys.readouterr().out)["metrics"]["growth_tokens_billions"] == 11.11


def test_published_speed_up_is_met_and_shrinks_when_the_small_model_is_counted(tmp_path) -> None:
    m = plan(tmp_path, params=7e9, tokens=300e9, scratch_tokens=300e9, grown_tokens=194e9).metrics
    assert round(100 * m["speed_up"], 1) == 54.6
    assert m["speed_up_small_model_counted"] == pytest.approx(300 / (194 + m["growth_tokens"] / 4e9) - 1)
    assert m["speed_up_small_model_counted"] < m["speed_up"]


def test_both_halves_add_up_to_the_flops_of_a_run_without_growing(tmp_path) -> None:
    m = plan(tmp_path, params=7e9, tokens=2e12, factor=2).metrics
    assert m["flops_small"] + m["flops_grown"] == pytest.approx(6 * 7e9 * 2e12)
    assert m["flops_small"] == pytest.approx(6 * 3.5e9 * m["growth_tokens"])
    assert speed_up(7e9, 2e12, m["grown_tokens_at_equal_flops"], m["growth_tokens"], 2) == pytest.approx(0)


def test_more_compute_means_earlier_growth_and_a_larger_model_later(tmp_path) -> None:
    def d(params: float, tokens: float) -> float:
        return plan(tmp_path, params=params, tokens=tokens).metrics["growth_tokens"]

    assert d(7e9, 4e12) < d(7e9, 2e12)
    assert d(13e9, 7e9 * 2e12 / 13e9) > d(7e9, 2e12)


@pytest.mark.parametrize(("params", "tokens", "words"), [(0.3e9, 1e12, ["parameters"]), (70e9, 3e13, ["FLOPs"]), (7e9, 2e12, [])])
def test_plan_beyond_the_range_of_the_law_warns(params: float, tokens: float, words: list[str], tmp_path) -> None:
    found = plan(tmp_path, params=params, tokens=tokens)
    assert len(found.metrics["warnings"]) == len(words)
    assert all(w in found.metrics["warnings"][0] and "extrapolates" in found.text for w in words)


def test_tiny_model_is_refused_with_a_share_to_take(tmp_path) -> None:
    with pytest.raises(UserError, match="5 to 10 %"):
        plan(tmp_path, params=1e6, tokens=1e15 / 6e6)


def test_half_a_comparison_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="give both"):
        plan(tmp_path, params=7e9, tokens=2e12, scratch_tokens=1e9)


@pytest.mark.parametrize("flags", [["--factor", "1"], ["--factor", "0"], ["--params", "-3"], ["--tokens", "many"]])
def test_bad_numbers_are_one_sentence(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--params": "7e9", "--tokens": "2e12", flags[0]: flags[1]}
    with pytest.raises(SystemExit) as caught:
        cli.main(["reshape", "growth-plan", *(x for pair in given.items() for x in pair)])
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and flags[0].removeprefix("--") in lines[0]
