"""Resumable states: folders `checkpoint-N` that are marked when they are whole, checked before they are used, and rotated.

The mark, written last, holds the fingerprint of every file of the state. A state that was cut off or damaged is passed over for the one
before it, and the run says so.
"""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError
from modelwright.core.files import fingerprint, write_json

COMPLETE = "complete.json"
KEPT = 2


def step_of(state: Path) -> int:
    """The step that a folder `checkpoint-N` was saved at."""
    return int(state.name.split("-")[1])


def all_states(folder: Path) -> list[Path]:
    """Every state folder, whole or not, oldest first."""
    return sorted((p for p in folder.glob("checkpoint-*") if p.name.split("-")[1].isdigit()), key=step_of)


def mark_complete(state: Path, facts: dict[str, Any], keep: int = KEPT) -> None:
    """Say that a state is whole, and remove older ones than the last `keep`."""
    files = {str(f.relative_to(state)): fingerprint(f) for f in sorted(state.rglob("*")) if f.is_file() and f.name != COMPLETE}
    write_json(state / COMPLETE, facts | {"files": files})
    for old in all_states(state.parent)[:-keep]:
        (old / COMPLETE).unlink(missing_ok=True)  # unmarked first: a state half removed is no state
        shutil.rmtree(old)


def facts_of(state: Path) -> dict[str, Any] | None:
    """What `mark_complete` was given; None unless the state is whole and every file is as it was."""
    try:
        facts = json.loads((state / COMPLETE).read_text())
        whole = all(fingerprint(state / name) == value for name, value in facts["files"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return facts if whole else None


def latest_state(folder: Path) -> Path | None:
    """The newest state that is whole."""
    return next((p for p in reversed(all_states(folder)) if facts_of(p) is not None), None)


def damaged_states(folder: Path) -> list[str]:
    """Names of states that were saved whole and are not any more."""
    return [p.name for p in all_states(folder) if (p / COMPLETE).exists() and facts_of(p) is None]


def remove_unfinished(folder: Path) -> None:
    """Remove what is no state."""
    for p in all_states(folder):
        if facts_of(p) is None:
            shutil.rmtree(p, ignore_errors=True)


def disk_sentence(error: BaseException, state: Path) -> UserError | None:
    """What a failed save says where the disk was full; the half state is removed and older ones stay."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    writer = isinstance(error, RuntimeError) and any(
        w in str(error) for w in ("inline_container", "PytorchStreamWriter", "file write failed")
    )
    if not (full or (writer and shutil.disk_usage(state.parent).free < 64 << 20)):
        return None
    shutil.rmtree(state, ignore_errors=True)
    return UserError(
        f"no disk space left for the state {state}", "what was saved before it is still there", "free some and give the same command again"
    )
