"""Mutated recipes, flags, checkpoints, data and scores: what may happen to any of them, and what may not.

Each `*_case` takes a source of random numbers, makes one input from a good one by a few mutations, gives it to the product and asserts:
exit code 0 or 2 and nothing but that; with 2 one sentence and nothing written; with 0 nothing lost without a count.

    python tests/hostile/fuzz.py 10000      # the long form, `make fuzz`; writes bench/results/fuzz.json
"""

import contextlib
import copy
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]
READY = sorted((ROOT / "src/modelwright/recipes").glob("*.yaml"))
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 1e308, -1e308, float("nan"), float("inf"), 10**30, "", " ", "a", "1", "01", "1e5", "1e999", "5,000",
    "nan", "\0", "a\nb", "\u202e", "\ud800", "é" * 300, "x" * 5000, "../../x", "~nosuchuser/x", "/proc/self/mem", "/dev/null", "C:\\x",
    "[/INST]", "[red]x[/red]", "<script>", "{{ x }}", "!!int x", "2020-13-45", [], {}, [[]], [None],
    {"a": 1}, {"": {}}, {"a": {"b": []}}, [1, "a", None],
]  # fmt: skip


class Broken(AssertionError):
    """What must not happen."""


# ---- calling the product -----------------------------------------------------------------------------------------------
def call(argv: list[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of a command, in this process."""
    from modelwright.cli import app as cli

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(argv)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    return code, out.getvalue(), err.getvalue()


def refused_or_fine(argv: list[str], folder: Path) -> int:
    """Run a command; Broken unless it is fine, or refuses in one sentence and writes nothing into `folder`."""
    before = {str(p) for p in folder.rglob("*")}
    code, out, err = call(argv)
    if code not in (0, 2):
        raise Broken(f"exit code {code} for {argv}: {err[-500:]}")
    if code == 2:
        if not err.strip() or err.strip().count("\n") > 1 or "Traceback" in err or len(err) > 1500:
            raise Broken(f"no one sentence for {argv}: {err[:800]!r}")
        if left := {str(p) for p in folder.rglob("*")} - before:
            raise Broken(f"{argv} was refused and left {sorted(left)[:3]}")
    elif "--json" in argv:
        json.loads(out, parse_constant=lambda word: _no_number(word, argv))
    return code


def _no_number(word: str, argv: list[str]) -> None:
    raise Broken(f"{word} in the output of {argv}")


# ---- mutations -----------------------------------------------------------------------------------------------------------
def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a nested one, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(p for k, v in inner for p in places(v, (*at, k)))]


def mutated(value: Any, rng: random.Random) -> Any:
    """A nested value with one to three changes: another value, a key more, less or renamed, an item twice."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        at = rng.choice(places(value))
        if not at:
            if isinstance(value, dict) and rng.random() < 0.7:
                value[rng.choice(["x", "", "steps", "seed", "0", "é"])] = rng.choice(ODD)
            continue
        holder = value
        for k in at[:-1]:
            holder = holder[k]
        how = rng.random()
        if how < 0.6:
            holder[at[-1]] = copy.deepcopy(rng.choice(ODD))
        elif how < 0.75:
            del holder[at[-1]]
        elif isinstance(holder, dict):
            holder[rng.choice(["x", str(at[-1]).upper(), f"{at[-1]}s", " "])] = holder.pop(at[-1])
        else:
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[at[-1]]))
    return value


