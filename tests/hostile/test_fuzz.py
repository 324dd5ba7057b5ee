"""Mutated inputs of five kinds; the long form is `make fuzz`. Cases that once broke a promise are kept by their numbers."""

import random

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BUDGET = {"recipes": 150, "flags": 80, "data": 80, "scores": 40, "checkpoints": 25}  # about a minute in all


@pytest.mark.parametrize("kind", BUDGET)
def test_mutated_input_is_refused_in_a_sentence_or_taken_as_it_is(kind: str) -> None:
    @settings(max_examples=BUDGET[kind], derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32 - 1))
    def holds(seed: int) -> None:
        assert fuzz.attempt(kind, seed) in (0, 2)

    holds()


def test_the_fuzzer_notices_what_it_looks_for(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(fuzz, "call", lambda argv: (1, "", "Traceback"))
    with pytest.raises(fuzz.Broken, match="exit code 1"):
        fuzz.refused_or_fine([], tmp_path)
    monkeypatch.setattr(fuzz, "call", lambda argv: (2, "", "error: a\nb\nc\n"))
    with pytest.raises(fuzz.Broken, match="no one sentence"):
        fuzz.refused_or_fine([], tmp_path)
    monkeypatch.setattr(fuzz, "call", lambda argv: ((tmp_path / "x").write_text(""), (2, "", "error: a"))[1])
    with pytest.raises(fuzz.Broken, match="left"):
        fuzz.refused_or_fine([], tmp_path)
    monkeypatch.setattr(fuzz, "call", lambda argv: (0, '{"a": NaN}', ""))
    with pytest.raises(fuzz.Broken, match="NaN"):
        fuzz.refused_or_fine(["--json"], tmp_path)


def test_mutations_change_something() -> None:
    good = {"a": [1, {"b": 2}], "c": "d"}
    assert sum(fuzz.mutated(good, random.Random(i)) != good for i in range(50)) > 40
