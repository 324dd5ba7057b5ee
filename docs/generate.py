"""Make PROOFS.md and the generated pages of docs/ from docstrings, knobs, recipes, tests, benchmark results and docs/verdicts.yaml.

`make docs` writes them; tests/docs/test_pages.py holds that they are current. Imports neither torch nor transformers.
"""

import ast
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_origin

import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "docs")]

from markdown_of import cell, docstring, table  # noqa: E402 - beside this file

from matrix import ROWS  # noqa: E402
from modelwright import registry  # noqa: E402
from modelwright.core.knobs import Tune, default_of, flat, type_name  # noqa: E402
from modelwright.runner import recipe as recipes  # noqa: E402

SOURCE = ROOT / "src" / "modelwright"
VERDICTS = ("not held", "not shown at this scale", "held")  # a reader meets what did not hold first
HUB = {  # models on the hub for each kind of base that a method takes, small where there are small ones: for texts, for chats
    "dense": ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "granitemoe": ("ibm-granite/granite-3.0-1b-a400m-base", "ibm-granite/granite-3.0-1b-a400m-instruct"),
    "mixtral": ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
}
SHARED_KNOBS = {f.name for f in fields(Tune)}


# ---- what there is ---------------------------------------------------------------------------------------------------
@cache
def results() -> dict[str, dict[str, Any]]:
    """The benchmark results by name."""
    return {f.stem: json.loads(f.read_text()) for f in sorted((ROOT / "bench" / "results").glob("*.json"))}


@cache
def verdicts() -> dict[str, Any]:
    """docs/verdicts.yaml; the claims of a method in the order in which they are shown."""
    found = recipes.read_yaml((ROOT / "docs" / "verdicts.yaml").read_text(), "docs/verdicts.yaml")  # a name twice would hide claims
    for claims in found["claims"].values():
        claims.sort(key=lambda c: VERDICTS.index(c["verdict"]))
    return found


def owner(result: str) -> str:
    """The method on whose page the table of a result stands: the first that makes a claim from it, else the kernel."""
    return next((m for m, claims in verdicts()["claims"].items() if any(c["proof"] == result for c in claims)), "kernel")


def hub_base(e: registry.Entry) -> str:
    """A hub model that the method takes, or '' where it takes none."""
    if "checkpoint" not in (*e.takes, *e.may_take):
        return ""
    kinds, data = ROWS[e.name].families, ready(e)[1].get("data")
    chats = isinstance(data, dict) and data.get("column") == "messages"
    return HUB[next((k for k in ("granitemoe", "mixtral") if k in kinds and not {"llama", "seedling"} & set(kinds)), "dense")][chats]


def ready(e: registry.Entry) -> tuple[str, Any]:
    """The ready recipe of a method and its settings there: the one of its name, else the first with it."""
    own = e.name.split(".")[1].replace("_", "-")
    names = sorted(recipes.ready_recipes(), key=lambda n: (n != own, n))
    for name in names:
        for word, settings in steps(name):
            if word == e.name:
                return name, settings
    return "", {}


def steps(recipe: str) -> list[tuple[str, Any]]:
    """The methods of a ready recipe, each with its settings as they are written."""
    read = yaml.safe_load(recipes.ready_recipes()[recipe].read_text())["steps"]
    return [("tune.mix" if word == "tune" else word, settings) for step in read for word, settings in step.items()]


# ---- commands --------------------------------------------------------------------------------------------------------
def command(e: registry.Entry) -> list[str]:
    """The command line of the method's ready recipe on a hub model, as words."""
    words = ["modelwright", *e.name.replace("_", "-").split(".")]
    flags = list(_flags(registry.knobs(e), ready(e)[1], ""))
    if base := hub_base(e):
        flags = ["--base", base, *flags]
    return [*words, *flags, "--to", f"out/{e.name.split('.')[1]}"]


