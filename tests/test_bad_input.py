"""Bad input through the command line: exit code 2, one sentence on standard error, no traceback, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES
from modelwright.cli import app as cli

Tiny = Callable[..., Path]
Refuse = Callable[..., str]
WEIGHT = "model.layers.1.mlp.up_proj.weight"
IDS = list(range(3, 40))


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """The folder that the commands write into; `room / "out"` is the target."""
    room = tmp_path / "room"
    room.mkdir()
    return room


@pytest.fixture
def refuse(room: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """refuse(argument, ..., words=[...]) -> standard output of a command that must fail as a person can read."""
    monkeypatch.chdir(room)

    def snapshot() -> dict[str, bytes | None]:
        return {str(p.relative_to(room)): p.read_bytes() if p.is_file() else None for p in room.rglob("*")}

    def call(*argv: Any, words: list[str]) -> str:
        before = snapshot()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert caught.value.code == 2
        assert "Traceback" not in out + err
        lines = err.strip().splitlines()
        assert [line for line in lines if line.lower().startswith("error:")] == lines[-1:], err  # one, and the last thing said
        assert len(lines[-1]) < 500
        for word in words:
            assert word in lines[-1], lines[-1]
        assert snapshot() == before, "something was written"
        return out

    return call


def upcycle(base: Any, *more: Any, to: Any = "out") -> list[Any]:
    return ["reshape", "upcycle", "--base", base, "--to", to, "--experts", "4", *more]


def tune(base: Any, data: Any, *more: Any) -> list[Any]:
    return ["tune", "full", "--base", base, "--data", data, "--to", "out", "--train.tokens", "64", "--train.context", "16", *more]


@pytest.fixture
def spoilt(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """spoilt(change, kind) -> a copy of a tiny checkpoint, changed by `change(folder)`."""

    def make(change: Callable[[Path], Any], kind: str = "llama", **more: Any) -> Path:
        folder = Path(shutil.copytree(tiny(kind, **more), tmp_path / "spoilt"))
        change(folder)
        return folder

    return make


@pytest.fixture
def recipe(tiny: Tiny, tmp_path: Path, room: Path) -> Callable[[str | bytes], Path]:
    """recipe(text) -> a file with that text; BASE and OUT stand for a tiny Llama and the target."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        if isinstance(text, str):
            text = text.replace("BASE", str(tiny("llama"))).replace("OUT", str(room / "out")).encode()
        path.write_bytes(text)
        return path

    return write


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    """data("x.jsonl", {...}, ...) -> a file with one row per mapping; or with a text or bytes as they are."""

    def write(name: str, *rows: Any) -> Path:
        path = tmp_path / name
        text = [row if isinstance(row, (str, bytes)) else json.dumps(row) + "\n" for row in rows]
        path.write_bytes(b"".join(row.encode() if isinstance(row, str) else row for row in text))
        return path

    return write


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


