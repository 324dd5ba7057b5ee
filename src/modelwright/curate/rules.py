"""Rules for text from the web: every document gets its numbers, every removal its reason, and the cut is chosen afterwards.

When to use it: after extraction, before deduplication, on web pages or anything alike. Score first: with `drop: false` nothing is
removed, and the columns say what each rule would do.

Paper: WanJuan-CC (arXiv 2402.19282), the second stage of its funnel: characters are put in order, lines and documents are filtered.
There is no official code and its table of thresholds could not be read. Each rule here is named by its own source:

- gopher: 2112.11446, quality and repetition.      - c4: 1910.10683, lines and documents.
- fineweb: 2406.17557.                             - kit: the hard rejects of llm-web-kit, by the laboratory of the paper.

How: one tokenisation per document feeds all signals (kernels/signals.py). A rule is a signal and the span that it may have. The
first rule that fails, in the order of the table, is the document's reason; all that fail are its flags. An empty document has
0 / 0 = 0 everywhere and falls to the first rule that wants words.

Differences from other implementations: words are runs of letters and digits, in every script, instead of the tokens of an English
tokenizer; duplicate 5- to 10-grams count the characters that any of them covers once, as the Gopher paper has it.

`lines: true` also takes C4's bad lines out of the text that is written, and marks such as [12] and [edit].
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Data, knob
from modelwright.curate.kernels.characters import normalise
from modelwright.curate.kernels.documents import Sink, Source
from modelwright.curate.kernels.signals import Page, good_lines, signals

INF = float("inf")
RULES: dict[str, tuple[str, float, float]] = {  # rule: signal, least and most that it may be
    "gopher.words": ("words", 50, 100_000),
    "gopher.word_length": ("mean_word_length", 3, 10),
    "gopher.hashes": ("hashes_per_word", 0, 0.1),
    "gopher.ellipses": ("ellipses_per_word", 0, 0.1),
    "gopher.bullets": ("bullet_lines", 0, 0.9),
    "gopher.ellipsis_lines": ("ellipsis_lines", 0, 0.3),
    "gopher.letters": ("words_with_a_letter", 0.8, 1),
    "gopher.stop_words": ("stop_words", 2, INF),
    "gopher.duplicate_lines": ("duplicate_lines", 0, 0.3),
    "gopher.duplicate_paragraphs": ("duplicate_paragraphs", 0, 0.3),
    "gopher.duplicate_line_characters": ("characters_in_duplicate_lines", 0, 0.2),
    "gopher.duplicate_paragraph_characters": ("characters_in_duplicate_paragraphs", 0, 0.2),
    **{f"gopher.top_{n}_gram": (f"characters_in_top_{n}_gram", 0.0, m) for n, m in ((2, 0.2), (3, 0.18), (4, 0.16))},
    **{f"gopher.duplicate_{n}_grams": (f"characters_in_duplicate_{n}_grams", 0.0, round(0.2 - 0.01 * n, 2)) for n in range(5, 11)},
    "c4.lorem_ipsum": ("lorem_ipsum", 0, 0),
    "c4.curly_bracket": ("curly_brackets", 0, 0),
    "c4.sentences": ("c4_sentences", 5, INF),
    "fineweb.lines_ending_well": ("lines_ending_well", 0.12, 1),
    "fineweb.short_lines": ("short_lines", 0, 0.67),
    "fineweb.duplicate_line_characters": ("characters_in_duplicate_lines", 0, 0.01),
    "fineweb.line_breaks": ("line_breaks_per_word", 0, 0.3),
    "kit.stop_words": ("stop_word_share", 1e-12, 1),
    "kit.entropy": ("entropy", 1, INF),
    "kit.longest_word": ("longest_word", 0, 56),
    "kit.letters": ("characters_in_letter_words", 31, INF),
    "kit.sentence_length": ("mean_sentence_length", 2, INF),
    "kit.spaces": ("longest_run_of_spaces", 0, 500),
    "kit.replacement_characters": ("replacement_share", 0, 0.01),
}
_CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")


@dataclass(frozen=True)
class Knobs:
    data: Data = knob(Data(), "documents: jsonl, jsonl.gz, parquet, csv, text, or a folder of them; every column is kept")
    use: list[str] = knob(["gopher", "c4", "fineweb", "kit"], "sources of rules, or single rules such as c4.sentences")
    skip: list[str] = knob([], "rules left out")
    limits: dict[str, list[float]] = knob({}, "rule: [least, most], in place of its source's")
    normalise: bool = knob(True, "put line breaks, spaces and invisible characters in order first")
    lines: bool = knob(False, "take C4's bad lines and citation marks out of the text that is written")
    drop: bool = knob(True, "leave documents out; false: only write the columns")
    columns: bool = knob(True, "write every signal as a column")
    examples: int = knob(3, "removed documents shown per rule", low=0)


def chosen(knobs: Knobs) -> dict[str, tuple[str, float, float]]:
    """The rules in their order, with the limits that hold. Raises UserError for a name that is none."""
    sources = {name.split(".")[0] for name in RULES}
    for name in [*knobs.use, *knobs.skip, *knobs.limits]:
        if name not in RULES and name not in sources:
            raise UserError(f"there is no rule '{name}'", how=did_you_mean(name, [*sources, *RULES]))
    found = {}
    for name, (signal, low, high) in RULES.items():
        source = name.split(".")[0]
        if (name in knobs.use or source in knobs.use) and name not in knobs.skip and source not in knobs.skip:
            limits = knobs.limits.get(name, [low, high])
            if len(limits) != 2 or limits[0] > limits[1]:
                raise UserError(
                    f"limits.{name}={limits} does not fit", "the least and the most are needed", f"write {name}: [{low}, {high}]"
                )
            found[name] = (signal, limits[0], limits[1])
    return found


def judge(found: dict[str, np.ndarray], rules: dict[str, tuple[str, float, float]]) -> np.ndarray:
    """Which rules (columns) each document (rows) breaks."""
    if not rules:
        return np.zeros((len(found["words"]), 0), bool)
    return np.stack([(found[signal] < low) | (found[signal] > high) for signal, low, high in rules.values()], 1)


def clean(text: str) -> str:
    """The text with C4's bad lines and citation marks out. Applying it twice changes nothing more."""
    while True:
        page = Page([text])
        good = good_lines(page)
        spans = zip(page.lines.start[good], page.lines.end[good], strict=True)
        done = _CITATION.sub("", "\n".join(page.w.raw[a:b].tobytes().decode() for a, b in spans))
        if done == text:
            return text
        text = done


