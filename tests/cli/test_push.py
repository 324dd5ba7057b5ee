"""push: what is sent is whole, readable for the hub, private unless told; and nothing is sent before that is known."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard

import modelwright
from modelwright.cli import app as cli


def _call(*argv: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in argv])
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture made from the seedling, with files beside it that stay here."""
    to = tmp_path_factory.mktemp("push") / "moe"
    modelwright.run("reshape.upcycle", base="seedling", to=to, experts=2, top_k=1)
    (to / ".secret").write_text("mine")
    os.symlink("/etc/hostname", to / "elsewhere.txt")
    return to


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list:
    """A hub that notes what it is asked; the repository is as private as it was made."""
    calls: list = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **k: calls.append(("create", repo, k)))
    monkeypatch.setattr(HfApi, "repo_info", lambda self, repo, **k: SimpleNamespace(private=repo != "me/open"))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **k: calls.append(("upload", k["repo_id"], k)) or "https://hub/me/moe")
    return calls


def test_the_card_is_one_that_the_hub_reads(result: Path) -> None:
    card = ModelCard.load(result / "README.md")
    assert card.data.library_name == "transformers" and "modelwright" in card.data.tags
    assert "reshape.upcycle" in card.text


def test_a_dry_run_lists_the_files_and_sends_nothing(result: Path, hub: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("push", result, "me/moe", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert not hub and not plan["sent"] and plan["private"]
    assert {"config.json", "model.safetensors", "README.md", "modelwright.json"} <= set(plan["files"])
    assert not {".secret", "elsewhere.txt"} & set(plan["files"])
    assert plan["bytes"] == sum((result / f).stat().st_size for f in plan["files"])


def test_a_push_is_private_unless_told(result: Path, hub: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("push", result, "me/moe", "--message", "first") == 0
    (create, upload) = hub
    assert create[:2] == ("create", "me/moe") and create[2]["private"] is True
    assert upload[2]["commit_message"] == "first" and ".secret" not in upload[2]["allow_patterns"]
    assert "https://hub/me/moe" in capsys.readouterr().out
    hub.clear()
    assert _call("push", result, "me/open", "--public") == 0
    assert hub[0][2]["private"] is False and hub[1][0] == "upload"


def test_a_public_repository_gets_nothing_by_mistake(result: Path, hub: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("push", result, "me/open") == 2
    assert "me/open is public already" in capsys.readouterr().err
    assert [c[0] for c in hub] == ["create"]


def test_what_the_hub_refuses_is_one_sentence(
    result: Path, hub: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: object, repo: str, **k: object) -> None:
        raise OSError("401 Unauthorized\nInvalid user token")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    assert _call("push", result, "me/moe") == 2
    err = capsys.readouterr().err
    assert "me/moe could not be written, because 401 Unauthorized Invalid user token" in err and err.count("\n") == 1


@pytest.mark.parametrize("fault", ["no folder", "no card", "bad card", "incomplete", "no weights", "bad name", "no owner"])
def test_what_is_not_whole_is_refused_before_anything_is_sent(
    fault: str, result: Path, hub: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder, repo = Path(shutil.copytree(result, tmp_path / "copy")), "me/moe"
    if fault == "no folder":
        folder = tmp_path / "nowhere"
    elif fault == "no card":
        (folder / "README.md").unlink()
    elif fault == "bad card":
        (folder / "README.md").write_text("---\ntags: [a\n---\n# x\n")
    elif fault == "incomplete":
        (folder / "INCOMPLETE").write_text("1")
    elif fault == "no weights":
        (folder / "model.safetensors").unlink()
    else:
        repo = {"bad name": "me/a b", "no owner": "moe"}[fault]
    assert _call("push", folder, repo) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and not hub
