"""Training dynamics in one parquet file: who was seen when, at what learning rate, with what loss.

Rows of kind 'train' hold one example of one step; rows of kind 'eval' hold one held-out text (`name`); rows of kind 'step'
hold a step's loss over all processes, its learning rate and gradient norm. `loss` is the mean
over `tokens`, in nats. `energy_j` is joules since the start of the process's run, on rows where it was read; null where
the machine does not let itself be read. While training runs the rows lie in numbered parts (a kill loses none that a
resumable state covers); `close()` joins them.
"""

import glob
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet
from torch import Tensor

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("kind", pa.string()),
        ("name", pa.string()),
        ("example", pa.int64()),
        ("loss", pa.float32()),
        ("tokens", pa.int32()),
        ("lr", pa.float32()),
        ("energy_j", pa.float64()),
        ("grad_norm", pa.float32()),
    ]
)


class Meter:
    """Joules since it was made: Intel or AMD RAPL counters, else NVIDIA's, else unknown (None)."""

    def __init__(self) -> None:
        self._files = [f for f in glob.glob("/sys/class/powercap/*-rapl:[0-9]/energy_uj") if self._readable(f)]
        self._gpus = self._nvidia()
        self.source = " + ".join((["CPU package counters"] if self._files else []) + (["GPU counters"] if self._gpus else [])) or "unknown"
        self._last = self._read()
        self._sum = 0.0

    @staticmethod
    def _readable(file: str) -> bool:
        try:
            return int(Path(file).read_text()) >= 0
        except (OSError, ValueError):
            return False

    @staticmethod
    def _nvidia() -> list[Any]:
        try:
            import pynvml

            pynvml.nvmlInit()
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            for h in handles:
                pynvml.nvmlDeviceGetTotalEnergyConsumption(h)
            return [(pynvml, h) for h in handles]
        except Exception:  # no library, no driver, no permission: all mean unknown
            return []

    def _read(self) -> list[float]:
        return [int(Path(f).read_text()) / 1e6 for f in self._files] + [
            n.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3 for n, h in self._gpus
        ]

    def joules(self) -> float | None:
        if self.source == "unknown":
            return None
        now = self._read()
        self._sum += sum(max(0.0, b - a) for a, b in zip(self._last, now, strict=True))  # a counter that wrapped adds nothing
        self._last = now
        return self._sum


class Recorder:
    """Collects rows and writes them in parts; `cost` seconds of its own work are counted."""

    def __init__(self, file: Path, resume_step: int = 0):
        self.file, self.parts = Path(file), Path(file).with_suffix(".parts")
        self.parts.mkdir(parents=True, exist_ok=True)
        self.lost = 0  # parts that could not be read again
        for part in self._found():
            if not 0 < int(part.stem) <= resume_step or self.file.exists():
                part.unlink()
            elif self._table(part) is None:
                self.lost += 1
                part.unlink()
        closed = self._table(self.file) if self.file.exists() else None
        if closed is not None and resume_step:  # it becomes the first part again
            table = closed
            self._write(table.filter(pc.less_equal(table["step"], resume_step)), self.parts / f"{resume_step:09d}.parquet")
        self.file.unlink(missing_ok=True)
        self.meter = Meter()
        self._steps: list[tuple[Any, ...]] = []
        self._evals: list[dict[str, Any]] = []

    def _found(self) -> list[Path]:
        return sorted(self.parts.glob("*.parquet"))

    def train(self, step: int, lr: float, examples: Tensor, sums: Tensor, counts: Tensor) -> None:
        """One forward pass: example ids, summed losses and learnt tokens, each (B,). A GPU is not waited for here."""
        # On a CPU plain numbers are kept, so that no small tensor lives between the large ones of each step.
        kept = [t.detach() if t.is_cuda else t.tolist() for t in (examples, sums, counts)]
        self._steps.append((step, lr, *kept))

    def eval(self, step: int, name: str, loss: float, tokens: int) -> None:
        """One held-out text."""
        self._evals.append({"step": step, "kind": "eval", "name": name, "loss": loss, "tokens": tokens, "energy_j": self.meter.joules()})

    def step(self, step: int, loss: float, lr: float, norm: float | None) -> None:
        """A step of the log: its loss over all processes and its gradient norm."""
        self._evals.append({"step": step, "kind": "step", "loss": loss, "lr": lr, "grad_norm": norm})

    def flush(self, step: int) -> None:
        """Write what was collected up to `step` as one part."""
        rows = self._evals
        for at, lr, examples, sums, counts in self._steps:
            columns = [t.tolist() if isinstance(t, Tensor) else t for t in (examples, sums, counts)]
            rows += [
                {"step": at, "kind": "train", "example": e, "loss": total / max(n, 1), "tokens": n, "lr": lr}
                for e, total, n in zip(*columns, strict=True)
            ]
        if rows and rows[-1]["kind"] == "train":  # a process may have had nothing but rows that fill up a batch
            rows[-1]["energy_j"] = self.meter.joules()
        if rows:
            part = self.parts / f"{step:09d}.parquet"
            tables = [parquet.read_table(part)] if part.exists() else []
            self._write(pa.concat_tables([*tables, pa.Table.from_pylist(rows, SCHEMA)]), part)
        self._steps, self._evals = [], []

    def close(self, step: int) -> Path:
        """Join all parts into the one file."""
        if not self.parts.exists() and not self._steps and not self._evals:
            return self.file
        self.flush(step)
        tables = [parquet.read_table(p) for p in self._found()]
        self._write(pa.concat_tables(tables) if tables else SCHEMA.empty_table(), self.file)
        shutil.rmtree(self.parts)
        return self.file

    @staticmethod
    def _table(file: Path) -> pa.Table | None:
        try:
            return parquet.read_table(file)
        except (OSError, ValueError):  # ArrowInvalid is a ValueError
            return None

    @staticmethod
    def _write(table: pa.Table, file: Path) -> None:
        part = file.with_name(file.name + ".tmp")
        parquet.write_table(table, part, compression="zstd")
        part.replace(file)


def read_dynamics(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The recorded table."""
    return parquet.read_table(file, columns=list(columns) if columns else None)
