"""Settings: what a person may write, what is refused with a sentence, and where a relative path points."""

import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from modelwright import registry
from modelwright.core.errors import UserError
from modelwright.core.knobs import MISSING, Data, Train, build, default_of, flat, knob, number, plain, resolve, type_name
from modelwright.runner import recipe as recipes


@dataclass(frozen=True)
class Inner:
    share: float = knob(0.5, "a share", low=0, high=1)
    names: list[str] = knob(["a"], "some names")


@dataclass(frozen=True)
class Knobs:
    experts: int = knob(help="how many; no default", low=1)
    rate: float = knob(1e-3, "a rate", low=0)
    quick: bool = knob(False, "a switch")
    how: Literal["linear", "cosine", 3] = knob("linear", "a choice")
    roles: list[str] = knob(["attn.q", "attn.v"], "a list")
    sizes: list[int] = knob([1, 2], "a list of numbers")
    limit: int | None = knob(None, "none or a number", low=1)
    inner: Inner = knob(Inner(), "more settings")
    maybe: Inner | None = knob(None, "more settings, or none")
    evals: dict[str, Data] = knob({}, "sources by name")
    mixed: int | str = knob("x", "a number or a word")
    table: dict[str, float] = knob({"a": 1.0}, "numbers by name")
    deep: list[list[int]] = knob([[1], [2]], "nested lists")
    folder: str | None = knob(None, "a folder", path=True)
    folders: list[str] = knob([], "folders", path=True)
    word: str = knob("w", "a word")


def made(**values: Any) -> Knobs:
    return build(Knobs, {"experts": 4, **values})


# ---- numbers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("300k", 300_000),
        ("1.5M", 1_500_000),
        ("1.5m", 1_500_000),
        ("2B", 2_000_000_000),
        ("3e-4", 3e-4),
        ("1e6", 1e6),
        ("1_000", 1000),
        (" 7 ", 7),
        (3, 3),
        (0.25, 0.25),
        ("-2k", -2000),
        ("0.1k", 100),
    ],
)
def test_numbers_are_read_as_people_write_them(text: Any, value: float) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("experts", "300k", 300_000),
        ("experts", "1.5M", 1_500_000),
        ("experts", 8.0, 8),
        ("experts", "1e3", 1000),
        ("rate", "3e-4", 3e-4),
        ("rate", 1, 1.0),
        ("rate", "2k", 2000.0),
        ("limit", "2k", 2000),
        ("experts", "2.3M", 2_300_000),
        ("experts", "1.001k", 1001),
    ],
)
def test_numbers_become_the_type_of_the_setting(key: str, text: Any, value: float) -> None:
    found = getattr(made(**{key: text}), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("key", ["experts", "rate", "limit"])
def test_bool_is_no_number(key: str, value: bool) -> None:
    with pytest.raises(UserError, match=f"{key}={value}"):
        made(**{key: value})
    with pytest.raises(ValueError, match=str(value)):
        number(value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("experts", 1.5),
        ("experts", "1.5"),
        ("experts", "many"),
        ("experts", ""),
        ("experts", "k"),
        ("experts", None),
        ("experts", [4]),
        ("experts", {}),
        ("experts", "inf"),
        ("rate", "nan"),
        ("rate", float("inf")),
        ("rate", "1e400"),
        ("rate", None),
        ("quick", 1),
        ("quick", "true"),
        ("quick", None),
        ("roles", "attn.q"),
        ("roles", {"a": 1}),
        ("roles", [1]),
        ("sizes", ["x"]),
        ("sizes", [True]),
        ("limit", "x"),
        ("evals", ["a"]),
        ("evals", "a"),
        ("evals", {"a": 3}),
        ("table", {"a": "x"}),
        ("deep", [1]),
        ("word", 3),
        ("word", None),
        ("folder", 3),
        ("inner", 3),
        ("inner", [1]),
        ("mixed", 1.5),
        ("mixed", []),
    ],
)
def test_value_of_another_type_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=key):
        made(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "where"),
    [
        ("sizes", [1, "x"], r"sizes\[1\]"),
        ("table", {"a": "x"}, r"table\.a"),
        ("inner", {"share": "x"}, r"inner\.share"),
        ("evals", {"new": {"limit": "x"}}, r"evals\.new\.limit"),
        ("deep", [[1], ["x"]], r"deep\[1\]\[0\]"),
    ],
)
def test_wrong_value_is_named_by_its_full_path(key: str, value: Any, where: str) -> None:
    with pytest.raises(UserError, match=where):
        made(**{key: value})


