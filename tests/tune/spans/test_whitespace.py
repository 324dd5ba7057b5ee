"""White space of code: tokens for it, the paper's clean-up, and the way back."""

import sysconfig
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import tiny_t5
from modelwright.tune.spans.whitespace import SPACE, TOKENS, add_tokens, decode, read, write

CODE = "def f(x):\n    if x:\n\t\treturn  1 \n      # six\n\n  y = [x,\n       2]\n"


def metaspace() -> Any:
    """A tokenizer of ASCII characters that treats white space as SentencePiece does."""
    import transformers as T

    words = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "▁", *(chr(c) for c in range(33, 127))])}
    core = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\t", " "), normalizers.Replace("\n", " ")])
    core.normalizer = normalizers.Sequence([core.normalizer, normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()])
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return T.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = metaspace()
    add_tokens(made)
    return made


def back(tokenizer: Any, text: str, spaces: Any) -> str:
    return decode(tokenizer, tokenizer(write(text, spaces))["input_ids"])


def test_indentation_alone_is_written_with_tokens() -> None:
    assert write("a  b\n   c d\n\te") == f"a  b\n{SPACE * 3}c d\n\te"
    assert write("  a\n b", "none") == "  a\n b"
    assert write("  a  b \n c", "all") == f"{SPACE * 2}a{SPACE * 2}b{SPACE}\n{SPACE}c"


def test_clean_up_takes_one_space_after_each_token_and_no_other() -> None:
    text = f"<pad> def f():\n {SPACE * 4} {SPACE * 2} return 1\n \t x  y</s> <unk> <pad>"
    assert read(text) == "def f():\n      return 1\n\tx  y"
    assert read(f"a{SPACE * 7} b") == "a" + " " * 7 + "b"


def test_tokens_are_added_once_and_longest_first(tokenizer: Any) -> None:
    assert add_tokens(tokenizer) == 0
    ids = tokenizer(SPACE * 7)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [SPACE * 4, SPACE * 2, SPACE]
    assert len(set(tokenizer.convert_tokens_to_ids(list(TOKENS)))) == 5


def test_code_comes_back_whole(tokenizer: Any) -> None:
    assert back(tokenizer, CODE, "all") == CODE
    assert back(tokenizer, CODE, "indent") == CODE.replace("return  1 \n", "return 1\n"), "the paper's rule keeps indentation alone"
    assert back(tokenizer, CODE, "none") != CODE and "\n    if" not in back(metaspace(), CODE, "none")


def test_every_ascii_file_of_a_package_comes_back_whole(tokenizer: Any) -> None:
    files = sorted(Path(sysconfig.get_paths()["stdlib"], "json").glob("*.py")) + sorted(Path(sysconfig.get_paths()["stdlib"]).glob("a*.py"))
    texts = [t for f in files if (t := f.read_text("utf-8", "replace")).isascii() and not set(t) & set("\r\f\v\0")]
    assert len(texts) > 5
    assert [f for f, t in zip(files, texts, strict=False) if back(tokenizer, t, "all") != t] == []


def test_decoding_a_trained_tokenizer_s_text() -> None:
    made = tiny_t5.tokenizer_of(["for i in range(10): print(i)"] * 5, vocab=60, sentinels=5)
    add_tokens(made)
    assert back(made, "for i in range(10):\n    print(i)\n", "indent") == "for i in range(10):\n    print(i)\n"