def scrambled(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few changed, cut, doubled or put in."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(made) + 1), rng.choice([1, 1, 2, 8, 100])
        how = rng.random()
        if how < 0.4:
            made[at : at + n] = rng.randbytes(len(made[at : at + n]))
        elif how < 0.6:
            del made[at : at + n]
        elif how < 0.8:
            made[at:at] = rng.choice([b"\0", b"\xff", b"\n", b'"', b"{", b"[", b",", b"\xef\xbb\xbf", b"\r", "\u2028".encode()]) * n
        elif how < 0.9:
            del made[at:]
        else:
            made[at:at] = made[at : at + n]
    return bytes(made)


# ---- recipes and flags ----------------------------------------------------------------------------------------------------
def recipe_case(rng: random.Random, folder: Path) -> int:
    """A ready recipe, changed in its structure or its text."""
    import yaml

    text = rng.choice(READY).read_text()
    file = folder / "r.yaml"
    if rng.random() < 0.7:
        try:
            text = yaml.safe_dump(mutated(yaml.safe_load(text), rng), allow_unicode=rng.random() < 0.5)
        except (UnicodeEncodeError, yaml.YAMLError):
            return recipe_case(rng, folder)
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
    else:
        file.write_bytes(scrambled(text.encode(), rng))
    return refused_or_fine(["check", str(file), *(["--json"] if rng.random() < 0.5 else [])], folder)


def flag_case(rng: random.Random, folder: Path) -> int:
    """A command of any method with odd flags; its base is missing, so that nothing is computed."""
    from modelwright import registry
    from modelwright.core.knobs import flat

    e = rng.choice([e for e in registry.METHODS if "checkpoint" in e.takes])
    argv = [*e.name.split("."), "--base", str(folder / "none"), "--to", str(folder / "out")]
    names = [n for n, _ in flat(registry.knobs(e))]
    for name in rng.sample(names, min(len(names), rng.randint(1, 3))):
        value = rng.choice(ODD)
        argv += ["--" + name.replace("_", "-"), value if isinstance(value, str) else json.dumps(value)]
    if any("\0" in a for a in argv):  # no shell can pass it
        argv = [a.replace("\0", "") for a in argv]
    code = refused_or_fine(argv, folder)
    if code == 0:
        raise Broken(f"{argv} is fine without a base")
    return code


# ---- checkpoints -----------------------------------------------------------------------------------------------------------
@cache
def _checkpoint() -> Path:
    from families import model_of
    from modelwright.core.model.checkpoint import SEEDLING, Checkpoint

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    model_of("llama").save_pretrained(folder)
    Checkpoint(SEEDLING).tokenizer().save_pretrained(folder)
    return folder


def checkpoint_case(rng: random.Random, folder: Path) -> int:
    """A small checkpoint with a damaged or strange file; what loads must hold the weights that its file holds."""
    import torch
    from safetensors.torch import load_file

    from modelwright.core.errors import UserError
    from modelwright.core.model.checkpoint import Checkpoint

    base = folder / "base"
    shutil.copytree(_checkpoint(), base)
    file = base / rng.choice(
        ["config.json", "config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json", "generation_config.json"]
    )
    if file.suffix == ".json" and rng.random() < 0.7 and file.stat().st_size < 20_000:
        file.write_text(json.dumps(mutated(json.loads(file.read_text()), rng)), encoding="utf-8", errors="surrogatepass")
    elif file.suffix == ".safetensors" and rng.random() < 0.7:
        data = file.read_bytes()
        n = int.from_bytes(data[:8], "little")
        header = scrambled(data[8 : 8 + n], rng)
        keep = rng.random() < 0.8  # else the length says something else than there is
        file.write_bytes((len(header) if keep else n).to_bytes(8, "little") + header + data[8 + n :])
    else:
        file.write_bytes(scrambled(file.read_bytes(), rng))
    try:
        source = Checkpoint(base)
        model = source.model()
        source.tokenizer()
        _ = source.lineage
    except UserError as error:
        if len(str(error)) > 1500 or "\n" in str(error):
            raise Broken(f"no one sentence: {error!s:.300}") from None
        return 2
    stored = load_file(base / "model.safetensors")
    held = dict(model.named_parameters())
    wrong = [n for n, w in stored.items() if n in held and not torch.equal(held[n].data, w.to(held[n].dtype))]
    if wrong:
        raise Broken(f"{wrong[0]} is not what {file.name} holds")
    return 0


# ---- data ---------------------------------------------------------------------------------------------------------------------
GOOD: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"One {w}, two {w}s."} for w in ("apple", "boat", "cloud", "drum", "egg", "fox")],
    "messages": [
        {"messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": f"it is {i}"}]} for i in range(6)
    ],
    "pairs": [{"prompt": f"say {i}", "completion": f" {i}"} for i in range(6)],
    "alpaca": [{"instruction": f"say {i}", "input": "", "output": f"{i}"} for i in range(6)],
    "ids": [{"input_ids": [3, 4, 5, i + 6]} for i in range(6)],
}


@cache
def _tokenizer() -> Any:
    from modelwright.core.data.chats import with_template
    from modelwright.core.model.checkpoint import SEEDLING, Checkpoint

    return with_template(Checkpoint(SEEDLING).tokenizer(), "chatml")


def data_case(rng: random.Random, folder: Path) -> int:
    """Rows of a known layout, mutated; every row is used or counted."""
    from modelwright.core.data.make import make_rows
    from modelwright.core.errors import UserError
    from modelwright.core.knobs import Data

    rows = mutated(GOOD[rng.choice(list(GOOD))], rng)
    raw, file = rng.random() < 0.3, folder / rng.choice(["d.jsonl", "d.json", "d.csv", "d.txt"])
    file.write_bytes(_as_file(rows, file.suffix))
    if raw:
        file.write_bytes(scrambled(file.read_bytes(), rng))
    try:
        made = make_rows(Data(path=str(file), refused=rng.choice(["stop", "drop"])), _tokenizer(), 4096, 64)
    except UserError as error:
        if len(str(error)) > 1500 or "\n" in str(error):
            raise Broken(f"no one sentence: {error!s:.300}") from None
        return 2
    if not len(made) or not made.tokens:
        raise Broken(f"rows without a token from {file.read_bytes()[:200]!r}")
    if file.suffix == ".jsonl" and not raw and isinstance(rows, list):
        lines = len(rows)
        told = made.facts.get("documents", 0) + sum(made.facts.get(k, 0) for k in ("rows without text", "rows refused"))
        if told != lines:
            raise Broken(f"{lines} rows, and {told} are told: {made.facts}")
    return 0


