"""cache.generate from the command line: what it writes, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modelwright.cache.evictors.names import METHODS
from modelwright.cli import app as cli
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import Built, write_model
from modelwright.models.causal import cast_weights
from modelwright.models.rmoe import RMoEConfig, RMoEForCausalLM

PROMPT = "def read(self, size=-1):\n    return self.buffer[:size]\n" * 5


def run(capsys: pytest.CaptureFixture[str], *argv: Any, code: int = 0) -> dict[str, Any]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["cache", "generate", "--base", "seedling", *map(str, argv), "--json"])
    out, err = capsys.readouterr()
    assert caught.value.code == code, err
    return json.loads(out)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_answers_and_keeps_its_budget(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text(PROMPT)
    settings = ["--settings", "{observe: 8}"] if "kv" in name else []
    m = run(capsys, "--prompt-file", tmp_path / "p.txt", "--evict", name, "--keep", 0.25, "--max-new-tokens", 4, "--compare", *settings)
    m = m["metrics"]
    token = 4 * 2 * 2 * 32 * 4  # layers, key and value, heads, width, bytes
    assert m["full_cache_bytes"] == (m["prompt_tokens"] + 3) * token
    assert abs(m["cache_bytes"] / token - 3 - m["prompt_tokens"] / 4) <= 1 and m["same_tokens"] >= 1


@pytest.mark.slow
def test_a_fresh_process_answers_with_a_bf16_mixture_of_our_own_and_of_odd_width(tmp_path: Path) -> None:
    """Nothing else has made our classes known there, or mended transformers' grouped product."""
    sizes = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 42, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = RMoEForCausalLM(RMoEConfig(**sizes, num_key_value_heads=2, num_local_experts=4, router_width=4, pad_token_id=0))
    cast_weights(model, torch.bfloat16)
    write_model(Built(model, source=Checkpoint("seedling")), tmp_path, 1 << 30)
    command = [sys.executable, "-m", "modelwright", "cache", "generate", "--base", tmp_path, "--prompt", PROMPT, "--max-new-tokens", "2"]
    done = subprocess.run([*map(str, command), "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["metrics"]["new_tokens"] == 2


def test_keeping_all_answers_as_the_full_cache(capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--beams", 2], ["--temperature", 1, "--seed", 3], ["--chunk", 16], ["--question", "def write("]):
        m = run(capsys, "--prompt", PROMPT, "--keep", 1, "--max-new-tokens", 6, "--compare", *more)["metrics"]
        assert m["text"] == m["full_text"] and m["cache_bytes"] == m["full_cache_bytes"] and m["same_tokens"] == m["new_tokens"]


def test_a_question_is_read_after_the_eviction_also_in_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--prompt", PROMPT, "--keep", 0.3, "--max-new-tokens", 5, "--question", "def write("]
    whole, chunks = run(capsys, *how)["metrics"], run(capsys, *how, "--chunk", 16)["metrics"]
    assert whole == chunks and whole["question_tokens"] > 1
    kept = round(0.3 * whole["prompt_tokens"]) + whole["question_tokens"] + whole["new_tokens"] - 1
    assert whole["cache_bytes"] == kept * 4 * 2 * 2 * 32 * 4


def test_a_prompt_of_one_token_is_read_in_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--prompt", "a", "--max-new-tokens", 4]
    whole = run(capsys, *how)["metrics"]
    assert whole["prompt_tokens"] == 1
    assert run(capsys, *how, "--chunk", 2)["metrics"] == whole == run(capsys, *how, "--chunk", 3)["metrics"]


def test_a_chunk_that_leaves_one_token_over_is_made_larger(capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--prompt", PROMPT, "--evict", "tova", "--keep", 0.4, "--max-new-tokens", 4]
    whole = run(capsys, *how)["metrics"]
    n = whole["prompt_tokens"]
    for chunk in [c for c in range(2, n + 2) if n % c == 1 or c >= n - 1]:
        assert run(capsys, *how, "--chunk", chunk)["metrics"] == whole


@pytest.mark.parametrize("name", ["random", "nacl"])
def test_any_seed_draws(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--prompt", PROMPT, "--evict", name, "--seed", 2**32 - 1, "--max-new-tokens", 2)["metrics"]["new_tokens"]


@pytest.mark.parametrize(
    ("words", "argv"),
    [
        ("one prompt is needed", []),
        ("keep=0.0 is out of range, because it is the share", ["--prompt", PROMPT, "--keep", 0]),
        ("keep=1.5 is out of range", ["--prompt", PROMPT, "--keep", 1.5]),
        ("it protects 32", ["--prompt", PROMPT, "--evict", "snapkv", "--tokens", 9]),
        ("has no setting 'sinkss'", ["--prompt", PROMPT, "--evict", "streaming_llm", "--settings", "{sinkss: 3}"]),
        ("observe='a' does not fit snapkv", ["--prompt", PROMPT, "--evict", "snapkv", "--settings", "{observe: a}"]),
        ("recent=3 is out of range for h2o", ["--prompt", PROMPT, "--evict", "h2o", "--settings", "{recent: 3}"]),
        ("tokens do not fit", ["--prompt", PROMPT, "--max-new-tokens", 2000]),
        ("cannot be read", ["--prompt-file", "nothing.txt"]),
        ("beams do not fit a question", ["--prompt", PROMPT, "--question", "x", "--beams", 2]),
    ],
)
def test_bad_input_is_one_sentence(words: str, argv: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    error = run(capsys, *argv, code=2)["error"]
    assert words in error["what"] + ", because " + error["why"]


def test_an_encoder_is_refused(tiny, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: ANN001
    with pytest.raises(SystemExit):
        cli.main(["cache", "bench", "--base", str(tiny("bert")), "--tasks", "copy", "--context", "40"])
    assert "BertForMaskedLM has no decoder cache to evict from" in capsys.readouterr().err