def rules(knobs: Knobs, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Write dataset.jsonl (what is kept, with its signals), and removed.jsonl: row, reason, flags."""
    active, source = chosen(knobs), Source(knobs.data)
    names = list(active)
    reasons: Counter[str] = Counter()
    flags: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    lost = 0
    with Sink(folder / "dataset.jsonl") as sink, open(folder / "removed.jsonl", "w", encoding="utf-8") as out:
        for batch in source:
            rows = batch.to_pylist()
            for row in rows:
                row[source.column] = normalise(row[source.column]) if knobs.normalise else row[source.column]
            found = signals(Page([row[source.column] for row in rows]))
            broken = judge(found, active)
            for i, row in enumerate(rows):
                mine = [names[j] for j in np.flatnonzero(broken[i])]
                if knobs.columns:
                    row |= {k: round(float(v[i]), 6) for k, v in found.items()}
                row |= {"reason": mine[0] if mine else "", "flags": mine}
                if mine:
                    reasons[mine[0]] += 1
                    flags.update(mine)
                    alone.update(mine if len(mine) == 1 else [])
                    if len(shown := examples.setdefault(mine[0], [])) < knobs.examples:
                        shown.append(" ".join(row[source.column][:160].split()))
                    out.write(json.dumps({"row": row["_row"], "reason": mine[0], "flags": mine}) + "\n")
                if mine and knobs.drop:
                    lost += 1
                    continue
                if knobs.lines:
                    row[source.column] = clean(row[source.column])
                sink.write([row], source.column)
    return {
        "documents": source.rows,
        "kept": sink.rows,
        "removed": lost,
        "first reasons": dict(reasons.most_common()),
        "all flags": dict(flags.most_common()),
        "flags that stand alone": dict(alone.most_common()),
        "examples": examples,
        **{f"dropped: {k}": v for k, v in source.dropped.items()},
    }


METHOD = rules
