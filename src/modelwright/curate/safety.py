"""Safety: lists of domains and words, classifiers as plug-ins, and personal data masked.

When to use it: after deduplication, on text from the web. It brings no lists of its own: yours are files, named in the knobs.

Paper: WanJuan-CC (arXiv 2402.19282), the fourth stage of its funnel, which removed 14.3 % of its documents. There is no official
code for it; the precedence of lists, the levels and the handling of short and compound words are those of llm-web-kit, by the same
laboratory.

- domains: a table `host,class`; classes white > black > silver > gray. The most specific entry decides, so that a white sub-domain
  beats a black parent. A document of a black domain is removed.
- words: a table `word,level`; levels L1 to L4 count 100, 10, 1 and 0.1 points per occurrence. English words of up to four letters are
  ignored, an English word counts only where no letter touches it, and a compound `a&&&b` only where all parts occur. Removed on L1 or
  L2; a silver domain's documents on L1 only, a white domain's never.
- classifiers: any sequence classifier of transformers, as `name: {model, label, limit}`. A long document is seen as its head and its
  last `tail` tokens. The score stands in the column `name_score` with six digits.
- personal data (e-mail, IBAN, card, global IP, phone) is masked, and never removes a document.
"""

import csv
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError, short
from modelwright.core.knobs import Data, knob
from modelwright.curate.kernels.documents import PLACE, Sink, Source
from modelwright.curate.kernels.lists import Domains, WordList, mask


@dataclass(frozen=True)
class Knobs:
    data: Data = knob(Data(), "documents: jsonl, jsonl.gz, parquet, csv, text, or a folder of them; every column is kept")
    url: str = knob("url", "column of addresses, for the domains")
    domains: str = knob("", "csv of host,class: white, black, silver or gray", path=True)
    words: str = knob("", "csv of word,level: L1 to L4", path=True)
    classifiers: dict[str, Any] = knob({}, "name: {model: PATH, label: NAME, limit: 0.5}")
    tail: int = knob(128, "tokens at the end of a long document that a classifier sees", low=0, high=510)
    mask: bool = knob(True, "mask personal data")


def safety(knobs: Knobs, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Write dataset.jsonl with `domain_class`, `word_score` and the classifiers' scores, and removed.jsonl: row, reason, flags."""
    domains = Domains(_table(knobs.domains, "host", "class")) if knobs.domains else None
    words = WordList(_table(knobs.words, "word", "level")) if knobs.words else None
    classifiers = {name: Classifier(name, settings, knobs.tail) for name, settings in knobs.classifiers.items()}
    source, reasons, masked = Source(knobs.data), Counter[str](), Counter[str]()
    with Sink(folder / "dataset.jsonl") as sink, open(folder / "removed.jsonl", "w", encoding="utf-8") as out:
        for batch in source:
            for row in batch.to_pylist():
                flags = judge(row, source.column, str(row.get(knobs.url) or ""), domains, words, classifiers)
                if flags:
                    reasons[flags[0]] += 1
                    out.write(json.dumps({"row": row[PLACE], "reason": flags[0], "flags": flags}) + "\n")
                    continue
                if knobs.mask:
                    row[source.column], counts = mask(row[source.column])
                    masked.update(counts)
                sink.write([row], source.column)
    return {
        "documents": source.rows,
        "kept": sink.rows,
        "removed": reasons.total(),
        "first reasons": dict(reasons.most_common()),
        "masked": dict(masked),
        "word list entries ignored": words.ignored if words else 0,
        **{f"dropped: {k}": v for k, v in source.dropped.items()},
    }


def judge(
    row: dict[str, Any], column: str, url: str, domains: Domains | None, words: WordList | None, classifiers: dict[str, "Classifier"]
) -> list[str]:
    """Put the scores into the row; returns all reasons to remove it, the first one first."""
    flags, kind = [], ""
    if domains:
        kind, entry = domains.of(url)
        row["domain_class"] = kind
        flags += [f"domain {entry}"] if kind == "black" else []
    if words:
        points, levels = words.score(row[column])
        row["word_score"] = round(points, 6)
        bad = {"white": set(), "silver": {"L1"}}.get(kind, {"L1", "L2"})
        flags += [f"words {level}" for level in levels if level in bad]
    for name, classifier in classifiers.items():
        row[f"{name}_score"] = value = round(classifier(row[column]), 6)
        flags += [name] if value > classifier.limit else []
    return flags


class Classifier:
    """A sequence classifier's probability of one label: softmax over several labels, sigmoid for one."""

    def __init__(self, name: str, settings: Any, tail: int):
        if not isinstance(settings, dict) or "model" not in settings:
            raise UserError(f"classifiers.{name} names no model", how="write {model: PATH, label: NAME, limit: 0.5}")
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(settings["model"])
            self.model = AutoModelForSequenceClassification.from_pretrained(settings["model"]).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"classifiers.{name}: {settings['model']} does not load", short(error), "give a sequence classifier") from None
        labels = {v: k for k, v in self.model.config.id2label.items()}
        label = settings.get("label", self.model.config.id2label[len(labels) - 1])
        if label not in labels:
            raise UserError(f"classifiers.{name} has no label '{label}'", f"the model knows {', '.join(map(str, labels))}")
        self.at, self.limit, self.tail = labels[label], float(settings.get("limit", 0.5)), tail
        self.longest = min(512, getattr(self.model.config, "max_position_embeddings", 512))

    def __call__(self, text: str) -> float:
        import torch

        ids = self.tokenizer(text, truncation=False, verbose=False)["input_ids"]  # its marks stand at both ends, which stay
        whole = torch.tensor([window(ids, self.longest, self.tail) or [self.tokenizer.pad_token_id or 0]])
        with torch.no_grad():
            logits = self.model(input_ids=whole).logits[0].double()
        return float(logits.sigmoid()[0] if len(logits) == 1 else logits.softmax(0)[self.at])


def window(ids: list[int], longest: int, tail: int) -> list[int]:
    """All ids, or the first ones and the last `tail`, `longest` in all."""
    if len(ids) <= longest:
        return ids
    tail = min(tail, longest)
    return ids[: longest - tail] + ids[len(ids) - tail :]


def _table(path: str, first: str, second: str) -> list[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read", short(error), f"give a csv with the columns {first},{second}") from None
    if not rows or first not in rows[0] or second not in rows[0]:
        raise UserError(f"{path} holds no list", f"the columns {first},{second} are needed", "write them in the first line")
    return [(r[first] or "", r[second] or "") for r in rows]


METHOD = safety
