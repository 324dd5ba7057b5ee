"""Where a result comes from: fingerprints of what was read, versions, the lineage file. Imports nothing heavy."""

import errno
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError

LINEAGE = "modelwright.json"


def fingerprint(*files: Path) -> str:
    """sha256 over the files: whole up to 64 MB each, beyond that size, header and 64 samples of 64 KiB."""
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


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("modelwright", "torch", "transformers", "tokenizers", "safetensors", "peft", "numpy")
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk says (no space, no permission) into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no disk space left for {path}", how="free some or choose another folder") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise UserError(f"cannot write {path}", (error.strerror or "the system refuses").lower(), "choose another folder") from error
        raise


def write_lineage(folder: Path, lineage: dict[str, Any]) -> None:
    (folder / LINEAGE).write_text(json.dumps(lineage, indent=2, default=str) + "\n")


def write_json(file: Path, value: Any) -> None:
    """Plain values to a file, in one rename."""
    part = file.with_name(file.name + ".tmp")
    part.write_text(json.dumps(value, indent=1, default=str) + "\n")
    part.replace(file)
