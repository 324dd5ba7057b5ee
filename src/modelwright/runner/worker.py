"""One of the processes that train together; torchrun starts it with the folder that holds the job."""

import json
import sys
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError
from modelwright.core.files import write_json
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.core.train import dist
from modelwright.runner import recipe
from modelwright.runner.processes import DONE, ERROR, JOB, PROGRESS
from modelwright.runner.recipe import Save
from modelwright.runner.tune import train


def worker(folder: Path) -> None:
    """One of the processes."""
    silence_transformers()
    job = json.loads((folder / JOB).read_text())
    dist.start(job["processes"])
    step = recipe.parse({"steps": [job["step"]], "base": job["source"]}).steps[0]
    source, part = Checkpoint(job["source"]), Path(job["part"])

    seen: dict = {"at": [0, 1], "numbers": {}}

    def show(**what: Any) -> None:
        seen.update(what)
        if dist.rank() == 0:
            write_json(folder / PROGRESS, seen)

    def at(done: int, of: int) -> None:
        show(at=[done, of])

    def say(numbers: dict[str, Any]) -> None:
        show(numbers=numbers)

    try:
        entry = train(step, source, folder, part, job["seed"], Save(**job["save"]), job["rounds"], at, say)
    except UserError as error:
        if dist.rank() == 0:
            write_json(folder / ERROR, {"what": error.what, "why": error.why, "how": error.how})
        raise
    if dist.rank() == 0:
        write_json(folder / DONE, entry)
    dist.end()


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
