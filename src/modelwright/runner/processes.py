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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError
from modelwright.core.files import write_json
from modelwright.core.knobs import plain

JOB, DONE, ERROR, PROGRESS = "job.json", "trained.json", "error.json", "progress"  # files in the step's folder


def _end_with_parent() -> None:
    """On Linux a killed run takes its workers with it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def launched() -> int:
    """Processes that an outside launcher (torchrun, SLURM with WORLD_SIZE, RANK and MASTER_ADDR set) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ and "MASTER_ADDR" in os.environ else 1


def follows() -> bool:
    """Whether this process is one that an outside launcher started beside the first."""
    return launched() > 1 and int(os.environ["RANK"]) > 0


def train_apart(r: Any, step: Any, source: Any, folder: Path, part: Path, train: Callable[[dict[str, Any], Path], Any]) -> dict[str, Any]:
    """Train this step in several processes and give back its entry. Raises what the workers raised.

    Under an outside launcher the processes are there already (`train(job, folder)` runs in each); else torchrun starts them.
    """
    job = {
        "step": {step.entry.name: plain(step.knobs)},
        "source": str(source.folder),
        "part": str(part),
        "seed": r.recipe.seed,
        "save": plain(r.recipe.save),
        "rounds": r.tuned,
        "processes": r.processes,
    }
    if launched() > 1:
        from modelwright.core.train import dist

        dist.start(launched())
        dist.broadcast((job, str(folder)))
        return train(job, folder)
    write_json(folder / JOB, job)
    for name in (DONE, ERROR):
        (folder / name).unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(r.processes)]
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // r.processes)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",  # seconds for a state to be saved at Ctrl-C
    } | os.environ
    with r.progress.task(f"{step.entry.name}: train in {r.processes} processes", 1) as tick, open(folder / "workers.log", "w") as log:
        process = subprocess.Popen(
            [*command, "-m", "modelwright.runner.worker", str(folder)],
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
                    seen = json.loads((folder / PROGRESS).read_text())
                    tick.to(*seen["at"])
                    if seen["numbers"]:
                        tick.say(seen["numbers"])
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # torchrun hands it on; the workers finish their step and save
            process.wait()
            raise
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if (folder / ERROR).is_file():
        raise UserError(**json.loads((folder / ERROR).read_text()))
    if code or not (folder / DONE).is_file():
        tail = (folder / "workers.log").read_text(errors="replace")[-3000:]
        raise RuntimeError(f"a training process ended with code {code}; the end of {folder / 'workers.log'}:\n{tail}")
    return json.loads((folder / DONE).read_text())
