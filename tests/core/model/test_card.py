"""The head of a model card is what the hub reads: its own library parses it, and only hub ids are named."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from modelwright.core.errors import UserError
from modelwright.core.model.portable import card_metadata

STEPS: list[dict[str, Any]] = [
    {"step": "reshape.upcycle", "knobs": {"experts": 4, "others": []}},
    {"step": "tune.full", "knobs": {"data": {"path": "roneneldan/TinyStories", "split": "train"}, "evals": {}}},
]


def read(metadata: dict[str, Any], folder: Path) -> Any:
    """The card as the hub's library reads it."""
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n# a model\n", encoding="utf-8")
    data = ModelCard.load(folder / "README.md").data
    for name in [data.base_model] if isinstance(data.base_model, str) else data.base_model or []:
        validate_repo_id(name)
    for name in data.datasets or []:
        validate_repo_id(name)
    return data


def test_the_hub_reads_base_datasets_library_and_tags(tmp_path: Path) -> None:
    data = read(card_metadata("Qwen/Qwen3-0.6B", None, STEPS, "Qwen3MoeForCausalLM"), tmp_path)
    assert data.base_model == "Qwen/Qwen3-0.6B" and data.base_model_relation == "finetune"
    assert data.datasets == ["roneneldan/TinyStories"]
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.tags == ["modelwright", "reshape.upcycle", "tune.full"] and data.license is None


def test_license_and_language_are_those_of_the_base(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    own = {
        "license": "other",
        "license_name": "own-terms",
        "license_link": "LICENSE",
        "language": ["en"],
        "base_model": "a/first",
        "datasets": ["a/d"],
    }
    (base / "README.md").write_text(f"---\n{yaml.safe_dump(own)}---\ntext\n")
    data = read(card_metadata(str(base), base, STEPS, "LlamaForCausalLM"), out)
    assert (data.license, data.license_name, data.license_link, data.language) == ("other", "own-terms", "LICENSE", ["en"])
    assert data.base_model == "a/first" and data.datasets == ["a/d", "roneneldan/TinyStories"]


def test_paths_of_this_machine_are_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "moe").mkdir(parents=True)
    steps = [{"step": "tune.full", "knobs": {"data": {"path": p}}} for p in ("data/corpus.txt", "/x/y.jsonl", "../z/w", "out/moe")]
    found = card_metadata("out/moe", tmp_path / "out" / "moe", steps, "LlamaForCausalLM")
    assert not {"base_model", "datasets", "license", "base_model_relation"} & found.keys()
    assert found["tags"] == ["modelwright", "tune.full"]
    read(found, tmp_path)


def test_a_mixture_of_several_models_is_a_merge_and_our_classes_need_our_library(tmp_path: Path) -> None:
    steps = [{"step": "reshape.upcycle", "knobs": {"others": ["b/two", "c/three"]}}]
    data = read(card_metadata("a/one", None, steps, "MixtralForCausalLM"), tmp_path)
    assert data.base_model == ["a/one", "b/two", "c/three"] and data.base_model_relation == "merge" and "merge" in data.tags
    assert card_metadata("a/one", None, [], "RMoEForCausalLM")["library_name"] == "modelwright"


def test_a_base_without_a_block_gives_nothing_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# no block\n---\nlicense: mit\n---\n")
    assert "license" not in card_metadata("a/b", tmp_path, [], "LlamaForCausalLM")
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(UserError, match="not valid YAML"):
        card_metadata("a/b", tmp_path, [], "LlamaForCausalLM")
