"""The main text of web pages: WARC or HTML in, one row per page out.

When to use it: the first stage of a corpus from the web. It needs the extra `web`.

Paper: WanJuan-CC (arXiv 2402.19282), the first stage of its funnel, which kept 52.6 % of the pages: trafilatura and a language
detector on WARC responses. There is no official code.

1. Encoding: byte order mark, HTTP header, meta tag, then UTF-8 if the bytes are, then Windows-1252 (kernels/pages.py).
2. Text: a fast extractor over the lexbor parser; where it is unsure (it found little, or less than half of what stands in the page's
   paragraphs), trafilatura in its fast mode.
3. Language, where `languages` are given: py3langid, offline, with its confidence.

Every page that is left out is counted with its reason: damaged, too large, no page, without text, another language. The cascade is
ours; its limits were chosen on the benchmark that `bench` runs, which flatters it a little there.

bench: the folder of the article extraction benchmark (ground-truth.json, html/, output/): F1 of the published systems and of ours.
"""

import gzip
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.curate.kernels.archives import Archive, Page
from modelwright.curate.kernels.articles import score
from modelwright.curate.kernels.documents import Sink
from modelwright.curate.kernels.pages import decode, main_text, needed


@dataclass(frozen=True)
class Knobs:
    pages: str = knob("", "WARC or HTML file, plain or gz, or a folder of them", path=True)
    how: Literal["cascade", "fast", "trafilatura", "plain"] = knob(
        "cascade", "extractor; cascade: trafilatura where the fast one is unsure; plain: all text, by the standard library alone"
    )
    languages: list[str] = knob([], "languages kept, such as en; empty: all, and none is looked for")
    confidence: float = knob(0.5, "least confidence of the language", low=0, high=1)
    least: int = knob(1, "characters that a page must have", low=1)
    bench: str = knob("", "folder of the article extraction benchmark: score it instead", path=True)


def extract(knobs: Knobs, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Write dataset.jsonl: url, text, date, encoding, extractor, and language where it was asked for."""
    if knobs.bench:
        return benchmark(Path(knobs.bench), knobs.how, folder)
    if not knobs.pages:
        raise UserError("no pages were given", how="give pages: FILE or FOLDER")
    guess = _languages(knobs.languages)
    archive = Archive(knobs.pages)
    seen, reasons, by = 0, Counter[str](), Counter[str]()
    with Sink(folder / "dataset.jsonl") as sink:
        for page in archive:
            seen += 1
            html, encoding = decode(page.body, page.content_type)
            found = main_text(html, knobs.how)
            row: dict[str, Any] = {"url": page.url, "text": found.text, "date": page.date, "encoding": encoding, "extractor": found.by}
            if len(found.text) < knobs.least:
                reasons["nested too deep" if found.by == "none" else "without text"] += 1
                continue
            if guess:
                row["language"], row["language_confidence"] = guess(found.text)
                if row["language"] not in knobs.languages or row["language_confidence"] < knobs.confidence:
                    reasons["another language, or not sure"] += 1
                    continue
            by[found.by] += 1
            sink.write([row])
    if not sink.rows:
        lost = "; ".join(f"{n} {why}" for why, n in (archive.dropped + reasons).most_common(3))
        raise UserError(f"no page of {knobs.pages} has text to keep", lost or "it holds no pages", "check the files and the settings")
    counts = {"pages": seen, "kept": sink.rows, "characters": sink.characters, **{f"by {k}": v for k, v in by.items()}}
    return counts | {f"removed: {k}": v for k, v in reasons.items()} | {f"dropped: {k}": v for k, v in archive.dropped.items()}


def _languages(wanted: list[str]) -> Any:
    if not wanted:
        return None
    langid = needed("py3langid.langid")
    model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    if unknown := set(wanted) - set(model.labels):
        known = ", ".join(sorted(model.labels))
        raise UserError(f"the language '{min(unknown)}' is not known", f"known are {known}", "choose one of these")

    def guess(text: str) -> tuple[str, float]:
        language, confidence = model.classify(text[:20_000])
        return language, round(float(confidence), 4)

    return guess


def articles(file: Path) -> dict[str, str]:
    """The texts by page in one of the benchmark's files; some hold them below "output"."""
    whole = json.loads(_whole(file))
    return {k: v.get("articleBody", "") for k, v in whole.get("output", whole).items()}


def _whole(file: Path) -> bytes:
    return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()


def benchmark(root: Path, how: str, folder: Path) -> dict[str, Any]:
    """Scores of the recorded outputs and of ours, and pages per CPU second of ours and of trafilatura alone."""
    try:
        truth = articles(root / "ground-truth.json")
        recorded = {f.name.split(".")[0]: articles(f) for f in sorted((root / "output").glob("*.json*"))}
        pages = [Page(k, _whole(root / "html" / f"{k}.html.gz")) for k in truth]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{root} is not the benchmark's folder", str(error)[:200], "give one with ground-truth.json, html/ and output/"
        ) from None
    systems = {name: score(truth, out) for name, out in recorded.items()}
    for way in dict.fromkeys((how, "trafilatura")):
        texts = {p.url: main_text(decode(p.body)[0], way) for p in pages[:3]}  # imports and caches
        began = time.process_time()
        texts = {p.url: main_text(decode(p.body)[0], way) for p in pages}
        speed = len(pages) / (time.process_time() - began)
        careful = sum(t.by == "trafilatura" for t in texts.values())
        found = score(truth, {k: t.text for k, t in texts.items()})
        systems[f"ours, {way}" if way != "trafilatura" else "trafilatura here, fast"] = found | {"pages_per_s": speed, "careful": careful}
        if way == how:
            with Sink(folder / "dataset.jsonl") as sink:
                sink.write({"url": k, "text": t.text, "extractor": t.by} for k, t in texts.items())
    return {"pages": len(pages), "systems": systems}


METHOD = extract
