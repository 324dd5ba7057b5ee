"""generate and chat: what is written follows the prompt, the template, the seed and the evicted cache."""

import io
import json
import shutil
from pathlib import Path

import pytest

from modelwright.cli import app as cli

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The seedling with a chat template."""
    from modelwright.core.model.checkpoint import SEEDLING

    folder = Path(shutil.copytree(SEEDLING, tmp_path_factory.mktemp("talker") / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def _call(*argv: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in argv])
    return int(caught.value.code or 0)


@pytest.fixture
def answers(capsys: pytest.CaptureFixture[str]):
    """answers(*argv) -> the results of `generate --json`."""

    def call(*argv: object) -> list[dict]:
        assert _call("generate", *argv, "--max-new-tokens", 8, "--json") == 0
        return json.loads(capsys.readouterr().out)["results"]

    return call


def test_greedy_answers_are_the_model_s_own_and_do_not_depend_on_the_other_prompts(answers) -> None:
    import torch

    from modelwright.core.model.checkpoint import Checkpoint

    both = answers("--base", "seedling", "import os", "def read(")
    source = Checkpoint("seedling")
    tokenizer, model = source.tokenizer(), source.model()
    for row in both:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=0)
        assert row["answers"] == [tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)]
    assert answers("--base", "seedling", "def read(") == both[1:]


def test_sampling_follows_the_seed(answers) -> None:
    def sampled(seed: int) -> list[str]:
        return answers("--base", "seedling", "import", "--temperature", 1.5, "--samples", 3, "--seed", seed)[0]["answers"]

    first = sampled(1)
    assert first == sampled(1) != sampled(2) and len(set(first)) > 1
    cold = answers("--base", "seedling", "import", "--temperature", 1.5, "--top-k", 1)
    assert cold[0]["answers"] == answers("--base", "seedling", "import")[0]["answers"], "one token to choose from is greedy"


def test_a_whole_cache_changes_nothing_and_a_small_one_is_used(answers) -> None:
    prompt = "def read(self, size=-1):\n    pass\n\n" * 6
    plain = answers("--base", "seedling", prompt)
    assert answers("--base", "seedling", prompt, "--evict", "key_norm", "--keep", 1.0) == plain
    assert answers("--base", "seedling", prompt, "--evict", "random", "--keep", 0.1)[0]["answers"] != plain[0]["answers"]


def test_chats_are_rendered_by_the_template(answers, talker: str, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "import os"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"messages": chat * 2}) + "\n")
    (tmp_path / "one.json").write_text(json.dumps(chat))
    raw = answers("--base", talker, "user: import os\nassistant:")[0]["answers"]
    for given in (["--chat", tmp_path / "c.jsonl"], ["--chat", tmp_path / "one.json"], ["import os", "--template"]):
        assert answers("--base", talker, *given)[0]["answers"] == raw
    system = answers("--base", talker, "import os", "--system", "Be brief.")[0]
    assert system["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert system["prompt_tokens"] > answers("--base", talker, "import os", "--template")[0]["prompt_tokens"]


def test_prompts_come_from_files_and_standard_input(answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("import os\nimport re")
    (tmp_path / "p.jsonl").write_text('{"text": "import os"}\n{"text": "def f("}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("class A"))
    rows = answers("--base", "seedling", "-", "--file", tmp_path / "p.jsonl")
    assert [r["prompt"] for r in rows] == ["class A", "import os", "def f("]
    assert answers("--base", "seedling", "--file", tmp_path / "p.txt")[0]["prompt"] == "import os\nimport re"


def test_the_answer_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--base", "seedling", "x = a[", "--max-new-tokens", "8"]
    assert _call(*argv, "--json") == 0
    answer = json.loads(capsys.readouterr().out)["results"][0]["answers"][0]
    assert _call(*argv) == 0
    assert capsys.readouterr().out == answer + "\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "nothing to continue"),
        (["x", "--samples", "2"], "needs sampling"),
        (["x", "--temperature", "nan"], "--temperature"),
        (["x", "--temperature", "1", "--top-p", "0"], "leaves no token"),
        (["x", "--evict", "nalc"], "did you mean 'nacl'?"),
        (["x", "--template"], "no chat template"),
        (["x", "--system", "y"], "no chat template"),
        (["x", "--seed", "-1"], "--seed -1"),
        (["x" * 9000], "do not fit"),
        ([""], "the prompt is empty"),
        (["--chat", "none.jsonl"], "none.jsonl"),
        (["--file", "none.txt"], "none.txt"),
        (["--column", "text"], "--column"),
        (["x", "--base", "./none"], "none"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("generate", "--base", "seedling", *argv) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("rows", ['{"messages": "hello"}', '{"messages": [{"role": "user"}]}', '{"text": "x"}', '{"messages": []}'])
def test_a_row_that_is_no_chat_is_one_sentence(rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.jsonl").write_text(rows + "\n")
    assert _call("generate", "--base", "seedling", "--chat", tmp_path / "c.jsonl") == 2
    assert "c.jsonl" in capsys.readouterr().err


def _talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, *argv: object) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert _call("chat", "--temperature", 0, "--max-new-tokens", 8, *argv) == 0
    return capsys.readouterr()


def test_a_pipe_is_a_conversation(talker: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = "import os\n\nagain\n/new\nimport os\n/exit\nnever\n"
    turns = json.loads(_talk(monkeypatch, capsys, text, "--base", talker, "--json")[0])["turns"]
    assert [t["user"] for t in turns] == ["import os", "again", "import os"]
    assert turns[2] == turns[0], "/new forgets what was said"
    printed, err = _talk(monkeypatch, capsys, text, "--base", talker)
    assert printed == "".join(t["assistant"] + "\n" for t in turns) and not err


def test_the_second_turn_sees_the_first(talker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelwright.cli.chat import Conversation
    from modelwright.cli.talk import Sampling, Speaker

    speaker = Speaker(talker, Sampling(8))
    talk = Conversation(speaker, "Be brief.")
    first = talk.answer("import os")
    seen = talk._prompt("again")
    assert [m["content"] for m in seen] == ["Be brief.", "import os", first, "again"]
    for _ in range(80):  # far beyond the context of 512
        talk.turns.append(("word " * 5, "word " * 5))
    talk.answer("last")
    assert talk.dropped > 0 and talk.turns[-1][0] == "last"
    assert talk._fitting("x").shape[1] <= 512 - 8, "there is room for the answer"


def test_without_a_template_lines_are_continued_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answers
) -> None:
    out, err = _talk(monkeypatch, capsys, "import os\n", "--base", "seedling")
    assert "note: the tokenizer of seedling has no chat template" in err
    assert out == answers("--base", "seedling", "import os")[0]["answers"][0] + "\n"
