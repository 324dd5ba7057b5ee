"""The law finds what made the points, and gives the published reference losses to the last digit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.cli import app as cli
from modelwright.core.errors import UserError
from modelwright.core.step import StepContext
from modelwright.inspect.scaling_law import Knobs, fit, scaling_law

SIZES = [6738415616, 13015864320, 68976648192]


def test_all_published_reference_losses_are_met_to_four_digits(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = shared / "published_numbers" / "sheared_reference_losses.json"
    with pytest.raises(SystemExit) as caught:
        cli.main(["inspect", "scaling-law", "--losses", str(file), "--json"])
    assert not caught.value.code
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    raw = json.loads(file.read_text())
    published = {n: dict(zip(raw["losses"], row, strict=True)) for n, row in raw["targets"].items()}
    assert metrics["predicted"] == published
    assert metrics["compared"] == metrics["equal_to_four_digits"] == 21


def test_a_published_row_is_met_without_the_data() -> None:
    """The books of Sheared-LLaMA; the same figures as in its scripts."""
    law = fit(SIZES, [1.9063, 1.8242, 1.6450])
    assert [round(law(n), 4) for n in (373867520, 1345423360, 2701560320)] == [2.3625, 2.1393, 2.0325]
    assert [law(n) for n in SIZES] == pytest.approx([1.9063, 1.8242, 1.6450], abs=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(b=st.floats(0.05, 1.5), drop=st.floats(0.1, 3.0), c=st.floats(0.0, 3.0), n=st.integers(3, 7))
def test_points_of_a_law_give_it_back(b: float, drop: float, c: float, n: int) -> None:
    sizes = np.geomspace(1e8, 5e10, n)
    losses = c + drop * (sizes / sizes[0]) ** -b
    law = fit(sizes, losses)
    assert law.b == pytest.approx(b, rel=1e-3)
    assert law(1e11) == pytest.approx(c + drop * (1e11 / sizes[0]) ** -b, rel=1e-5, abs=1e-5)


def test_many_points_with_noise_are_fitted_in_the_least_squares() -> None:
    rng = np.random.default_rng(0)
    sizes = np.geomspace(1e8, 1e11, 12)
    losses = 1.5 + 2 * (sizes / 1e8) ** -0.3 + rng.normal(0, 0.01, 12)
    law = fit(sizes, losses)
    assert law.error < 0.015
    for a, b, c in ((1.02, 1, 1), (1, 1.02, 1), (1, 1, 1.02)):
        other = law.a * a / sizes ** (law.b * b) + law.c * c
        assert ((other - losses) ** 2).mean() > law.error**2


def write(folder: Path, **raw: Any) -> Knobs:
    (folder / "x.json").write_text(json.dumps(raw))
    return Knobs(losses=str(folder / "x.json"))


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        ({"model_params": SIZES[:2], "losses": {"a": [2, 1]}, "targets": [1e9]}, "2 model sizes"),
        ({"model_params": SIZES, "losses": {"a": [2, 1]}, "targets": [1e9]}, "domain 'a' has 2 losses"),
        ({"model_params": SIZES, "losses": {"a": [3, 2, 1.5]}}, "no size to predict"),
        ({"model_params": SIZES, "losses": {"a": [1.0, 1.5, 1.7]}, "targets": [1e9]}, "rise with the size"),
        ({"model_params": SIZES, "losses": {"a": [3.0, 2.9, 1.0]}, "targets": [1e9]}, "no curve"),
        ({"model_params": SIZES, "losses": {"a": [3, 2, 1.5]}, "targets": {"1e9": [1, 2]}}, "2 losses"),
        ({"losses": {}}, "losses by domain"),
        ({"model_params": SIZES, "losses": {}}, "no domain"),
    ],
)
def test_losses_without_a_law_are_refused(raw: dict, word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=word):
        scaling_law(write(tmp_path, **raw), StepContext(tmp_path))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        scaling_law(Knobs(losses=str(tmp_path / "none.json")), StepContext(tmp_path))
