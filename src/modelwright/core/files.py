"""Files: fingerprints of what was read, writing in one rename, what the disk says. Imports nothing heavy."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError


def fingerprint(*files: Path) -> str:
    """sha256 over the files: whole up to 64 MB each, beyond that size, header and 64 samples of 64 KiB."""
    import hashlib  # light commands do without it

    digest, sampled = hashlib.sha256(), False
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with open(file, "rb") as f:
            if size <= 64 << 20:
                digest.update(f.read())
                continue
            sampled = True
            for i in range(64):
                f.seek(i * (size - (64 << 10)) // 63)
                digest.update(f.read(64 << 10))
    return ("sha256-sampled:" if sampled else "sha256:") + digest.hexdigest()


def fingerprint_path(path: Path) -> str:
    """The fingerprint of a file, or of the files of a folder."""
    return fingerprint(*(sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]))


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk says (no space, no permission) into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no disk space left for {path}", how="free some or choose another folder") from error
        refusals = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT, errno.EINVAL)
        if error.errno in refusals:
            raise UserError(f"cannot write {path}", (error.strerror or "the system refuses").lower(), "choose another folder") from error
        raise


def write_json(file: Path, value: Any) -> None:
    """Plain values to a file, in one rename. A number that is not finite becomes null."""
    part = file.with_name(file.name + ".tmp")
    part.write_text(json.dumps(finite(value), indent=1, default=str, allow_nan=False) + "\n")
    part.replace(file)


def finite(value: Any) -> Any:
    """The same plain values with null in place of NaN and infinity, which JSON cannot hold."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def expanded(path: str | Path) -> Path:
    """A path as the system will take it, with ~ replaced. UserError for one that no system takes."""
    text = str(path)
    shown = text if len(text) <= 80 else text[:77] + "..."
    if "\0" in text:
        raise UserError(f"{shown.replace(chr(0), '?')} is no path", "it holds a zero byte")
    try:
        found = Path(text).expanduser()
        os.path.lexists(found)
        os.stat(found)
    except RuntimeError:
        raise UserError(f"{shown} is no path", "there is no such user", "write the folder out") from None
    except UnicodeEncodeError:
        raise UserError("the path is none", "it holds half of a surrogate pair, which is no character", "write it anew") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{shown} is no path", f"it has {len(text)} characters, more than the system takes") from None
    return found


def is_running(process: str) -> bool:
    """Whether another process of this machine has that number."""
    return process.isdigit() and int(process) != os.getpid() and Path(f"/proc/{process}").exists()
