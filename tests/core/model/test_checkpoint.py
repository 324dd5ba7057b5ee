"""Checkpoints: lazy tensors equal the loaded model's, and whatever is wrong with a folder is one sentence that names it."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from families import FAMILIES
from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint, read_header, require_finite
from modelwright.core.model.classes import config_of, disk_shapes, model_class

Tiny = Callable[..., Path]
NAN = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of a tiny Llama that a test may spoil."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "llama"))


@pytest.fixture
def sharded(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama", shard="20KB"), tmp_path / "sharded"))


def sentence(caught: Any, *words: str) -> None:
    """The error is one sentence that a person can read and that holds the words."""
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500, text
    for word in words:
        assert word in text


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = change(json.loads(raw[8:end]))
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])


# ---- reading ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "opt", "t5", "qwen3"])
def test_lazy_tensors_equal_the_loaded_model_s(tiny: Tiny, kind: str, shard: str) -> None:
    checkpoint = Checkpoint(tiny(kind, shard=shard))
    assert (len(checkpoint.files) > 2) == (shard == "20KB")  # more shards than are held open at once
    names = list(checkpoint.table)
    random.Random(0).shuffle(names)
    state = FAMILIES[kind][1].from_pretrained(checkpoint.folder).state_dict()
    assert set(names) <= set(state)
    for name in [*names, *names[:3]]:
        tensor = checkpoint.get(name)
        assert torch.equal(tensor, state[name])
        assert name in checkpoint and checkpoint.shape(name) == tuple(tensor.shape) and checkpoint.dtype(name) == tensor.dtype


@pytest.mark.parametrize("kind, dtype", [("llama", "bfloat16"), ("gpt2", "float16"), ("mixtral", "bfloat16")])
def test_model_is_loaded_as_stored_or_as_asked(tiny: Tiny, kind: str, dtype: str) -> None:
    checkpoint = Checkpoint(tiny(kind, dtype=dtype))
    assert {p.dtype for p in checkpoint.model().parameters()} == {getattr(torch, dtype)} == {checkpoint.dtype(n) for n in checkpoint.table}
    assert {p.dtype for p in checkpoint.model(torch.float32).parameters()} == {torch.float32}


def test_skeleton_takes_no_memory_and_has_the_model_s_shapes(tiny: Tiny) -> None:
    checkpoint = Checkpoint(tiny("mixtral"))
    assert all(p.is_meta for p in checkpoint.skeleton.parameters())
    assert {n: p.shape for n, p in checkpoint.skeleton.named_parameters()} == {n: p.shape for n, p in checkpoint.model().named_parameters()}


def test_shards_add_up(tiny: Tiny) -> None:
    one, many = Checkpoint(tiny("llama")), Checkpoint(tiny("llama", shard="20KB"))
    assert one.table.keys() == many.table.keys()
    assert many.bytes() == sum(f.stat().st_size for f in many.folder.glob("*.safetensors")) > one.bytes()


def test_only_the_tensor_that_is_read_is_looked_at(folder: Path) -> None:
    edit_tensors(folder, lambda t: t[NAN].view(-1)[5:6].fill_(float("nan")))
    checkpoint = Checkpoint(folder)
    assert checkpoint.get("model.layers.0.mlp.up_proj.weight").isfinite().all()
    with pytest.raises(UserError, match=NAN):
        checkpoint.get(NAN)


def test_fingerprint_is_of_the_content(folder: Path, tiny: Tiny) -> None:
    assert Checkpoint(folder).fingerprint() == Checkpoint(tiny("llama")).fingerprint()
    edit_tensors(folder, lambda t: t[NAN].view(-1)[5:6].add_(1e-6))
    assert Checkpoint(folder).fingerprint() != Checkpoint(tiny("llama")).fingerprint()


def test_fingerprint_sees_the_config(folder: Path, tiny: Tiny) -> None:
    edit_config(folder, rms_norm_eps=1e-3)
    assert Checkpoint(folder).fingerprint() != Checkpoint(tiny("llama")).fingerprint()


def test_tokenizer_is_none_where_there_is_none(tiny: Tiny, stories: Path) -> None:
    assert Checkpoint(tiny("llama")).tokenizer() is None
    assert len(Checkpoint(stories).tokenizer()) == 512
    assert {p.name for p in Checkpoint(stories).companions()} == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


# ---- what is written -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", FAMILIES)
def test_disk_shapes_are_what_save_pretrained_writes(tiny: Tiny, kind: str) -> None:
    checkpoint = Checkpoint(tiny(kind))
    assert disk_shapes(checkpoint.hf_config) == {n: tuple(row["shape"]) for n, row in checkpoint.table.items()}


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("granitemoe", {"tie_word_embeddings": True}),
        ("mixtral", {"tie_word_embeddings": True, "num_local_experts": 7}),
        ("qwen2_moe", {"mlp_only_layers": [0]}),
        ("qwen3_moe", {"attention_bias": True, "num_experts": 11}),
    ],
)
def test_disk_shapes_follow_the_config(tiny: Tiny, kind: str, changes: dict[str, Any]) -> None:
    checkpoint = Checkpoint(tiny(kind, **changes))
    assert disk_shapes(checkpoint.hf_config) == {n: tuple(row["shape"]) for n, row in checkpoint.table.items()}


# ---- what is refused: the folder -------------------------------------------------------------------------------------
def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Checkpoint(tmp_path / "nothing")
    sentence(caught, str(tmp_path / "nothing"), "no folder")


def test_unknown_hub_id_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        Checkpoint("nobody/nothing-at-all")
    sentence(caught, "nobody/nothing-at-all", "neither a folder nor a hub id")


def test_file_instead_of_folder_is_refused(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        Checkpoint(folder / "model.safetensors")
    sentence(caught, "model.safetensors is a file", "a checkpoint is a folder")


def test_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    sentence(caught, str(folder), "no config.json")


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe\x00", b"[]", b"3", b"null", b'"llama"', b"{}", b"[" * 100_000])
def test_config_that_is_no_mapping_with_a_type_is_refused(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    sentence(caught, str(folder / "config.json"))


def test_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    sentence(caught, str(folder), "no model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_pickle_checkpoint_is_refused_unopened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"not opened")
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    sentence(caught, name, "pickle")


def test_safetensors_are_taken_where_a_pickle_lies_beside_them(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not opened")
    assert Checkpoint(folder).files == [folder / "model.safetensors"]
    Checkpoint(folder).model()


def test_adapter_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    sentence(caught, str(folder), "adapter", "merge it first")


def test_bare_adapter_folder_is_called_an_adapter(folder: Path) -> None:
    """PEFT writes no config.json beside an adapter."""
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    sentence(caught, str(folder), "adapter")


def test_remote_code_is_refused(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    sentence(caught, str(folder), "auto_map", "remote code is never run")


def test_folder_marked_incomplete_is_refused(folder: Path) -> None:
    (folder / "INCOMPLETE").write_text("1\n")
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    sentence(caught, str(folder), "incomplete")
    Checkpoint(folder, incomplete=True).model()


# ---- what is refused: weight files -----------------------------------------------------------------------------------
@pytest.mark.parametrize("cut", [0, 7, 8, 500, -1, -50_000])
def test_truncated_file_is_refused_on_opening(folder: Path, cut: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    sentence(caught, str(path), "copy or download it again")


def test_file_with_bytes_too_many_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    sentence(caught, str(path), "1 bytes too many")


NORM = "model.norm.weight"
HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "not json": lambda t: b"\xff" * 64,
    "cut json": lambda t: json.dumps(t).encode()[:-20],
    "a list": lambda t: [1],
    "empty": lambda t: {},
    "a row that is a number": lambda t: {**t, NORM: 5},
    "a row without offsets": lambda t: {**t, NORM: {"dtype": "F32", "shape": [32]}},
    "offsets that are text": lambda t: {**t, NORM: {**t[NORM], "data_offsets": "x"}},
    "brackets without end": lambda t: b"[" * 100_000,
}


@pytest.mark.parametrize("damage", HEADERS)
def test_damaged_header_is_refused_on_opening(folder: Path, damage: str) -> None:
    edit_header(folder, HEADERS[damage])
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    sentence(caught, str(folder / "model.safetensors"))


@pytest.mark.parametrize("row", [{"shape": [31]}, {"shape": [64]}, {"shape": [16, 4]}, {"dtype": "F6"}, {"dtype": "I64"}])
def test_header_that_contradicts_itself_is_refused(folder: Path, row: dict[str, Any]) -> None:
    edit_header(folder, lambda t: {**t, NORM: {**t[NORM], **row}})
    for use in (lambda c: c.get(NORM), lambda c: c.model()):
        with pytest.raises(UserError) as caught:
            use(Checkpoint(folder))
        sentence(caught, str(folder))


def test_type_that_is_not_known_is_refused(folder: Path) -> None:
    """U16 is a type of the format that no weight of ours has."""
    edit_header(folder, lambda t: {**t, NORM: {**t[NORM], "dtype": "U16", "shape": [64]}})
    with pytest.raises(UserError) as caught:
        Checkpoint(folder).dtype(NORM)
    sentence(caught, NORM, "U16")


def test_missing_shard_is_refused_on_opening(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError) as caught:
        Checkpoint(sharded)
    sentence(caught, gone.name, "missing", "index")


def test_truncated_shard_is_refused_on_opening(sharded: Path) -> None:
    cut = sorted(sharded.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-3])
    with pytest.raises(UserError) as caught:
        Checkpoint(sharded)
    sentence(caught, cut.name, "truncated")


@pytest.mark.parametrize("text", ["{", "", "{}", "[]", "3", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_damaged_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError) as caught:
        Checkpoint(sharded)
    sentence(caught, "model.safetensors.index.json")


def test_index_does_not_lead_out_of_the_folder(sharded: Path, folder: Path) -> None:
    edit_tensors(folder, lambda t: None)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], str(folder / "model.safetensors"))
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        Checkpoint(sharded)
    sentence(caught, "model.safetensors.index.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_not_finite_are_refused(tiny: Tiny, tmp_path: Path, value: float, dtype: str) -> None:
    folder = Path(shutil.copytree(tiny("llama", dtype=dtype), tmp_path / "x"))
    edit_tensors(folder, lambda t: t[NAN].view(-1)[-1:].fill_(value))
    for use in (lambda c: c.get(NAN), lambda c: c.model(), lambda c: c.model(torch.float32)):
        with pytest.raises(UserError) as caught:
            use(Checkpoint(folder))
        sentence(caught, NAN, str(folder), "not finite")


def test_largest_finite_values_and_empty_tensors_are_accepted() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        top = torch.finfo(dtype).max
        require_finite("x", torch.tensor([top, -top], dtype=dtype), "here")
    require_finite("x", torch.zeros(0), "here")
    require_finite("x", torch.tensor([2**62]), "here")


# ---- what is refused: config and weights that do not belong together -------------------------------------------------
def test_tensor_that_the_config_promises_and_no_file_holds_is_refused(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.pop(NORM))
    checkpoint = Checkpoint(folder)
    assert NORM not in checkpoint
    for use in (lambda: checkpoint.get(NORM), lambda: checkpoint.shape(NORM), lambda: checkpoint.dtype(NORM), lambda: checkpoint.model()):
        with pytest.raises(UserError) as caught:
            use()
        sentence(caught, str(folder), NORM)


def test_layer_that_only_the_config_has_is_refused(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(UserError) as caught:
        Checkpoint(folder).model()
    sentence(caught, str(folder), "model.layers.2.")


def test_tensor_that_the_config_does_not_know_is_refused(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(UserError) as caught:
        Checkpoint(folder).model()
    sentence(caught, str(folder), "model.layers.1.")


@pytest.mark.parametrize("changes", [{"vocab_size": 97}, {"intermediate_size": 40}, {"num_key_value_heads": 4}])
def test_shape_that_the_config_does_not_have_is_refused(folder: Path, changes: dict[str, int]) -> None:
    edit_config(folder, **changes)
    for use in (lambda c: c.model(), lambda c: [c.get(n) for n in c.skeleton.state_dict()]):
        with pytest.raises(UserError) as caught:
            use(Checkpoint(folder))
        sentence(caught, str(folder))


@pytest.mark.parametrize("kind", ["wobble", "vit", 3, None, ["llama"]])
def test_unknown_model_type_is_refused(folder: Path, kind: Any) -> None:
    edit_config(folder, model_type=kind, architectures=None)
    with pytest.raises(UserError) as caught:
        _ = Checkpoint(folder).skeleton
    sentence(caught, str(kind))


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"num_key_value_heads": 0}, ""),
        ({"hidden_size": 33}, "33"),
        ({"head_dim": 7}, "7"),
        ({"vocab_size": -5}, ""),
        ({"hidden_act": "wobble"}, "wobble"),
        ({"rope_parameters": {"rope_type": "wobble"}}, "wobble"),
        ({"dtype": "float99"}, "float99"),
    ],
)
def test_config_that_makes_no_model_is_refused(folder: Path, changes: dict[str, Any], word: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UserError) as caught:
        _ = Checkpoint(folder).skeleton
    sentence(caught, word)


def test_quantized_checkpoint_is_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError) as caught:
        Checkpoint(folder).model()
    sentence(caught, str(folder))


@pytest.mark.parametrize(
    "name, text", [("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("tokenizer_config.json", "{"), ("tokenizer_config.json", "[]")]
)
def test_damaged_tokenizer_is_refused(stories: Path, tmp_path: Path, name: str, text: str) -> None:
    for path in stories.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        Checkpoint(tmp_path).tokenizer()
    sentence(caught, str(tmp_path), "tokenizer")


def test_damaged_lineage_is_refused(folder: Path) -> None:
    (folder / "modelwright.json").write_text("{")
    with pytest.raises(UserError) as caught:
        _ = Checkpoint(folder).lineage
    sentence(caught, "modelwright.json")


def test_model_class_is_the_one_the_config_names(folder: Path) -> None:
    assert model_class(Checkpoint(folder).hf_config) is transformers.LlamaForCausalLM
    for unknown in (None, ["WobbleForCausalLM"], ["pipeline"]):  # the last is a function of transformers
        edit_config(folder, architectures=unknown)
        assert model_class(Checkpoint(folder).hf_config) is transformers.LlamaForCausalLM
    assert model_class(config_of({"model_type": "bert", "architectures": ["BertForMaskedLM"]})) is transformers.BertForMaskedLM


def test_header_is_read_without_the_metadata_row(folder: Path) -> None:
    assert read_header(folder / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
