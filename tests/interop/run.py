"""`make interop`: every result in every engine, asked there and compared with current transformers. Writes docs/interop.json and .md.

    python tests/interop/run.py [--only PATTERN] [--engine vllm]      # part of it: prints, writes no docs

An engine gives the same when its greedy text is equal over 40 tokens on every prompt and the log-probabilities of these tokens
agree to 1e-3; a chat must also end at its end token. A prompt on which the best two tokens of the reference are nearer than 1e-3
is left out, since rounding decides there; two prompts at least must remain. An engine that cannot start here is skipped, and the
reason stands in the table. What is known to differ is listed in KNOWN; anything else that differs, and anything in KNOWN that
no longer does, fails.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from cases import PLUGIN, Case, cases, make, source  # noqa: E402
from environments import HOME, NAMES, Absent, python_of  # noqa: E402
from known import KNOWN  # noqa: E402

from modelwright.core.files import fingerprint  # noqa: E402

WORK = HOME / "work"
NEAR = 1e-3
REQUEST: dict[str, Any] = {
    "n": 40,
    "prompts": [
        "import os is a module that",
        "The quick brown fox jumps over the lazy dog and then, in the end, it sees",
        "def read(self, size=-1):\n    if size < 0 and self.closed:\n        raise ValueError('the file is closed')",
        "Numbers such as 1, 2 and 31 are written in words when",
        "A function without a return statement gives None. " * 6,
    ],
    "chats": [[{"role": "user", "content": f"what is {i}"}] for i in (3, 12)],
}
ENGINES = ("transformers-4", "vllm")
PEFT = ("reference", *ENGINES)  # an adapter is also asked in current transformers with stock PEFT
Asked = tuple[Path, Path | None]  # a folder, and the adapter on it


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", default="", help="only cases whose name this regular expression finds")
    options.add_argument("--engine", choices=ENGINES, help="only this engine")
    given = options.parse_args()
    torch.set_num_threads(1)
    chosen = [c for c in cases() if re.search(given.only, c.name)]
    made: dict[Case, Asked] = {}
    rows: list[dict[str, Any]] = []
    for c in chosen:
        try:
            made[c] = make(c, WORK), None
            if c.method == "tune.lora":
                made[unmerged(c)] = Path(str(source(c.source, WORK))), make(c, WORK) / "steps" / "0-tune.lora" / "adapter"
        except Exception as error:  # a method that fails here is a result of this test
            rows.append({"method": c.method, "source": _source(c), "engine": "", "verdict": "not made", "why": f"{error}"[:300]})
    expected = ask("reference", Path(sys.executable), made)
    for engine in [given.engine] if given.engine else ENGINES:
        try:
            answers: Any = ask(engine, python_of(engine), made)
        except Absent as reason:
            answers = str(reason)
        rows += [row(c, engine, expected[merged(c)], answers if isinstance(answers, str) else answers[c]) for c in made]
    rows += [row(c, "reference", expected[merged(c)], expected[c]) for c in made if c != merged(c)]
    for r in rows:
        print(f"{r['verdict']:9} {r['engine'] or 'no engine':14} {r['method']} from {r['source']}  {r.get('why', '')}")
    if not given.only and not given.engine:
        write(rows)
    bad = [r for r in rows if r["verdict"] in ("differs", "error", "not made", "stale")]
    print(f"{len(rows)} results: {', '.join(f'{n} {v}' for v, n in _count(rows).items())}")
    return 1 if bad else 0


def unmerged(c: Case) -> Case:
    """The case of a tuned adapter that is put on its base by the engine."""
    return replace(c, knobs=c.knobs | {"as": "adapter on the base"})


def merged(c: Case) -> Case:
    """The case whose answers an adapter on its base must give."""
    return replace(c, knobs={k: v for k, v in c.knobs.items() if k != "as"})


def _source(c: Case) -> str:
    more = ", ".join(f"{k} {v}" for k, v in c.knobs.items())
    return (c.source or "nothing") + (f" ({more})" if more else "")


def _count(rows: list[dict[str, Any]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for r in rows:
        found[r["verdict"]] = found.get(r["verdict"], 0) + 1
    return found


# ---- asking ----------------------------------------------------------------------------------------------------------
def ask(engine: str, python: Path, made: dict[Case, Asked]) -> dict[Case, dict[str, Any]]:
    """Each case's answers by an engine. Kept on disk by what was asked of which bytes."""
    kept = WORK / "answers" / engine
    kept.mkdir(parents=True, exist_ok=True)
    files = {c: kept / f"{c.folder}-{_key(asked)}.json" for c, asked in made.items()}
    for ours in (False, True):
        todo = {c: asked for c, asked in made.items() if not _answered(files[c]) and _is_ours(asked[0]) == ours}
        if ours and engine == "transformers-4":
            for c in todo:
                files[c].write_text(json.dumps({"error": "our classes need transformers 5"}))
        else:
            for c, answer in _asked(engine, python, todo, ours):
                files[c].write_text(json.dumps(answer))
    return {c: json.loads(f.read_text()) for c, f in files.items()}