# ---- recipes ---------------------------------------------------------------------------------------------------------
HEAD = "base: BASE\nsave: {to: OUT}\n"
STEP = "steps: [reshape.upcycle: {experts: 4}]\n"
RECIPES: dict[str, tuple[str | bytes, list[str]]] = {
    "unknown key": (HEAD + STEP + "sede: 3\n", ["unknown key 'sede'", "did you mean 'seed'?"]),
    "unknown knob": (HEAD + "steps: [reshape.upcycle: {expert: 4}]", ["steps.0.reshape.upcycle.expert", "did you mean 'experts'?"]),
    "unknown nested knob": (HEAD + "steps: [tune.full: {data: x.txt, train: {learning: 3}}]", ["steps.0.tune.full.train.learning"]),
    "unknown key of save": (HEAD.replace("to:", "too:") + STEP, ["save.too", "did you mean 'to'?"]),
    "misspelt method": (HEAD + "steps: [reshape.upcyle: {experts: 4}]", ["reshape.upcyle", "did you mean 'reshape.upcycle'?"]),
    "misspelt choice": (HEAD + "steps: [reshape.upcycle: {method: dorp}]", ["method='dorp'", "did you mean 'drop'?"]),
    "wrong type": (HEAD + "steps: [reshape.upcycle: {experts: many}]", ["experts='many'", "whole number"]),
    "half an expert": (HEAD + "steps: [reshape.upcycle: {experts: 2.5}]", ["experts=2.5", "whole number"]),
    "out of bounds": (HEAD + "steps: [reshape.upcycle: {experts: 1}]", ["experts=1", "at least 2"]),
    "share beyond one": (HEAD + "steps: [reshape.upcycle: {ratio: 1.5}]", ["ratio=1.5", "between 0 and 1"]),
    "not a number": (HEAD + "steps: [reshape.upcycle: {ratio: .nan}]", ["ratio=nan"]),
    "seed below zero": (HEAD + STEP + "seed: -1", ["seed=-1"]),
    "seed too large": (HEAD + STEP + f"seed: {10**20}", ["seed=1000", "4294967295"]),
    "no yaml": (HEAD + "steps: [", ["not valid YAML", "line 3"]),
    "tabs": (HEAD + "steps:\n\t- reshape.upcycle", ["not valid YAML", "line 4"]),
    "two documents": (HEAD + STEP + "---\nbase: x\n", ["not valid YAML"]),
    "duplicate key": (HEAD + STEP + "base: elsewhere\n", ["'base' stands twice", "line 4"]),
    "duplicate knob": (HEAD + "steps:\n- reshape.upcycle:\n    experts: 4\n    experts: 8\n", ["'experts' stands twice", "line 6"]),
    "no steps": (HEAD, ["no steps"]),
    "empty": ("", ["no recipe"]),
    "a list": ("- a\n- b\n", ["no recipe"]),
    "missing base folder": (HEAD.replace("BASE", "./nowhere") + STEP, ["nowhere", "no folder"]),
    "no base": ("save: {to: OUT}\n" + STEP, ["reshape.upcycle has no checkpoint", "base"]),
    "no data": (HEAD + "steps: [tune.full: {}]", ["tune.full has no dataset", "data"]),
    "missing data": (HEAD + "steps: [tune.full: {data: ./nothing.txt}]", ["nothing.txt"]),
    "objects": (HEAD + "steps: !!python/object/apply:os.system ['touch run']\n", ["not valid YAML"]),
    "bytes that are no text": (b"\xff\xfe\x00base", ["recipe.yaml"]),
    "a number for a method": (HEAD + "steps: [3: {experts: 4}]", ["3"]),
    "nothing for a method": (HEAD + "steps: [null]", ["steps.0"]),
    "a list for a key": (HEAD + STEP + "? [a, b]\n: 3\n", []),
    "brackets without end": (HEAD + "steps: " + "[" * 1200, []),
}


@pytest.mark.parametrize("fault", RECIPES)
def test_bad_recipe_is_one_sentence(recipe: Callable[..., Path], refuse: Refuse, fault: str) -> None:
    text, words = RECIPES[fault]
    refuse("run", recipe(text), words=words)


@pytest.mark.parametrize("fault", RECIPES)
def test_check_finds_what_run_finds(recipe: Callable[..., Path], refuse: Refuse, fault: str) -> None:
    text, words = RECIPES[fault]
    refuse("check", recipe(text), words=words)


@pytest.mark.parametrize(
    "assignment, words",
    [
        ("seed", ["--set seed", "'='"]),
        ("sede=3", ["sede", "did you mean 'seed'?"]),
        ("steps.7.experts=4", ["names no step", "1 step"]),
        ("steps.0.expert=4", ["expert", "did you mean 'experts'?"]),
        ("steps.0.experts=[", ["not valid YAML"]),
        ("save.shard_size=5", ["shard_size=5"]),
        ("steps.0.experts.deep=4", ["experts", "plain value"]),
    ],
)
def test_bad_override_is_one_sentence(recipe: Callable[..., Path], refuse: Refuse, assignment: str, words: list[str]) -> None:
    refuse("run", recipe(HEAD + STEP), "--set", assignment, words=words)