def _flags(cls: Any, settings: dict[str, Any], prefix: str) -> Iterator[str]:
    for f in fields(cls):
        if f.name not in settings:
            if default_of(f) is MISSING and f.metadata.get("argument"):
                yield f.name.upper()
            continue
        value, flag = settings[f.name], f"{prefix}{f.name}".replace("_", "-")
        if is_dataclass(f.type):
            inner = {fields(f.type)[0].name: value} if isinstance(value, str) else value
            yield from _flags(f.type, inner, f"{prefix}{f.name}.")
        elif f.metadata.get("argument"):
            yield str(value)
        elif f.type is bool:
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            for one in value if get_origin(f.type) is list else [value]:
                yield from (f"--{flag.removesuffix('.path')}", _text(one))


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def written(words: list[str], width: int = 90) -> str:
    """A command for a shell, broken before flags where it is long."""
    lines = [" ".join(map(shlex.quote, words[:3]))]
    rest, i = [], 3
    while i < len(words):
        n = 2 if words[i].startswith("--") and i + 1 < len(words) and not words[i + 1].startswith("--") else 1
        rest.append(" ".join(map(shlex.quote, words[i : i + n])))
        i += n
    for part in rest:
        if len(lines[-1]) + len(part) + 1 > width:
            lines.append("    " + part)
        else:
            lines[-1] += " " + part
    return " \\\n".join(lines)


# ---- pages -----------------------------------------------------------------------------------------------------------
def method_page(e: registry.Entry) -> str:
    parts = docstring(registry.doc(e))
    out = [f"# `{e.name}`", "", *parts["intro"], *_facts(e), *_verdict_lines(e.name)]
    out += _section("What for", _said(parts["what for"])) + _section("The method", parts["method"])
    for module, text in _referred(e):
        out += _section(f"More: `{module}`", [line for lines in docstring(text).values() for line in lines])
    out += _how_to_run(e)
    out += _section("What the official code does", parts["official"]) + _section("What is ours", parts["ours"])
    return _lines(out + _outcome(e.name) + _proofs(ROWS[e.name].proofs) + _knobs(e))


def _facts(e: registry.Entry) -> list[str]:
    papers = ", ".join(f"[{w}](https://arxiv.org/abs/{w})" if w[:4].isdigit() else w for w in e.paper.replace(",", " ").split())
    paper = papers if any(w[:4].isdigit() for w in e.paper.split()) else e.paper
    rows = [("paper", paper), ("takes", ", ".join([*e.takes, *(f"{a} (optional)" for a in e.may_take)]) or "files that it names")]
    rows += [("gives", ", ".join(e.gives) or "measurements and a report")]
    rows += [("the result loads in", e.loads_in)] if e.loads_in else []
    rows += [("source", f"`{e.file.relative_to(ROOT)}`")]
    return ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows), ""]


def _verdict_lines(name: str) -> list[str]:
    claims = verdicts()["claims"].get(name)
    if not claims:
        return ["**No claim is measured** for this method; what holds exactly is tested, see Proofs below.", ""]
    return ["## Verdict", "", *(f"- **{c['verdict'].capitalize()}**: {c['claim']}. *{c['found']}.*" for c in claims), ""]


def _said(lines: list[str]) -> list[str]:
    """The lines of a section without the marker that opened it, which its title repeats."""
    first = re.sub(r"^(What for|When to use it): (\w)", lambda m: m[2].upper(), lines[0]) if lines else ""
    return [first, *lines[1:]] if lines else []


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "", *lines] if lines else []


def _referred(e: registry.Entry) -> Iterator[tuple[str, str]]:
    """Modules to which the docstring sends the reader for more, with their docstrings; not the kernel, not other methods."""
    doc = registry.doc(e).replace("/", ".").replace(".py", "")
    for file in sorted(SOURCE.rglob("*.py")):
        name = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
        top = name.split(".")[0]
        if name in doc and "." in name and name != e.name and top != "core" and name not in {m.name for m in registry.METHODS}:
            yield f"modelwright.{name}", ast.get_docstring(ast.parse(file.read_text())) or ""


