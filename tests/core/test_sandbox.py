"""Code that a model wrote is held: each hostile program fails in the named way, and nothing of it is left."""

import os
import platform
import re
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from modelwright.core import sandbox
from modelwright.core.errors import UserError

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in sandbox._MACHINES, reason="needs Linux on x86_64 or aarch64"
)


def _left() -> set[str]:
    return {p.name for p in Path(tempfile.gettempdir()).glob("sandbox-*")}


def test_code_runs_to_its_end_with_its_input_and_a_folder_of_its_own() -> None:
    before = _left()
    code = "open('a', 'w').write(input())\nimport os\nos.mkdir('d'); os.rename('a', 'd/b')\nprint(open('d/b').read(), __name__)"
    assert sandbox.run(code, stdin="hello\nworld") == sandbox.Outcome(True, "hello __main__\n", "", "")
    assert _left() <= before


def test_what_holds_is_named() -> None:
    held = sandbox.active()
    assert "seccomp" in held and "limits" in held
    assert any(h.startswith("landlock") or h == "bubblewrap" for h in held)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os\nos.fork()", "denied"),
        ("import subprocess\nsubprocess.run(['true'])", "denied"),
        ("import multiprocessing as m\nm.Process(target=print).start()", "denied"),
        ("import os\nos.execv('/bin/true', ['true'])", "denied"),
        ("import socket\nsocket.socket()", "denied"),
        ("import socket\nsocket.socket(socket.AF_UNIX)", "denied"),
        ("import os\nos.kill(os.getppid(), 9)", "denied"),
        ("open('../evil', 'w')", "denied"),
        ("import os\nos.symlink('..', 'up')\nopen('up/evil', 'w')", "denied"),
        ("open('/etc/passwd').read()", "denied"),
        ("open('/proc/1/environ').read()", "denied"),
        ("import os\nos.chmod('main.py', 0o777)", "denied"),
        ("x = bytearray(10**10)", "memory"),
        ("x = []\nwhile True: x.append(bytearray(10**7))", "memory"),
        ("import time\ntime.sleep(60)", "time"),
        ("while True: pass", "time"),
        ("import os, time\nfor i in range(3): os.close(i)\ntime.sleep(60)", "time"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\ntime.sleep(60)", "time"),
        ("while True: print('x' * 1000)", "output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
        ("i = 0\nwhile True:\n    i += 1\n    open(str(i), 'w').close()", "disk"),
        ("i = 0\nwhile True:\n    i += 1\n    open(f'f{i}', 'w').write('x' * 10**6)", "disk"),
        ("import sys\nsys.exit(0)", "exit"),
        ("import os\nos._exit(0)", "exit"),
        ("import os\nos.abort()", "killed"),
        ("import ctypes\nctypes.string_at(0)", "killed"),
        ("1 / 0", "error"),
        ("def f(:", "error"),
        ("input()", "error"),
        ("f = open('a', 'wb')\nwhile True: f.write(bytes(10**6))", "error"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))", "error"),
    ],
)
def test_hostile_code_is_held(code: str, reason: str) -> None:
    before = _left()
    outcome = sandbox.run(code, seconds=0.5 if reason == "time" else 30)
    assert (outcome.ok, outcome.reason) == (False, reason), outcome.stderr[-300:]
    assert len(outcome.stdout) <= sandbox.OUTPUT and len(outcome.stderr) <= sandbox.OUTPUT
    assert _left() <= before
    assert not (Path(tempfile.gettempdir()) / "evil").exists()


def test_a_socket_that_listens_here_is_never_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        assert not sandbox.run(f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')").ok
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_second_process_is_refused_by_the_raw_system_calls_too() -> None:
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    return libc.syscall(*args), ctypes.get_errno()
print(call(NUMBER, 17, 0, 0, 0, 0), call(435, 0, 0))
""".replace("NUMBER", str(sandbox._numbers(sandbox._CONDITIONAL, sandbox._MACHINES[platform.machine()][0])["clone"]))
    assert sandbox.run(code).stdout == "(-1, 1) (-1, 38)\n"


def test_the_environment_of_the_caller_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET_KEY", "abc")
    seen = sandbox.run("import os\nprint(sorted(os.environ))").stdout
    assert "MY_SECRET_KEY" not in seen and "HOME" in seen


def test_a_thread_may_start() -> None:
    code = "import threading\nt = threading.Thread(target=print, args=('here',))\nt.start(); t.join()"
    assert sandbox.run(code).stdout == "here\n"


def test_a_machine_that_cannot_hold_code_runs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(UserError, match="cannot run here"):
        sandbox.run("print(1)")


def test_an_interpreter_that_is_not_held_runs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kernel without Landlock, and no bubblewrap: the reason comes back as one sentence."""
    weak = tmp_path / "weak.py"
    source = Path(sandbox.__file__).read_text()
    assert source.count("libc.syscall(444, None, 0, 1)") == 1
    weak.write_text(source.replace("libc.syscall(444, None, 0, 1)", "0"))
    monkeypatch.setattr(sandbox, "__file__", str(weak))
    monkeypatch.setattr(sandbox, "_bubblewrap", list)
    with pytest.raises(UserError, match="no Landlock and bubblewrap does not work"):
        sandbox.run("print(1)")


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(UserError, match="memory_mb=8"):
        sandbox.run("print(1)", memory_mb=8)


@pytest.mark.parametrize(
    ("column", "header", "names"),
    [
        (0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 70),
        (1, "/usr/include/asm-generic/unistd.h", 60),
    ],
)
def test_the_numbers_are_those_of_the_kernels_headers(column: int, header: str, names: int) -> None:
    if not os.path.exists(header):
        pytest.skip(f"{header} is not installed")
    text = Path(header).read_text()
    # the generic header gives older names to some, and skips what newer kernels added
    known = {n.removeprefix("3264_"): int(v) for n, v in re.findall(r"#define __NR_?(\w+?)\s+(\d+)\s", text)}
    known = {n.lstrip("_"): v for n, v in known.items()}
    ours = sandbox._numbers(sandbox._DENIED, column) | sandbox._numbers(sandbox._CONDITIONAL, column)
    shared = {n: v for n, v in ours.items() if n in known}
    assert shared == {n: known[n] for n in shared}
    assert len(shared) >= names