def test_missing_recipe_is_one_sentence(refuse: Refuse) -> None:
    refuse("run", "sparse-upcyclin", words=["no recipe at sparse-upcyclin", "did you mean 'sparse-upcycling'?"])


# ---- the command itself ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "argv, words",
    [
        (["--exprts", "4"], ["--exprts", "--experts"]),
        (["--seed", "x"], ["--seed"]),
        (["--router-std", "wide"], ["router_std='wide'", "number"]),
        (["--save", "shard_sise=3000000"], ["save.shard_sise", "did you mean 'shard_size'?"]),
        (["--target", "mixtrall"], ["target='mixtrall'", "did you mean 'mixtral'?"]),
        (["--prompts", "[a"], ["--prompts", "not valid YAML"]),
        (["--top-k"], ["--top-k"]),
        (["extra"], ["extra"]),
    ],
)
def test_bad_option_is_one_sentence(tiny: Tiny, refuse: Refuse, argv: list[str], words: list[str]) -> None:
    refuse(*upcycle(tiny("llama")), *argv, words=words)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["reshap"], ["reshap"]),
        (["reshape", "upcyle", "--to", "out"], ["upcyle"]),
        (["reshape", "upcycle", "--to", "out"], ["--base"]),
        (["run"], ["recipe"]),
        (["show", "reshape.upcyle"], ["did you mean 'reshape.upcycle'?"]),
        (["new", "nothing", "x"], ["nothing"]),
    ],
)
def test_bad_command_is_one_sentence(refuse: Refuse, argv: list[str], words: list[str]) -> None:
    refuse(*argv, words=words)


def test_json_gives_the_error_as_an_object(tiny: Tiny, refuse: Refuse) -> None:
    out = refuse(*upcycle(tiny("llama"), "--top-k", "9", "--json"), words=["top_k=9"])
    assert json.loads(out) == {"error": {"what": "top_k=9 but there are 4 experts", "why": "", "how": "lower top_k or raise experts"}}


# ---- checkpoints -----------------------------------------------------------------------------------------------------
def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def poison(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[WEIGHT][2, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remote(folder: Path) -> None:
    config(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})(folder)
    (folder / "modeling_evil.py").write_text("open('evil', 'w')")


def no_offsets(folder: Path) -> None:
    """A header that is JSON and says where one tensor is, but not where it lies."""
    raw = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8:end])
    del table[WEIGHT]["data_offsets"]
    header = json.dumps(table).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "config that is no json": (lambda f: (f / "config.json").write_text("{"), ["config.json is not valid JSON"]),
    "config that is a number": (lambda f: (f / "config.json").write_text("3"), ["config.json"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no model.safetensors"]),
    "truncated": (truncate, ["model.safetensors is truncated"]),
    "damaged header": (no_offsets, ["model.safetensors"]),
    "nan": (poison, [WEIGHT, "not finite"]),
    "pickle": (pickle, ["pytorch_model.bin", "pickle"]),
    "remote code": (remote, ["auto_map", "remote code is never run"]),
    "incomplete": (lambda f: (f / "INCOMPLETE").write_text("1"), ["incomplete"]),
    "unknown type": (config(model_type="wobble", architectures=None), ["model type 'wobble'"]),
    "a layer too many": (config(num_hidden_layers=3), ["model.layers.2."]),
    "a layer too few": (config(num_hidden_layers=1), ["model.layers.1."]),
    "a word for a number": (config(num_hidden_layers="two"), ["num_hidden_layers"]),
    "no key-value heads": (config(num_key_value_heads=0), ["llama"]),
    "more words than rows": (config(vocab_size=97), []),
    "unknown activation": (config(hidden_act="wobble"), ["wobble"]),
    "quantized": (config(quantization_config={"quant_method": "gptq", "bits": 4}), []),
    "damaged lineage": (lambda f: (f / "modelwright.json").write_text("{"), ["modelwright.json"]),
}


@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_bad_checkpoint_is_one_sentence(spoilt: Callable[..., Path], refuse: Refuse, fault: str) -> None:
    change, words = CHECKPOINTS[fault]
    folder = spoilt(change)
    of_config = fault in ("unknown type", "a word for a number", "no key-value heads", "unknown activation")
    refuse(*upcycle(folder), words=words if of_config else [str(folder), *words])


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_damaged_index_is_one_sentence(spoilt: Callable[..., Path], refuse: Refuse, text: str) -> None:
    folder = spoilt(lambda f: (f / "model.safetensors.index.json").write_text(text), shard="20KB")
    refuse(*upcycle(folder), words=["model.safetensors.index.json"])


@pytest.mark.parametrize("base", ["./nowhere", "/nowhere/at/all", "nobody/nothing-at-all"])
def test_missing_base_is_one_sentence(refuse: Refuse, base: str) -> None:
    refuse(*upcycle(base), words=[base.removeprefix("./")])


def test_file_for_a_base_is_one_sentence(tiny: Tiny, refuse: Refuse) -> None:
    refuse(*upcycle(tiny("llama") / "model.safetensors"), words=["model.safetensors", "folder"])


def test_more_experts_per_token_than_experts_is_one_sentence(tiny: Tiny, refuse: Refuse) -> None:
    refuse(*upcycle(tiny("llama"), "--top-k", "5"), words=["top_k=5", "4 experts"])


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("gpt2", "because its feed-forward part has no gate"),
        ("gpt_neox", "because its feed-forward part has no gate"),
        ("opt", "because its feed-forward part has no gate"),
        ("gemma2", "because it norms what attention"),
        ("t5_v1_1", "has an encoder"),
        ("bert", "has an encoder"),
        ("mixtral", "is a mixture of experts already"),
    ],
)
def test_model_that_no_stock_mixture_holds_is_refused_with_the_reason(tiny: Tiny, refuse: Refuse, kind: str, reason: str) -> None:
    refuse(*upcycle(tiny(kind)), words=[FAMILIES[kind][1].__name__, reason])


