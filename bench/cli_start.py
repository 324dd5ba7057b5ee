"""CPU time of the light commands: they must answer at once, without torch."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import save, spread

COMMANDS = [["--help"], ["list"], ["show", "reshape.upcycle"], ["check", "seedling"], ["reshape", "upcycle", "--help"]]


def cpu(command: list[str]) -> float:
    before = os.times()
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    program = shutil.which("modelwright", path=str(Path(sys.executable).parent)) or "modelwright"
    rows, worst = [], 0.0
    for arguments in COMMANDS:
        cpu([program, *arguments])
        times, floor = [], []
        for _ in range(9):
            times.append(cpu([program, *arguments]))
            floor.append(cpu([sys.executable, "-c", "pass"]))
            time.sleep(0.05)
        worst = max(worst, sorted(times)[4]) if arguments == ["--help"] else worst
        rows.append([" ".join(arguments), spread(times), spread(floor)])
    save(
        "cli_start",
        claim="`modelwright --help` takes at most 0.3 s of CPU time",
        outcome=f"{'Met' if worst <= 0.3 else 'Missed'}: {worst:.2f} s.",
        columns=["command", "CPU s", "bare Python, CPU s"],
        rows=rows,
        notes=["median (min to max) of 9 runs after one warm-up, interleaved with a bare interpreter"],
    )


if __name__ == "__main__":
    main()