def _how_to_run(e: registry.Entry) -> list[str]:
    name, _ = ready(e)
    out = ["## How to run it", ""]
    if base := hub_base(e):
        embedded = ", or `seedling`, the embedded small model," if base in HUB["dense"] else ""
        out += [f"On a model of the hub; a folder of your own{embedded} does as well:", ""]
    out += ["```sh", written(command(e)), "```", ""]
    if not name:
        return out
    first = hub_base(registry.entry(steps(name)[0][0]))
    set_base = f" --set base={first}" if first else ""
    text = recipes.ready_recipes()[name].read_text().strip()
    out += [f"The same as a recipe, `{name}`, which comes with the package. File names in it stand for yours:", ""]
    return [*out, "```yaml", text, "```", "", "```sh", f"modelwright run {name}{set_base}", "```", ""]


def _outcome(name: str) -> list[str]:
    named = [c["proof"] for c in verdicts()["claims"].get(name, []) if c["proof"] in results()]
    used = list(dict.fromkeys(named)) + [r for r in results() if owner(r) == name and r not in named]
    out = ["## Outcome of the benchmarks", ""] if used else []
    for result in used:
        if (home := owner(result)) == name:
            out += _result(results()[result])
        else:
            out += [f"The table of `{result}` stands at [`{home}`]({_link(home, name)}#{result}).", ""]
    return out


def _link(to: str, at: str) -> str:
    if to == "kernel":
        return "../../kernel.md"
    return f"{to.split('.')[1]}.md" if to.split(".")[0] == at.split(".")[0] else f"../{to.replace('.', '/')}.md"


def _result(r: dict[str, Any]) -> list[str]:
    v = r["versions"]
    seeds = f"seeds {', '.join(map(str, r['seeds']))}; " if r["seeds"] else ""
    where = f"{v['machine']}, Python {v['python']}, torch {v['torch']}, transformers {v['transformers']}"
    out = [f"### {r['name']}", "", f"**Claim.** {cell(r['claim'])}", "", f"**Outcome.** {cell(r['outcome'])}", ""]
    out += [*table(r["columns"], r["rows"]), "", *(f"- {cell(n)}" for n in r["notes"])]
    return [*out, f"- `{r['command']}`, {r['date']}; {seeds}{where}", ""]


def _proofs(files: tuple[str, ...]) -> list[str]:
    out = ["## Proofs", "", "Each line is a test. It holds exactly, or within the tolerance that the test states.", ""]
    for name in files:
        out += [f"`{name}`", "", *(f"- {t}" for t in tests_of(name)), ""]
    return out


def tests_of(name: str) -> list[str]:
    """The properties that a test file holds, in words."""
    return [
        n.name.removeprefix("test_").replace("_", " ")
        for n in ast.walk(ast.parse((ROOT / name).read_text()))
        if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")
    ]


def _knobs(e: registry.Entry) -> list[str]:
    rows = [(n, f) for n, f in flat(registry.knobs(e))]
    trains = any(n.startswith("train.") for n, _ in rows)
    own = [(n, f) for n, f in rows if n.split(".")[0] not in SHARED_KNOBS or not trains and n.split(".")[0] != "train"]
    out = ["## Knobs", ""]
    if trains:
        out += ["The data, the length of training and the learning rate: [training knobs](../training-knobs.md).", ""]
    return out + (_knob_table(own) if own else ["It has no others.", ""])


def _knob_table(rows: list[tuple[str, Any]]) -> list[str]:
    made = []
    for name, f in rows:
        default = default_of(f)
        shown = "required" if default is MISSING else "" if default in (None, [], {}, "") else f"`{_text(default)}`"
        low, high = f.metadata.get("low"), f.metadata.get("high")
        span = f"{low} to {high}" if None not in (low, high) else f"at least {low}" if low is not None else f"at most {high}"
        kind = type_name(f.type) + (f", {span}" if (low, high) != (None, None) else "")
        also = f" (also `{f.metadata['alias']}`)" if f.metadata.get("alias") else ""
        made.append([f"`{name}`{also}", shown, f.metadata.get("help", ""), kind])
    return [*table(["knob", "default", "meaning", "type"], made), ""]


def training_knobs() -> str:
    out = ["# Training knobs", "", "What every way to tune takes beside its own knobs. In a recipe: `data: {path: FILE, column: NAME}`,"]
    out += ["`train: {tokens: 300k, lr: 1.0e-3}`; on the command line: `--data FILE --data.column NAME --train.tokens 300k`.", ""]
    return _lines([*out, *_knob_table(flat(Tune))])


