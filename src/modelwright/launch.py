"""Training in several processes: the run starts torchrun for the one step and takes the result back.

Everything else of a run (reading, certificates, reports) stays in the process that was started by hand, so a recipe is
the same whatever the number of processes, and what is saved is an ordinary checkpoint.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError
from modelwright.core.knobs import plain
from modelwright.core.lineage import write_json

_JOB, _DONE, _ERROR, _AT = "job.json", "trained.json", "error.json", "progress"


def _end_with_parent() -> None:
    """On Linux a killed run takes its workers with it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def train_apart(r: Any, step: Any, source: Any, folder: Path, part: Path) -> dict[str, Any]:
    """Run `drivers.train` of this step under torchrun. Raises what the workers raised."""
    job = {
        "step": {step.entry.name: plain(step.knobs)},
        "source": str(source.folder),
        "part": str(part),
        "seed": r.recipe.seed,
        "shard_size": r.recipe.save.shard_size,
        "rounds": r.tuned,
        "processes": r.processes,
    }
    write_json(folder / _JOB, job)
    for name in (_DONE, _ERROR):
        (folder / name).unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(r.processes)]
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // r.processes)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",  # seconds for a state to be saved at Ctrl-C
    } | os.environ
    with r.progress.task(f"{step.entry.name}: train in {r.processes} processes", 1) as tick, open(folder / "workers.log", "w") as log:
        process = subprocess.Popen(
            [*command, "-m", "modelwright.launch", str(folder)],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        try:
            while (code := process.poll()) is None:
                time.sleep(0.2)
                with contextlib.suppress(OSError, ValueError):
                    done, of = map(int, (folder / _AT).read_text().split())
                    tick.to(done, of)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # torchrun hands it on; the workers finish their step and save
            process.wait()
            raise
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if (folder / _ERROR).is_file():
        raise UserError(**json.loads((folder / _ERROR).read_text()))
    if code or not (folder / _DONE).is_file():
        tail = (folder / "workers.log").read_text(errors="replace")[-3000:]
        raise RuntimeError(f"a training process ended with code {code}; the end of {folder / 'workers.log'}:\n{tail}")
    return json.loads((folder / _DONE).read_text())


def worker(folder: Path) -> None:
    """One of the processes."""
    from modelwright import drivers, recipe
    from modelwright.core import dist
    from modelwright.core.checkpoint import Checkpoint

    drivers.calm()
    job = json.loads((folder / _JOB).read_text())
    dist.start(job["processes"])
    step = recipe.parse({"steps": [job["step"]], "base": job["source"]}).steps[0]
    source, part = Checkpoint(job["source"]), Path(job["part"])

    def at(done: int, of: int) -> None:
        if dist.rank() == 0:
            (folder / _AT).write_text(f"{done} {of}")

    try:
        entry = drivers.train(step, source, folder, part, job["seed"], job["shard_size"], job["rounds"], at)
    except UserError as error:
        if dist.rank() == 0:
            write_json(folder / _ERROR, {"what": error.what, "why": error.why, "how": error.how})
        raise
    if dist.rank() == 0:
        write_json(folder / _DONE, entry)
    dist.end()


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