def _answered(file: Path) -> bool:
    return file.exists() and "error" not in json.loads(file.read_text())  # what failed is asked again


def _asked(engine: str, python: Path, todo: dict[Case, Asked], ours: bool) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Cases and answers as they come; where the process dies, it is started again after the culprit."""
    left, log = list(todo), WORK / f"{engine}.log"
    while left:
        request = REQUEST | {"asked": [[str(p) if p else None for p in todo[c]] for c in left], "ours": ours}
        script, done, begun = HERE / f"ask_{'vllm' if engine == 'vllm' else 'transformers'}.py", 0, False
        with open(log, "a") as errors:
            process = subprocess.Popen([str(python), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            for line in process.stdout:
                answer = json.loads(line)
                begun = "begins" in answer
                if not begun:
                    yield left[done], answer
                    done += 1
            process.wait()
        if begun:
            yield left[done], {"error": f"the process ended with code {process.returncode}; see {log}"}
            done += 1
        elif done < len(left):
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or [""]
            raise Absent(f"{NAMES.get(engine, engine)} does not start here: {last[0]}")
        left = left[done:]


def _is_ours(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["model_type"].startswith(("rmoe", "hyper_moe", "lora_moe"))


def _key(asked: Asked) -> str:
    """What an answer depends on: the files of the folder and of the adapter, the question, and how it is asked."""
    kinds, ours = (".json", ".safetensors", ".jinja"), ("modelwright.json", "report.json")
    files = [f for place in asked if place for f in sorted(place.iterdir()) if f.suffix in kinds and f.name not in ours]
    files += sorted(PLUGIN.parent.glob("*.py")) if _is_ours(asked[0]) else []
    question = zlib.crc32(json.dumps(REQUEST).encode())
    return f"{fingerprint(*files, *sorted(HERE.glob('ask_*.py')))[-16:]}-{question:08x}"


# ---- comparing -------------------------------------------------------------------------------------------------------
def row(c: Case, engine: str, expected: dict[str, Any], answer: dict[str, Any] | str) -> dict[str, Any]:
    """One line of the table."""
    found: dict[str, Any] = {"method": c.method, "source": _source(c), "engine": engine}
    if isinstance(answer, str):
        return found | {"verdict": "skipped", "why": answer}
    if "error" in expected:
        return found | {"verdict": "error", "why": f"the reference: {expected['error']}"}
    verdict, why, far = compare(expected, answer)
    reason = next((text for matches, text in KNOWN if matches(engine, c, expected["class"])), None)
    if reason:
        verdict, why = ("stale", f"known to differ, and does not: {reason}") if verdict == "equal" else ("known", f"{reason} [{why}]")
    return found | {"class": expected["class"], "verdict": verdict, "why": why, "max_abs_dlogprob": far}


def compare(expected: dict[str, Any], answer: dict[str, Any]) -> tuple[str, str, float | None]:
    """equal, differs or error; why; and the largest difference of a log-probability."""
    if "error" in answer:
        return "error", answer["error"], None
    far, compared = 0.0, 0
    for kind in ("texts", "chats"):
        if len(expected[kind]) != len(answer[kind]):
            return "differs", f"{len(answer[kind])} {kind} instead of {len(expected[kind])}", None
        for ours, theirs in zip(expected[kind], answer[kind], strict=True):
            if min(ours["margin"]) < NEAR:
                continue
            compared += kind == "texts"
            if ours["begin"] != theirs["begin"]:
                return "differs", f"a prompt of {ours['begin']} tokens is read as {theirs['begin']}", None
            if ours["ids"] != theirs["ids"]:
                at = next((i for i, (a, b) in enumerate(zip(ours["ids"], theirs["ids"], strict=False)) if a != b), len(theirs["ids"]))
                return "differs", f"another token at place {at + 1} of {len(ours['ids'])}", None
            far = max([far, *(abs(a - b) for a, b in zip(ours["logprobs"], theirs["logprobs"], strict=True))])
            if kind == "chats" and (ours["ended"] != "stop" or theirs["ended"] != "stop"):
                return "differs", f"a chat ends by {theirs['ended']} (reference: {ours['ended']})", far
    if compared < 2:
        return "error", f"only {compared} prompts are clear of ties", far
    if far > NEAR:
        return "differs", f"log-probabilities are off by {far:.1e}", far
    return "equal", "", far


# ---- writing ---------------------------------------------------------------------------------------------------------
def write(rows: list[dict[str, Any]]) -> None:
    """docs/interop.json and docs/interop.md."""
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    names = NAMES | {"reference": f"transformers {_version()}"}
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "interop.json").write_text(json.dumps({"date": day, "engines": names, "rows": rows}, indent=1) + "\n")
    (ROOT / "docs" / "interop.md").write_text(page(day, names, rows))


def _version() -> str:
    import transformers

    return transformers.__version__


def page(day: str, names: dict[str, str], rows: list[dict[str, Any]]) -> str:
    """The table for people: what differs first, then every case."""
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for r in rows:
        cells.setdefault((r["method"], r["source"]), {})[r["engine"]] = r
    head = [names[e] for e in PEFT]
    lines = ["# Results in other engines", "", f"Made by `make interop` on {day}; reference: {names['reference']}. Do not edit.", ""]
    lines += [(__doc__ or "").split("\n\n")[2].replace("\n", " "), ""]
    seen: dict[str, list[str]] = {}
    for r in rows:
        if r["verdict"] != "equal":
            engine = names.get(r["engine"], "making it")
            seen.setdefault(f"**{r['verdict']}** {engine}: {r['why']}", []).append(f"{r['method']} from {r['source']}")
    lines += ["## What is not equal", ""]
    lines += [f"- {what} ({len(which)}: {'; '.join(which[:4])}{' ...' if len(which) > 4 else ''})" for what, which in seen.items()]
    lines += ["Nothing."] if not seen else []
    lines += ["", "## Every case", "", "The number is the largest difference of a log-probability.", ""]
    lines += [f"| method | source | loads as | {' | '.join(head)} |", "|---|---|---|" + "---|" * len(head)]
    for (method, origin), by in cells.items():
        cls = next((r["class"] for r in by.values() if r.get("class")), "")
        lines.append(f"| {method} | {origin} | {cls} | " + " | ".join(_cell(e, by.get(e) or by.get("")) for e in PEFT) + " |")
    return "\n".join(lines) + "\n"


def _cell(engine: str, r: dict[str, Any] | None) -> str:
    if r is None:
        return "reference" if engine == "reference" else ""
    return f"equal {r['max_abs_dlogprob']:.0e}" if r["verdict"] == "equal" else f"**{r['verdict']}**"


if __name__ == "__main__":
    sys.exit(main())
