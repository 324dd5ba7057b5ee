"""Prompts and samples as texts: the m formula, LEC with k = 0 is LE, what is rendered is parsed, nearest questions."""

import numpy as np
import pytest

from modelwright.curate.generators import neighbours
from modelwright.curate.generators.overlap import Seen
from modelwright.curate.generators.tasks import Sample, message, parse, render, samples_per_call, trained_on

CHOICE = "Which?\nA. one\nB. two\nC. three\nD. four"
SAMPLES = {
    "number": [Sample("What is 2 + 3?", "2 + 3 = <<2+3=5>>5\n#### 5"), Sample("Two lines.\n\nOf text?", "1 + 1 = 2\n#### 2")],
    "choice": [Sample(CHOICE, "B. because"), Sample(CHOICE.replace("one", "none"), "D. no # reason")],
    "code": [
        Sample(
            "Write double(x).", "```python\nimport math\n\ndef double(x):\n    # a comment\n    return x * 2\n```", "assert double(1) == 2"
        )
    ],
}


def test_samples_per_call_are_the_published_ones() -> None:
    assert [samples_per_call(3000, wrong) for wrong in (724, 247, 4303)] == [6, 14, 2]


@pytest.mark.parametrize("kind", SAMPLES)
def test_what_is_rendered_is_parsed(kind: str) -> None:
    assert parse(kind, render(kind, SAMPLES[kind])) == (SAMPLES[kind], 0)  # type: ignore[arg-type]
    talk = "Sure! Here they are.\n\n" + render(kind, SAMPLES[kind]).replace("### Question 1", "## **Question 1:**") + "\n"  # type: ignore[arg-type]
    assert parse(kind, talk) == (SAMPLES[kind], 0)  # type: ignore[arg-type]


def test_torn_samples_are_counted() -> None:
    whole = render("number", SAMPLES["number"])
    assert parse("number", whole[: whole.rindex("####")]) == (SAMPLES["number"][:1], 1)
    assert parse("number", "I cannot do that.") == ([], 0)
    assert parse("choice", render("choice", [Sample("Which?\nA. x\nB. y", "A. z")]))[1] == 1


def test_contrast_of_nothing_is_no_contrast() -> None:
    assert message("number", "q", "w", [], 3) == message("number", "q", "w", (), 3)
    assert message("number", "q", "w", ["r"], 3).endswith(message("number", "q", "w", [], 3))
    assert "w" in message("number", "q", "[w]", [], 3) and "WRONG" not in message("number", "q", None, [], 3)


def test_what_is_trained_on_has_no_notes() -> None:
    assert trained_on("number", SAMPLES["number"][0]) == "2 + 3 = 5\nThe answer is 5."
    assert trained_on("choice", SAMPLES["choice"][0]) == "B. because"


def test_nearest_questions_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (rng.normal(size=(7, 5)), rng.normal(size=(20, 5)))]
    brute = [sorted(range(20), key=lambda j: float(((q - unit[1][j]) ** 2).sum()))[:3] for q in unit[0]]
    assert neighbours.nearest(*unit, 3).tolist() == brute


def test_nearest_by_words_and_by_a_checkpoint() -> None:
    texts = ["add two numbers", "the colour of the sky", "add three numbers", "blue sky, what colour"]
    for encoder in ("words", "seedling"):
        found = neighbours.vectors(texts, encoder)
        assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert neighbours.nearest(neighbours.vectors(texts, "words")[:1], neighbours.vectors(texts, "words")[1:], 1).tolist() == [[1]]


def test_overlap_is_the_same_words_or_a_run_of_them() -> None:
    seen = Seen(["One two three four, five!"], 3)
    assert "one TWO three four five" in seen and "zero two three four" in seen and "one two four five" not in seen
    assert "two three four" not in Seen(["one two three four"], 0)