def _as_file(rows: Any, kind: str) -> bytes:
    if kind == ".jsonl" and isinstance(rows, list):
        return "".join(json.dumps(r) + "\n" for r in rows).encode()
    if kind == ".csv" and isinstance(rows, list) and rows and isinstance(rows[0], dict):
        lines = [",".join(map(str, rows[0]))]
        lines += [",".join(f'"{v}"' for v in r.values()) for r in rows if isinstance(r, dict)]
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    return json.dumps(rows).encode()


# ---- scores ----------------------------------------------------------------------------------------------------------------------
@cache
def _scores() -> dict[str, tuple[str, dict[str, Any], list[str]]]:
    from modelwright.testing import made

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    return {
        "calibrate": ("scores", made("pairs", folder), ["reward", "calibrate", "--frac", "0.5"]),
        "bench": ("scores", made("pairs", folder), ["reward", "bench", "--suite", "rewardbench"]),
        "select": ("chains", made("chains", folder), ["judge", "select", "--kind", "letters", "--n", "8"]),
        "continual": ("matrix", made("matrix", folder), ["judge", "continual"]),
        "law": ("losses", made("losses", folder), ["inspect", "scaling-law"]),
    }


def score_case(rng: random.Random, folder: Path) -> int:
    """Recorded scores, chains, matrices or losses, mutated."""
    name, settings, argv = rng.choice(list(_scores().values()))
    source = Path(settings[name])
    file = folder / source.name
    if rng.random() < 0.7:
        lines = source.suffix == ".jsonl"
        text = source.read_text()
        value = mutated([json.loads(line) for line in text.splitlines()] if lines else json.loads(text), rng)
        file.write_bytes(
            "".join(json.dumps(r) + "\n" for r in value).encode() if lines and isinstance(value, list) else json.dumps(value).encode()
        )
    else:
        file.write_bytes(scrambled(source.read_bytes(), rng))
    to = ["--to", str(folder / "out")] if "calibrate" in argv else []
    return refused_or_fine([*argv, f"--{name}", str(file), *to, "--json"], folder)


CASES: dict[str, Callable[[random.Random, Path], int]] = {
    "recipes": recipe_case,
    "flags": flag_case,
    "checkpoints": checkpoint_case,
    "data": data_case,
    "scores": score_case,
}


def attempt(kind: str, seed: int) -> int:
    """One case in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    here = os.getcwd()
    os.chdir(folder)
    try:
        return CASES[kind](random.Random(f"{kind} {seed}"), folder)  # noqa: S311
    finally:
        os.chdir(here)
        shutil.rmtree(folder, ignore_errors=True)


def main(total: int) -> None:
    sys.path[:0] = [str(ROOT / "bench")]
    from common import save

    shares = {"recipes": 0.4, "flags": 0.2, "data": 0.2, "scores": 0.1, "checkpoints": 0.1}
    rows, faults = [], []
    for kind, share in shares.items():
        codes: Counter[int] = Counter()
        slow, broken = 0.0, 0
        for seed in range(round(total * share)):
            began = time.perf_counter()
            try:
                codes[attempt(kind, seed)] += 1
            except Exception as error:  # noqa: BLE001 - a traceback is what is looked for
                broken += 1
                faults.append(f"{kind} {seed}: {type(error).__name__}: {str(error)[:200]}")
                print(faults[-1], file=sys.stderr, flush=True)
            slow = max(slow, time.perf_counter() - began)
        rows.append([kind, sum(codes.values()) + broken, codes[0], codes[2], broken, round(slow, 2)])
    save(
        "fuzz",
        claim="Mutated recipes, flags, checkpoints, data and scores: no traceback, no hang over 5 s, no silent change, nothing written",
        outcome=f"{sum(r[1] for r in rows)} cases, {sum(r[4] for r in rows)} broken promises; the longest took {max(r[5] for r in rows)} s",
        columns=["what", "cases", "fine", "refused", "broken", "longest, s"],
        rows=rows,
        notes=faults[:20],
        command=f"python tests/hostile/fuzz.py {total}",
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