def kernel_page() -> str:
    out = ["# The kernel", "", "What all methods share: checkpoints, training, data, reports, recipes. Its claims and its proofs.", ""]
    out += [*_verdict_lines("kernel"), *_outcome("kernel")]
    proven = {p for row in ROWS.values() for p in row.proofs}
    rest = [str(f.relative_to(ROOT)) for f in sorted((ROOT / "tests").rglob("test_*.py"))]
    return _lines(out + _proofs(tuple(f for f in rest if f not in proven)))


def _index(prefix: str) -> list[str]:
    """One line per method: its verdicts and their claims, what did not hold first."""
    out = ["| method | verdict and claim |", "|---|---|"]
    for name in [*(e.name for e in registry.METHODS), "kernel"]:
        claims = verdicts()["claims"].get(name, [])
        tests = sum(len(tests_of(p)) for p in ROWS[name].proofs) if name in ROWS else 0
        said = "<br>".join(f"**{c['verdict']}**: {cell(c['claim'])}" for c in claims) or f"no claim is measured; {tests} tests"
        to = f"{prefix}{name.replace('.', '/')}.md" if name in ROWS else f"{prefix.removesuffix('methods/') or '../'}kernel.md"
        out.append(f"| [`{name}`]({to}) | {said} |")
    return out


def _counts() -> str:
    words = [c["verdict"] for claims in verdicts()["claims"].values() for c in claims]
    return ", ".join(f"{words.count(v)} {v}" for v in VERDICTS)


_PROOFS = """# Proofs

Made by `make docs`. Claims are measured in `bench/`, each beside its baseline and its control, and reported as they came out. What
holds exactly is tested. Numbers, tables and tests stand on each method's page.

Of the claims: {counts}. *Not held*: the measurement says otherwise, here. *Not shown at this scale*: the claim is about larger models
or longer training than were run, and no difference beyond the spread of the seeds was seen.
"""


def proofs() -> str:
    return _lines([*_PROOFS.format(counts=_counts()).split("\n"), *_index("docs/methods/")])


def methods_page() -> str:
    out = ["# Methods", "", f"Of the claims: {_counts()}.", ""]
    for family in registry.FAMILIES:
        own = [e for e in registry.METHODS if e.family == family]
        if own:
            out += [f"## {family}", "", f"{registry.FAMILIES[family].capitalize()}.", "", "| method | what it does |", "|---|---|"]
            out += [*(f"| [`{e.name}`]({e.name.replace('.', '/')}.md) | {cell(e.line)} |" for e in own), ""]
    return _lines([*out, "## Verdicts", "", *_index("")])


def pages() -> dict[Path, str]:
    """Every generated file and its text."""
    docs = ROOT / "docs"
    made = {ROOT / "PROOFS.md": proofs(), docs / "methods" / "index.md": methods_page(), docs / "kernel.md": kernel_page()}
    made[docs / "methods" / "training-knobs.md"] = training_knobs()
    return made | {docs / "methods" / e.family / f"{e.name.split('.')[1]}.md": method_page(e) for e in registry.METHODS}


def _lines(lines: list[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"


def outdated(made: dict[Path, str]) -> list[str]:
    """Pages that are not what would be made now, and pages of methods that are gone."""
    gone = set((ROOT / "docs" / "methods").rglob("*.md")) - made.keys()
    old = [f for f, text in made.items() if not f.is_file() or f.read_text(encoding="utf-8") != text]
    return sorted(str(f.relative_to(ROOT)) for f in [*old, *gone])


def main() -> None:
    made = pages()
    old = outdated(made)
    if "--check" in sys.argv:
        sys.exit("run `make docs`; not current: " + ", ".join(old) if old else 0)
    for name in old:
        file = ROOT / name
        if file in made:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(made[file], encoding="utf-8")
        else:
            file.unlink()
    print(f"{len(made)} pages, {len(old)} of them changed")


if __name__ == "__main__":
    main()
