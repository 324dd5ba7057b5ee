"""`modelwright push`: a result goes to the Hugging Face hub, after the checks that can be made here."""

import os
from pathlib import Path
from typing import Any

from modelwright.cli.output import print_json, resumable, say
from modelwright.core.errors import UserError, short


def push(folder: str, repo: str, public: bool, message: str, dry_run: bool, as_json: bool) -> dict[str, Any]:
    """Upload the files of a result. Raises UserError where the folder is no whole checkpoint, or the hub refuses."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"'{repo}' is no name for a repository", short(error), "write user/name") from None
    if repo.count("/") != 1:
        raise UserError(f"'{repo}' is no name for a repository", "it has no owner", "write user/name")
    path = _checked(folder)
    files = sendable(path)
    total = sum((path / f).stat().st_size for f in files)
    plan = {"folder": str(path), "repo": repo, "private": not public, "bytes": total, "files": files, "sent": False}
    if not dry_run:
        with resumable():
            plan |= {"sent": True, "url": _send(path, repo, public, message, files)}
    if as_json:
        print_json(plan)
        return plan
    for f in files:
        say(f"{(path / f).stat().st_size:>14,}  {f}")
    say(f"{total:>14,}  bytes, {'private' if not public else 'public'}: {plan.get('url', f'nothing was sent to {repo} (--dry-run)')}")
    return plan


def _checked(folder: str) -> Path:
    """The folder of a whole checkpoint with a model card that the hub can read."""
    from huggingface_hub import ModelCard

    from modelwright.core.model.checkpoint import Checkpoint

    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"no folder at {folder}", "what is pushed is a result on this machine", "check the path")
    Checkpoint(path)  # whole shards, a config, no pickle, not incomplete
    card = path / "README.md"
    if not card.is_file():
        raise UserError(f"{folder} has no model card", "README.md is what people see on the hub", "write one, or push a result of a recipe")
    try:
        ModelCard(card.read_text(encoding="utf-8"))
    except Exception as error:  # YAML, encoding, or a field of the wrong kind
        raise UserError(f"the model card {card} cannot be read", short(error), "mend the block between the --- lines at its head") from None
    return path


def sendable(folder: Path) -> list[str]:
    """Regular files of the folder, by name; hidden ones and links to other places stay here."""
    found = []
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(d for d in folders if not d.startswith(".") and not os.path.islink(os.path.join(at, d)))
        for name in files:
            file = Path(at) / name
            if not name.startswith(".") and file.is_file() and not file.is_symlink():
                found.append(file.relative_to(folder).as_posix())
    return sorted(found)


def _send(path: Path, repo: str, public: bool, message: str, files: list[str]) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, repo_type="model", private=not public, exist_ok=True)
        open_already = not public and not api.repo_info(repo, repo_type="model").private
        if not open_already:
            allowed = [_literal(f) for f in files]
            return str(api.upload_folder(repo_id=repo, repo_type="model", folder_path=path, allow_patterns=allowed, commit_message=message))
    except Exception as error:  # no token, no network, no right: each has a class of its own
        raise UserError(f"{repo} could not be written", short(error), "`hf auth login`, and check the name and the network") from None
    raise UserError(
        f"{repo} is public already", "nothing was sent, because a push is private unless told", "give --public, or another name"
    )


def _literal(name: str) -> str:
    """A file name as a pattern that fits it alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