def test_target_that_is_not_exact_is_refused_with_those_that_are(tiny: Tiny, refuse: Refuse) -> None:
    refuse(*upcycle(tiny("qwen2"), "--target", "mixtral"), words=["target=mixtral", "qwen2_moe"])


# ---- vocabularies ----------------------------------------------------------------------------------------------------
def test_mixing_models_of_different_vocabulary_is_one_sentence(tiny: Tiny, refuse: Refuse) -> None:
    refuse(*upcycle(tiny("llama"), "--method", "btx", "--others", tiny("llama", vocab_size=90)), words=["another vocabulary"])


def test_mixing_models_of_different_shape_is_one_sentence(tiny: Tiny, refuse: Refuse) -> None:
    refuse(*upcycle(tiny("llama"), "--method", "btx", "--others", tiny("llama", intermediate_size=40)), words=["shape", "mlp"])


def test_mixing_nothing_is_one_sentence(tiny: Tiny, refuse: Refuse) -> None:
    refuse(*upcycle(tiny("llama"), "--method", "btx"), words=["others"])


@pytest.mark.parametrize("how", ["upcycle", "tune"])
def test_tokenizer_with_more_tokens_than_the_model_is_one_sentence(
    tiny: Tiny, stories: Path, tmp_path: Path, refuse: Refuse, data: Callable[..., Path], how: str
) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "mixed"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories / name, folder / name)
    argv = tune(folder, data("x.txt", "Once upon a time")) if how == "tune" else upcycle(folder)
    refuse(*argv, words=["the tokenizer", str(folder), "511", "96 embeddings"])


