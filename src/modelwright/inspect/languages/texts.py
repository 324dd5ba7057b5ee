"""What the report reads: parallel files, pairs of sentences, sets of words; each fault in one sentence."""

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from modelwright.core.data.tables import records
from modelwright.core.errors import UserError

_NEEDS = ("targ1", "targ2", "attr1", "attr2")


def stems(folder: Path) -> dict[str, dict[str, Path]]:
    """STEM -> language -> file, for files STEM.LANGUAGE, STEM.LANGUAGE.gz and STEM.LANGUAGE.txt of a folder."""
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}", "parallel text is a folder of files such as test.en and test.de", "check the path")
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for file in sorted(folder.iterdir()):
        name = file.name.removesuffix(".gz").removesuffix(".txt")
        stem, _, language = name.rpartition(".")
        if file.is_file() and stem and language.isalpha() and 2 <= len(language) <= 3 and language != "md":
            found[stem][language] = file
    return {stem: files for stem, files in found.items() if len(files) > 1}


def lines(file: Path) -> list[str]:
    """The lines of a text file, plain or gz. Raises UserError for one that is no UTF-8 text."""
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as text:
            return [line.rstrip("\n") for line in text]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read", str(error)[:100], "repair it, or leave it out") from None


def parallel(folder: Path, split: str, pivot: str, limit: int) -> tuple[str, dict[str, list[str]]]:
    """(split, language -> sentences): the split named, else the one with the most languages and the fewest sentences.

    Raises UserError where there is none with the pivot, where files differ in length, and for a language without words.
    """
    found = stems(folder)
    usable = {stem: files for stem, files in found.items() if pivot in files}
    if split and split not in usable:
        raise UserError(
            f"{folder} has no split '{split}' with {pivot}", f"it has {', '.join(usable) or 'none'}", "check --split and --pivot"
        )
    if not usable:
        raise UserError(f"{folder} holds no parallel text with {pivot}", "files such as test.en and test.de are read", "check --pivot")
    stem = split or min(usable, key=lambda s: (-len(usable[s]), usable[s][pivot].stat().st_size, s))
    texts = {language: lines(file) for language, file in usable[stem].items()}
    for language, of in texts.items():
        if len(of) != len(texts[pivot]):
            what = f"{usable[stem][language]} has {len(of):,} lines and {usable[stem][pivot]} {len(texts[pivot]):,}"
            raise UserError(what, "line i of each is the same sentence", "align them again")
        if not any(any(c.isalnum() for c in line) for line in of):
            raise UserError(f"{usable[stem][language]} has no words", "nothing can be measured on it", "leave the language out")
    whole = [i for i, row in enumerate(zip(*texts.values(), strict=True)) if all(t.strip() for t in row)][:limit]
    if len(whole) < 20:
        raise UserError(f"{stem} has {len(whole)} sentences in all languages", "at least 20 are needed", "give a longer split")
    return stem, {language: [of[i] for i in whole] for language, of in texts.items()}


def crows_pairs(path: Path) -> list[dict[str, Any]]:
    """The pairs of CrowS-Pairs: sent_more, sent_less, stereo_antistereo, bias_type; a file, or a folder that holds one csv."""
    file = next(iter(sorted(path.glob("*.csv"))), path) if path.is_dir() else path
    rows = list(records(file))
    for i, row in enumerate(rows, 1):
        for name in ("sent_more", "sent_less", "stereo_antistereo", "bias_type"):
            if not isinstance(row.get(name), str):
                raise UserError(f"row {i} of {file} has no '{name}'", "a pair has two sentences, a direction and a type", "check the file")
    return rows


def word_sets(path: Path) -> dict[str, dict[str, list[str]]]:
    """Test -> targ1, targ2, attr1, attr2 -> texts, from the json files of a folder, or one."""
    files = sorted(path.glob("*.json*")) if path.is_dir() else [path]
    found = {}
    for file in files:
        try:
            of = json.loads(file.read_text(encoding="utf-8"))
            found[file.name.partition(".")[0]] = {name: [str(t) for t in of[name]["examples"]] for name in _NEEDS}
        except (OSError, ValueError, LookupError, TypeError):
            raise UserError(f"{file} is no WEAT set", f"it needs {', '.join(_NEEDS)} with examples", "check the file") from None
    if not found:
        raise UserError(f"no WEAT sets in {path}", "json files are read", "check the path")
    return found


def stereo_triples(file: Path) -> list[tuple[str, str, str]]:
    """(stereotype, its opposite, meaningless) of StereoSet's sentences."""
    try:
        items = json.loads(file.read_text(encoding="utf-8"))["data"]["intrasentence"]
        found = [{s["gold_label"]: str(s["sentence"]) for s in item["sentences"]} for item in items]
        return [(f["stereotype"], f["anti-stereotype"], f["unrelated"]) for f in found]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{file} is no StereoSet", "it needs data.intrasentence with three labelled sentences each", "check it") from None
