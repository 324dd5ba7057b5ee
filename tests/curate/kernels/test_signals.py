"""Signals of a batch beside plain counts of one document."""

import random
from collections import Counter

import numpy as np
import pytest

from modelwright.curate.kernels.characters import normalise
from modelwright.curate.kernels.signals import Page, good_lines, signals

TEXTS = [
    "The cat sat on the mat.\nIt was the best of mats, and that was it!\n\nThe cat sat on the mat.\n\n* one\n- two\n• three…\nAnd so on...",
    "",
    "# # # ... .....\n\n\n   \n",
    "a b c a b c a b c x a b c a b c a b c a b c a b c",
    "Ein Satz über Äpfel. Noch ein Satz? 漢字かな。 naïve café\ufffd\ufffd",
    "one two three four five six seven eight nine ten eleven\n" * 4,
    "same paragraph\nof lines\n\nsame paragraph\nof lines\n\nother",
    "{ lorem ipsum }" + " " * 12 + "end",
]


def plain(text: str) -> dict[str, float]:
    """The definitions by loops over Python strings, for texts without scripts that lack spaces."""
    import re

    words = re.findall(r"\w+", text)
    lines = [line for line in (x.strip(" \t\r") for x in text.split("\n")) if line]
    paragraphs, now = [], []
    for x in [*(y.strip(" \t\r") for y in text.split("\n")), ""]:
        if x:
            now.append(x)
        elif now:
            paragraphs.append("\n".join(now))
            now = []

    def again(items: list[str]) -> list[str]:
        seen: set[str] = set()
        return [x for x in items if x in seen or seen.add(x)]

    def over(a: float, b: float) -> float:
        return a / b if b else 0.0

    out = {
        "words": len(words),
        "mean_word_length": over(sum(map(len, words)), len(words)),
        "longest_word": max(map(len, words), default=0),
        "hashes_per_word": over(text.count("#"), len(words)),
        "ellipses_per_word": over(len(re.findall(r"\.{3,}", text)) + text.count("…"), len(words)),
        "words_with_a_letter": over(sum(any(c.isalpha() for c in w) for w in words), len(words)),
        "stop_words": len({"the", "be", "to", "of", "and", "that", "have", "with"} & {w.lower() for w in words}),
        "lines": len(lines),
        "bullet_lines": over(sum(x[0] in "*-•" for x in lines), len(lines)),
        "ellipsis_lines": over(sum(x.endswith(("...", "…")) for x in lines), len(lines)),
        "lines_ending_well": over(sum(x[-1] in ".?!\"'" and not x.endswith("..") for x in lines), len(lines)),
        "short_lines": over(sum(len(x) <= 30 for x in lines), len(lines)),
        "line_breaks_per_word": over(text.count("\n"), len(words)),
        "duplicate_lines": over(len(again(lines)), len(lines)),
        "characters_in_duplicate_lines": over(sum(map(len, again(lines))), len(text)),
        "duplicate_paragraphs": over(len(again(paragraphs)), len(paragraphs)),
        "longest_run_of_spaces": max(map(len, re.findall(" +", text)), default=0),
        "lorem_ipsum": text.lower().count("lorem ipsum"),
        "curly_brackets": text.count("{"),
        "characters": len(text),
    }
    low = [w.lower() for w in words]
    for n in range(2, 11):
        grams = [tuple(low[i : i + n]) for i in range(len(low) - n + 1)]
        if n <= 4:
            count = Counter(grams)
            most = max(count.values(), default=0)
            size = max((sum(map(len, g)) + n - 1 for g, c in count.items() if c == most), default=0)
            out[f"characters_in_top_{n}_gram"] = over(most * size, len(text)) if most > 1 else 0.0
        else:
            seen, covered = set(), set()
            for i, g in enumerate(grams):
                covered |= set(range(i, i + n)) if g in seen else set()
                seen.add(g)
            out[f"characters_in_duplicate_{n}_grams"] = over(sum(len(words[i]) for i in covered), len(text))
    return out


def test_every_signal_equals_a_loop() -> None:
    rng = random.Random(0)
    texts = [t for t in TEXTS if "漢" not in t]
    texts += ["".join(rng.choices(["aa ", "b ", "c", "\n", ". ", "...", "#", "the ", "\n\n", "É", "* ", "9 "], k=200)) for _ in range(30)]
    found = signals(Page(texts))
    for i, text in enumerate(texts):
        for name, value in plain(text).items():
            assert found[name][i] == pytest.approx(value, abs=1e-9), (name, text)


def test_a_batch_equals_its_documents_one_by_one() -> None:
    whole = signals(Page(TEXTS))
    for i, text in enumerate(TEXTS):
        one = signals(Page([text]))
        assert {k: v[0] for k, v in one.items()} == pytest.approx({k: v[i] for k, v in whole.items()}), text


def test_nothing_divided_by_nothing_is_zero() -> None:
    for text in ("", " ", "\n", "...", "\ud800"):
        assert all(np.isfinite(v).all() for v in signals(Page([text])).values())
    assert {k for k, v in signals(Page([""])).items() if v[0]} == set()


def test_c4_keeps_whole_sentences_and_drops_the_rest() -> None:
    lines = {
        "This line is fine.": True,
        'He said "so it is."': True,
        "No end here": False,
        "And so on...": False,
        "Too short.": False,
        "Please enable JavaScript to see this.": False,
        "We use cookies on this site.": False,
        "x" * 1001 + " is a very long word.": False,
        "Read our Privacy Policy before you go on.": False,
    }
    page = Page(["\n\n".join(lines)])
    assert good_lines(page).tolist() == list(lines.values())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a\r\nb\rc\x85d\u2028e\x0bf", "a\nb\nc\nd\ne\nf"),
        ("\u00a0a\u2003b\u3000c", "a b c"),
        ("a\u200bb\ufeffc\u2060d", "abcd"),
        ("co\u00adop\ufffc\u2061", "coop"),
        ("a\x00b\x1bc\td\x9fe", "abc\tde"),
        ("a\ue000b\U000f0001c", "abc"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("क्\u200dष", "क्\u200dष"),
        ("👩\u200d💻 a\u200db", "👩\u200d💻 ab"),
        ("\u200b  x", "x"),
    ],
)
def test_characters_are_put_in_order(before: str, after: str) -> None:
    assert normalise(before) == after


def test_putting_in_order_twice_changes_nothing_more() -> None:
    pool = "ab \t\n\r\x0b\x0c\x00\x1b\x7f\x85\x9f\u00a0\u00ad\u200b\u200c\u200d\u2028\u2060\u2061\u3000\ufeff\ufffc\ue000میक्ष👩\ufe0f"
    rng = random.Random(0)
    for _ in range(2000):
        once = normalise("".join(rng.choices(pool, k=rng.randint(0, 12))))
        assert normalise(once) == once
