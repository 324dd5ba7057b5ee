"""One of the processes that train together; torchrun starts it with the folder that holds the job."""

import contextlib
import json
import sys
from pathlib import Path
from typing import NoReturn

from modelwright.core.errors import UserError
from modelwright.core.files import write_json
from modelwright.core.model.checkpoint import silence_transformers
from modelwright.core.train import dist
from modelwright.runner.processes import DONE, ERROR, JOB, launched
from modelwright.runner.tune import train_job


def worker(folder: Path) -> None:
    """One of the processes that a run started for one step."""
    silence_transformers()
    job = json.loads((folder / JOB).read_text())
    dist.start(job["processes"])
    try:
        entry = train_job(job, folder)
    except UserError as error:
        if dist.rank() == 0:
            write_json(folder / ERROR, {"what": error.what, "why": error.why, "how": error.how})
        raise
    if dist.rank() == 0:
        write_json(folder / DONE, entry)
    dist.end()


def follow() -> NoReturn:
    """A process that an outside launcher started beside the first: takes part in every training step, then ends."""
    silence_transformers()
    dist.start(launched())
    while (job := dist.broadcast()) is not None:
        with contextlib.suppress(UserError):  # the first process says it
            train_job(job[0], Path(job[1]))
    dist.end()


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
