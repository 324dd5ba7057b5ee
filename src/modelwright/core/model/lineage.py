"""Where a result comes from: versions and the lineage file. Imports nothing heavy."""

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from modelwright.core.files import finite

LINEAGE = "modelwright.json"


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


def write_lineage(folder: Path, lineage: dict[str, Any]) -> None:
    (folder / LINEAGE).write_text(json.dumps(finite(lineage), indent=2, default=str) + "\n")