# ---- data ------------------------------------------------------------------------------------------------------------
DATA: dict[str, tuple[str, tuple[Any, ...], list[str]]] = {
    "id beyond the vocabulary": ("x.jsonl", ({"input_ids": IDS}, {"input_ids": [*IDS, 96]}), ["token id 96", "96 embeddings"]),
    "id below zero": ("x.jsonl", ({"input_ids": [-1, *IDS]},), ["token id -1"]),
    "id beyond 32 bits": ("x.jsonl", ({"input_ids": [2**40, *IDS]},), ["out of range", str(2**40)]),
    "a hole among the ids": ("x.jsonl", ({"input_ids": [1, None, 3]},), ["input_ids"]),
    "fractions for ids": ("x.jsonl", ({"input_ids": [1.5, 2.0]},), ["token ids"]),
    "words for ids": ("x.jsonl", ({"input_ids": ["a", "b"]},), ["token ids"]),
    "no rows": ("x.jsonl", (), ["x.jsonl is empty"]),
    "empty rows": ("x.jsonl", ({"input_ids": []},), ["x.jsonl"]),
    "one token": ("x.jsonl", ({"input_ids": [3]},), ["fewer than two tokens"]),
    "text without a tokenizer": ("x.jsonl", ({"text": "hello"},), ["no tokenizer"]),
    "an empty text": ("x.txt", ("",), ["x.txt"]),
    "a header without rows": ("x.csv", ("text\n",), ["x.csv"]),
    "two columns": ("x.csv", ("a,b\n1,2\n",), ["several columns", "a, b"]),
    "numbers": ("x.csv", ("text\n1\n2\n",), ["column 'text'", "holds numbers"]),
    "half a row": ("x.jsonl", ('{"text": ',), ["x.jsonl does not parse"]),
    "an object for a list": ("x.json", ('{"text": "hello"}',), ["x.json"]),
    "a number for a list": ("x.json", ("3",), ["x.json"]),
    "brackets without end": ("x.json", ("[" * 100_000,), ["x.json"]),
    "no parquet": ("x.parquet", (b"PAR1 and no more",), ["x.parquet does not parse"]),
    "bytes that are no text": ("x.csv", (b"\xff\xfe\x00,\n\xff,\xff\n",), ["x.csv"]),
    "unknown ending": ("x.xyz", ("hello",), ["'.xyz'"]),
}


@pytest.mark.parametrize("fault", DATA)
def test_bad_data_is_one_sentence(tiny: Tiny, data: Callable[..., Path], refuse: Refuse, fault: str) -> None:
    name, rows, words = DATA[fault]
    refuse(*tune(tiny("llama"), data(name, *rows)), words=words)


def test_column_that_is_not_there_is_one_sentence(stories: Path, data: Callable[..., Path], refuse: Refuse) -> None:
    path = data("x.jsonl", {"body": "hello", "title": "x"})
    refuse(*tune(stories, path, "--data.column", "boddy"), words=["no column 'boddy'", "did you mean 'body'?"])


@pytest.mark.parametrize("rows", [[{"messages": [{"role": "user", "content": "hello"}]}], [{"messages": [{"role": "user"}]}]])
def test_chats_without_a_template_are_one_sentence(stories: Path, data: Callable[..., Path], refuse: Refuse, rows: list[Any]) -> None:
    word = "chat template" if "content" in rows[0]["messages"][0] else "content"
    refuse(*tune(stories, data("x.jsonl", *rows)), words=[word])


def test_missing_data_file_is_one_sentence(tiny: Tiny, tmp_path: Path, refuse: Refuse) -> None:
    refuse(*tune(tiny("llama"), tmp_path / "nothing.jsonl"), words=["nothing.jsonl"])


# ---- targets ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("to", ["file/out", "file/deep/out", "n" * 300], ids=["below a file", "deep below a file", "name too long"])
def test_target_that_cannot_be_written_is_one_sentence(tiny: Tiny, room: Path, refuse: Refuse, to: str) -> None:
    (room / "file").write_text("mine")
    refuse(*upcycle(tiny("llama"), to=to), words=["is no path" if len(to) > 255 else "cannot write"])


@pytest.mark.parametrize("what", ["file", "config.json", "modelwright.json"])
def test_target_that_exists_is_one_sentence(tiny: Tiny, room: Path, refuse: Refuse, what: str) -> None:
    if what == "file":
        (room / "out").write_text("mine")
    else:
        (room / "out").mkdir()
        (room / "out" / what).write_text("mine")
    refuse(*upcycle(tiny("llama")), words=[str(room / "out"), "exists already"])


def test_base_for_a_target_is_one_sentence(tiny: Tiny, refuse: Refuse) -> None:
    refuse(*upcycle(tiny("llama"), to=tiny("llama")), words=["exists already"])