# ---- keys, bounds, choices -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expert": 4}, "unknown key 'expert'; did you mean 'experts'?"),
        ({"experts": 4, "inner": {"shar": 1}}, "unknown key 'inner.shar'; did you mean 'share'?"),
        ({"experts": 4, "evals": {"a": {"colum": "x"}}}, "unknown key 'evals.a.colum'; did you mean 'column'?"),
    ],
)
def test_unknown_key_names_the_nearest_known_one(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build(Knobs, values)
    assert str(error.value) == message


def test_key_that_is_like_none_lists_all() -> None:
    with pytest.raises(UserError, match="known: chat_template, column, limit, path, refused, sources, split"):
        build(Data, {"zzzzzz": 1})


def test_missing_key_says_what_it_is_for() -> None:
    with pytest.raises(UserError, match="steps.0.experts is missing, because how many; no default; give steps.0.experts"):
        build(Knobs, {}, "steps.0")


@pytest.mark.parametrize(
    ("key", "value", "span"),
    [
        ("experts", 0, "at least 1"),
        ("experts", "-3", "at least 1"),
        ("rate", -1e-9, "at least 0"),
        ("limit", 0, "at least 1"),
        ("inner", {"share": 1.01}, "between 0 and 1"),
        ("inner", {"share": -0.1}, "between 0 and 1"),
    ],
)
def test_bounds_hold(key: str, value: Any, span: str) -> None:
    with pytest.raises(UserError, match=f"out of range, because it must be {span}"):
        made(**{key: value})


@pytest.mark.parametrize(("key", "value"), [("experts", 1), ("rate", 0), ("limit", 1), ("inner", {"share": 0}), ("inner", {"share": 1})])
def test_bounds_are_inclusive(key: str, value: Any) -> None:
    assert made(**{key: value})


@pytest.mark.parametrize(("given", "value"), [("cosine", "cosine"), (3, 3), ("3", 3)])
def test_choices_are_taken_as_declared(given: Any, value: Any) -> None:
    assert made(how=given).how == value and type(made(how=given).how) is type(value)


@pytest.mark.parametrize("given", ["cosin", "Cosine", None, 4, ["cosine"]])
def test_no_choice_is_refused(given: Any) -> None:
    with pytest.raises(UserError, match="how=.* is not a choice; did you mean 'cosine'|how=.* is not a choice; known: 3, cosine, linear"):
        made(how=given)


@pytest.mark.parametrize("values", [3, "x", [1], None])
def test_settings_must_be_a_mapping(values: Any) -> None:
    if values is None:
        assert build(Train, None) == Train()
    else:
        with pytest.raises(UserError, match="must be a mapping of settings"):
            build(Train, values)


# ---- nesting ---------------------------------------------------------------------------------------------------------
def test_nested_settings_keep_their_other_defaults() -> None:
    assert made(inner={"share": "0.25"}).inner == Inner(share=0.25)
    assert made(maybe={"names": ["b"]}).maybe == Inner(names=["b"]) and made(maybe=None).maybe is None
    assert made(evals={"a": {"path": "/x", "limit": "2k"}}).evals == {"a": Data("/x", limit=2000)}
    assert made(mixed=3).mixed == 3 and made(mixed="many").mixed == "many"


def test_bare_text_is_the_first_setting_of_a_nested_one() -> None:
    assert build(Knobs, {"experts": 1, "evals": {"a": "/x.txt"}}).evals == {"a": Data("/x.txt")}


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        made().experts = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    "get",
    [lambda k: k.roles, lambda k: k.evals, lambda k: k.table, lambda k: k.deep[0], lambda k: k.inner.names],
    ids=["list", "dict", "filled dict", "list in a list", "list in nested settings"],
)
def test_defaults_are_not_shared(get: Any) -> None:
    first, second = made(), made()
    before = json.dumps(get(second))
    changed = get(first)
    changed.append("changed") if isinstance(changed, list) else changed.update(changed=1)
    try:
        assert json.dumps(get(second)) == json.dumps(get(made())) == before
    finally:
        changed.pop() if isinstance(changed, list) else changed.pop("changed")


def test_values_given_are_copied() -> None:
    mine = {"experts": 4, "roles": ["a"], "table": {"x": 1.0}}
    found = build(Knobs, mine)
    found.roles.append("b")
    found.table["y"] = 2.0
    assert mine == {"experts": 4, "roles": ["a"], "table": {"x": 1.0}}


FULL: dict[str, Any] = {
    "experts": 8,
    "rate": "3e-4",
    "quick": True,
    "how": 3,
    "roles": ["x"],
    "sizes": ["1k"],
    "limit": 9,
    "inner": {"share": 1, "names": []},
    "maybe": {"share": 0},
    "evals": {"a": "/x.txt", "b": {"path": None, "split": "test"}},
    "mixed": 3,
    "table": {"k": "1.5M"},
    "deep": [[3]],
    "folder": "/f",
    "folders": ["/g", "/h"],
    "word": "v",
}


@pytest.mark.parametrize("values", [{"experts": 1}, FULL])
def test_plain_values_build_the_same_settings_again(values: dict[str, Any]) -> None:
    found = build(Knobs, values)
    assert build(Knobs, plain(found)) == found
    assert build(Knobs, json.loads(json.dumps(plain(found)))) == found


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda e: e.name)
def test_defaults_of_every_method_build_themselves_again(entry: registry.Entry) -> None:
    kind = registry.knobs(entry)
    missing = [(n, f) for n, f in flat(kind) if default_of(f) is MISSING]
    given = {Literal: lambda kind: get_args(kind)[0], list: lambda kind: ["4", "5"]}
    needed = {n: given.get(get_origin(f.type), lambda kind: "4" if kind is str else 4)(f.type) for n, f in missing}
    found = build(kind, needed)
    assert build(kind, json.loads(json.dumps(plain(found)))) == found


# ---- paths -----------------------------------------------------------------------------------------------------------
def test_paths_are_seen_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "recipes"
    home.mkdir()
    (tmp_path / "data").mkdir()
    (home / "rows.txt").write_text("x")
    (home / "r.yaml").write_text(
        "base: ../model\nsteps:\n- tune.full:\n    data: {path: rows.txt}\n    evals: {a: ../data, b: {path: ./c/../rows.txt}}\n"
        "save: {to: out}\n"
    )
    monkeypatch.chdir("/")
    found = recipes.read(home / "r.yaml")
    knobs = found.steps[0].knobs
    assert (
        knobs.data.path == str(home / "rows.txt")
        and knobs.evals["a"].path == str(tmp_path / "data")
        and knobs.evals["b"].path == str(home / "rows.txt")
    )
    assert found.base == str(tmp_path / "model") and found.save.to == str(home / "out")


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("x.txt", "/base/x.txt"),
        ("./x", "/base/x"),
        ("../x", "/x"),
        ("a/b/c", "/base/a/b/c"),
        ("/abs/x", "/abs/x"),
        ("org/name", "org/name"),
        ("name", "name"),
        ("a/b.jsonl", "/base/a/b.jsonl"),
        ("b.parquet", "/base/b.parquet"),
        (None, None),
    ],
)
def test_words_that_could_be_hub_ids_are_left_alone(given: Any, want: Any) -> None:
    assert resolve(given, Path("/base")) == want


def test_hub_like_word_that_is_a_file_here_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name", tmp_path) == str(tmp_path / "org" / "name") and resolve(["org/name", "other"], tmp_path) == [
        str(tmp_path / "org" / "name"),
        "other",
    ]
    assert made_in(tmp_path, folder="org", folders=["org", "./x"]) == (str(tmp_path / "org"), [str(tmp_path / "org"), str(tmp_path / "x")])


def made_in(root: Path, **values: Any) -> tuple[Any, Any]:
    found = build(Knobs, {"experts": 1, **values}, "", root)
    return found.folder, found.folders


def test_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve("~/x.txt", Path("/base")) == "/home/me/x.txt"


# ---- description -----------------------------------------------------------------------------------------------------
def test_leaves_are_named_with_dots() -> None:
    names = [n for n, _ in flat(Knobs)]
    assert "inner.share" in names and "maybe.names" in names and "evals" in names and "inner" not in names
    assert dict(flat(Knobs))["experts"].default is MISSING and default_of(dict(flat(Knobs))["roles"]) == ["attn.q", "attn.v"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (int, "whole number"),
        (float, "number"),
        (bool, "true or false"),
        (str, "text"),
        (int | None, "whole number"),
        (list[int], "list of whole number"),
        (dict[str, Data], "mapping"),
        (Literal["a", 3], "a | 3"),
        (int | str, "whole number or text"),
    ],
)
def test_types_are_named_as_people_say_them(kind: Any, name: str) -> None:
    assert type_name(kind) == name


def test_settings_are_checked_without_torch() -> None:
    code = (
        "import sys; from modelwright import registry; [registry.knobs(e) for e in registry.entries()]; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False).returncode == 0
