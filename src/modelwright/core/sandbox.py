"""Run Python that a model wrote: no network, no second process, no writing outside a scratch folder, limits on time, memory and output.

The code runs in an interpreter of its own, which gives its rights away before the first line of the code:

- Landlock (Linux 5.13 and later): reading is left for the Python installation and the system's libraries, writing for the scratch folder.
- seccomp: sockets, new processes, new programs, signals to others, tracing, mounts and changes of file modes or owners are not permitted.
- limits: CPU seconds, address space, size of a file, open files, core dumps. The output, the scratch folder and the time are watched from
  outside.
- namespaces: an empty network where the kernel lets this user make one; all of bubblewrap's where `bwrap` is installed and works.

`active()` names those that hold on this machine. seccomp is required, and so is Landlock or bubblewrap: without them `run` raises UserError
and runs nothing. Threads are allowed, `fork` is not, so `subprocess` and `multiprocessing` fail; so do `os.chmod` and `shutil.copy`, which
calls it. `ok` says that the code came to its end. The code shares the interpreter with whatever stands after it in the same text: to grade
code that may want to deceive, compare what it prints with what only right code prints.
"""

import contextlib
import ctypes
import errno
import functools
import json
import os
import platform
import resource
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTPUT = 1 << 20  # bytes of stdout and of stderr
FILE, SCRATCH, ENTRIES = 16 << 20, 64 << 20, 1000  # bytes of one file and of the folder, and its number of entries
START = 60.0  # seconds for the interpreter to start: they are not the code's
READABLE = (
    "/usr /lib /lib32 /lib64 /etc/ld.so.cache /etc/localtime /dev/null /dev/zero /dev/random /dev/urandom /proc/cpuinfo /proc/meminfo "
    "/sys/devices/system/cpu"
)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of _DENIED, the kernel's name for it
# System calls that fail with "not permitted": their numbers on x86_64 and on aarch64; - where there is none.
_DENIED = """
socket 41 198; connect 42 203; accept 43 202; accept4 288 242; bind 49 200; listen 50 201; fork 57 -; vfork 58 -; execve 59 221
execveat 322 281; kill 62 129; tkill 200 130; rt_sigqueueinfo 129 138; rt_tgsigqueueinfo 297 240; pidfd_send_signal 424 424
pidfd_open 434 434; pidfd_getfd 438 438; ptrace 101 117; process_vm_readv 310 270; process_vm_writev 311 271; process_madvise 440 440
userfaultfd 323 282; perf_event_open 298 241; bpf 321 280; io_uring_setup 425 425; io_uring_enter 426 426; io_uring_register 427 427
memfd_create 319 279; personality 135 92; shmget 29 194; shmat 30 196; semget 64 190; msgget 68 186; mq_open 240 180; add_key 248 217
request_key 249 218; keyctl 250 219; truncate 76 45; chmod 90 -; fchmod 91 52; fchmodat 268 53; fchmodat2 452 452; chown 92 -
fchown 93 55; lchown 94 -; fchownat 260 54; utime 132 -; utimes 235 -; futimesat 261 -; utimensat 280 88; mknod 133 -; mknodat 259 33
setxattr 188 5; lsetxattr 189 6; fsetxattr 190 7; setxattrat 463 463; removexattr 197 14; lremovexattr 198 15; fremovexattr 199 16
removexattrat 466 466; name_to_handle_at 303 264; open_by_handle_at 304 265; setrlimit 160 164; setpriority 141 140; chroot 161 51
pivot_root 155 41; mount 165 40; umount2 166 39; unshare 272 97; setns 308 268; open_tree 428 428; move_mount 429 429; fsopen 430 430
fsconfig 431 431; fsmount 432 432; mount_setattr 442 442; acct 163 89; swapon 167 224; swapoff 168 225; reboot 169 142
sethostname 170 161; setdomainname 171 162; iopl 172 -; ioperm 173 -; init_module 175 105; finit_module 313 273; delete_module 176 106
kexec_load 246 104; kexec_file_load 320 294; quotactl 179 60
"""
_CONDITIONAL = "clone 56 220; clone3 435 435; tgkill 234 131; prlimit64 302 261"


@dataclass(frozen=True)
class Outcome:
    """What the code did. `reason` is empty where `ok`, else error, exit, denied, memory, time, output, disk or killed."""

    ok: bool
    stdout: str
    stderr: str
    reason: str


def run(code: str, *, stdin: str = "", seconds: float = 5, memory_mb: int = 512) -> Outcome:
    """Run Python code that is not trusted, for at most `seconds` and in at most `memory_mb` of address space.

    `reason`: an exception ended it (error, memory, denied), it left before its end (exit), it was stopped (time, output, disk), or a signal
    ended it (killed). UserError where this machine cannot hold it.
    """
    return _run(code, stdin, seconds, memory_mb)[0]


@functools.cache
def active() -> tuple[str, ...]:
    """What holds model-written code on this machine. UserError where that is not enough."""
    return tuple(_run("", "", 30, 512)[1])


def _run(code: str, stdin: str, seconds: float, memory_mb: int) -> tuple[Outcome, list[str]]:
    from modelwright.core.errors import UserError

    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise UserError(
            "model-written code cannot run here",
            f"it is held by parts of the Linux kernel, and this is {sys.platform} on {platform.machine()}",
            "use Linux on x86_64 or aarch64, or a container of it",
        )
    if memory_mb < 64:
        raise UserError(f"memory_mb={memory_mb} is too little", "the interpreter alone needs 64", "give 64 or more")
    scratch = Path(tempfile.mkdtemp(prefix="sandbox-")).resolve()
    try:
        (scratch / "main.py").write_text(code, encoding="utf-8", errors="surrogateescape")
        return _watched(scratch, stdin, seconds, memory_mb)
    finally:
        _remove(scratch)


def _watched(scratch: Path, stdin: str, seconds: float, memory_mb: int) -> tuple[Outcome, list[str]]:
    """Start the interpreter, read what it says, stop it where it goes too far."""
    from modelwright.core.errors import UserError

    said, report = os.pipe()
    wrap = _bubblewrap()
    outer = [*wrap, "--bind", str(scratch), str(scratch), "--chdir", str(scratch), "--"] if wrap else []
    settings = json.dumps({"scratch": str(scratch), "seconds": seconds, "memory_mb": memory_mb, "report": report, "wrapped": bool(wrap)})
    with tempfile.TemporaryFile() as given:
        given.write(stdin.encode("utf-8", "surrogateescape"))
        given.seek(0)
        process = subprocess.Popen(
            [*outer, sys.executable, "-s", "-P", "-B", "-X", "utf8", __file__, settings],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=scratch,
            env=_environment(scratch),
            pass_fds=(report,),
            start_new_session=True,
        )
    os.close(report)
    try:
        texts, stopped = _read(process, said, scratch, seconds)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        os.close(said)
        for stream in (process.stdout, process.stderr):
            stream.close()  # type: ignore[union-attr]
    first, _, rest = texts["report"].partition("\n")
    out, err = texts["stdout"], texts["stderr"]
    if not first.startswith("["):
        why = first or (err.strip().splitlines() or ["the interpreter did not start"])[-1]
        raise UserError("model-written code cannot be held on this machine", why, "install bubblewrap, or use Linux 5.13 or later")
    reason = stopped or _reason(process.returncode, rest.strip(), err)
    return Outcome(not reason, out, err, reason), json.loads(first)


def _read(process: subprocess.Popen, said: int, scratch: Path, seconds: float) -> tuple[dict[str, str], str]:
    """What came out of each pipe, and why the process was stopped, if it was."""
    parts: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray(), "report": bytearray()}
    stopped, end, started = "", time.monotonic() + START, False
    with selectors.DefaultSelector() as waiting:
        for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr), ("report", said)):
            waiting.register(pipe, selectors.EVENT_READ, name)  # type: ignore[arg-type]
        while not stopped and (waiting.get_map() or process.poll() is None):  # code may close its pipes and stay
            for key, _ in waiting.select(timeout=0.05):
                piece = os.read(key.fd, 1 << 16)
                parts[key.data] += piece
                if not piece:
                    waiting.unregister(key.fileobj)
            if not started and b"\n" in parts["report"]:
                started, end = True, time.monotonic() + seconds
            if any(len(p) > OUTPUT for p in parts.values()):
                stopped = "output"
            elif time.monotonic() > end:
                stopped = "time"
            elif _too_much(scratch):
                stopped = "disk"
    return {k: bytes(v[:OUTPUT]).decode("utf-8", "replace") for k, v in parts.items()}, stopped


def _reason(status: int, ended: str, errors: str) -> str:
    if status in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        return "time"
    if status < 0 or status > 128:
        return "killed"
    if status == 0 and ended == "end":
        return ""
    last = (errors.strip().splitlines() or [""])[-1]
    named = {"MemoryError": "memory", "PermissionError": "denied"}.get(last.partition(":")[0])
    if last.startswith(f"OSError: [Errno {errno.EROFS}]"):  # bubblewrap's view of the rest is read-only
        named = "denied"
    return named or ("exit" if ended in ("", "exit") else "error")


def _too_much(scratch: Path) -> bool:
    """Whether the scratch folder holds too many bytes or too many entries."""
    size, entries, folders = 0, 0, [str(scratch)]
    while folders:
        try:
            with os.scandir(folders.pop()) as found:
                for entry in found:
                    entries += 1
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entries > ENTRIES or size > SCRATCH:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:  # removed meanwhile
            continue
        except OSError:  # a path that is too long, a folder that may not be read: nothing that honest code makes
            return True
    return False


def _remove(scratch: Path) -> None:
    """Remove the folder, whatever stands in it."""

    def again(function: Any, path: str, error: Any) -> None:
        with contextlib.suppress(OSError):
            os.chmod(Path(path).parent, 0o700)
            if not os.path.islink(path):  # what a link names is not ours
                os.chmod(path, 0o700)
            function(path)

    with contextlib.suppress(RecursionError):
        shutil.rmtree(scratch, onerror=again)
    if scratch.exists():  # thousands of folders in one another, or one that could not be read
        subprocess.run(["rm", "-rf", "--", str(scratch)], check=False, capture_output=True)


def _environment(scratch: Path) -> dict[str, str]:
    threads = {f"{n}_NUM_THREADS": "1" for n in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
    return {"PATH": "/usr/bin:/bin", "HOME": str(scratch), "TMPDIR": str(scratch), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **threads}


@functools.cache
def _bubblewrap() -> list[str]:
    """The command that wraps another in bubblewrap; nothing where it is not installed or may not make its namespaces here."""
    found = shutil.which("bwrap")
    if found is None:
        return []
    wrap = [found, "--unshare-all", "--die-with-parent", "--new-session", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    tried = subprocess.run([*wrap, "--", "true"], capture_output=True, check=False, timeout=START)
    return wrap if tried.returncode == 0 else []


# ---- in the interpreter that runs the code -----------------------------------------------------------------------------------
class _Unheld(Exception):
    """A part that is required could not be put in place."""


def _hold(settings: dict[str, Any]) -> list[str]:
    """Give all rights away for good. Returns what holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: end with the parent
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
    held = ["bubblewrap"] if settings["wrapped"] else []
    if not settings["wrapped"] and libc.unshare(0x10000000 | 0x40000000 | 0x08000000) == 0:  # NEWUSER, NEWNET, NEWIPC
        held.append("network namespace")
    if libc.prctl(38, 1, 0, 0, 0) != 0:  # PR_SET_NO_NEW_PRIVS
        raise _Unheld("the kernel does not know no_new_privs")
    _drop_capabilities(libc)
    version = _landlock(libc, settings["scratch"])
    if version:
        held.append(f"landlock {version}")
    elif not settings["wrapped"]:
        raise _Unheld("this kernel has no Landlock and bubblewrap does not work")
    _limits(settings["seconds"], settings["memory_mb"])
    if libc.prctl(22, 2, ctypes.byref(_program()), 0, 0) != 0:  # PR_SET_SECCOMP with a filter
        raise _Unheld(f"the kernel takes no seccomp filter ({os.strerror(ctypes.get_errno())})")
    return [*held, "seccomp", "limits"]


def _limits(seconds: float, memory_mb: int) -> None:
    cpu = int(seconds) + 2
    for what, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    if libc.capset(header, none) != 0:
        raise _Unheld(f"capabilities could not be dropped ({os.strerror(ctypes.get_errno())})")


def _landlock(libc: ctypes.CDLL, scratch: str) -> int:
    """Leave the file system but what is named; returns the version of Landlock, 0 where there is none."""
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return 0
    handled = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    # what is ruled over: files; TCP from version 4 on; signals and abstract sockets from 6 on
    rules = struct.pack("QQQ", handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    rules = rules[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = libc.syscall(444, rules, len(rules), 0)
    if ruleset < 0:
        raise _Unheld(f"Landlock refused its rules ({os.strerror(ctypes.get_errno())})")
    read, write_file = 1 << 2 | 1 << 3, 1 << 1
    remove, make, rename_and_cut = 1 << 4 | 1 << 5, 1 << 7 | 1 << 8 | 1 << 12, 1 << 13 | 1 << 14  # made: folders, files, links
    change = write_file | remove | make | rename_and_cut
    allowed = dict.fromkeys([*READABLE.split(), sys.prefix, sys.base_prefix, sys.exec_prefix], read)
    allowed |= {"/dev/null": read | write_file, scratch: read | change}
    for path, rights in allowed.items():
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            rights &= 0b111 | 1 << 14 | 1 << 15
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if libc.syscall(445, ruleset, 1, struct.pack("=Qi", rights & handled, folder), 0) != 0:
            raise _Unheld(f"Landlock refused a rule for {path} ({os.strerror(ctypes.get_errno())})")
        os.close(folder)
    if libc.syscall(446, ruleset, 0) != 0:
        raise _Unheld(f"Landlock could not be switched on ({os.strerror(ctypes.get_errno())})")
    os.close(ruleset)
    return version


def _numbers(table: str, column: int) -> dict[str, int]:
    """Names and numbers of the system calls that this machine has."""
    rows = [entry.split() for line in table.strip().splitlines() for entry in line.split(";")]
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-"}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def _program() -> _Program:
    """The seccomp filter (classic BPF over the number, the machine and the arguments of a system call)."""
    column, machine = _MACHINES[platform.machine()]
    special = _numbers(_CONDITIONAL, column)
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, denied, absent = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38
    lines: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (equal, 1, 0, machine),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),  # the second numbering of x86_64
        (give, 0, 0, denied),
        (equal, 0, 1, special["clone3"]),  # its flags cannot be seen from here; without it the C library takes clone
        (give, 0, 0, absent),
    ]
    for number in _numbers(_DENIED, column).values():
        lines += [(equal, 0, 1, number), (give, 0, 0, denied)]
    # clone: threads alone (CLONE_THREAD)
    lines += [(equal, 0, 4, special["clone"]), (load, 0, 0, 16), (any_bit, 0, 1, 0x10000), (give, 0, 0, allow), (give, 0, 0, denied)]
    # tgkill: this process alone, for raise() and abort()
    lines += [(equal, 0, 4, special["tgkill"]), (load, 0, 0, 16), (equal, 0, 1, os.getpid()), (give, 0, 0, allow), (give, 0, 0, denied)]
    # prlimit64: to read limits, not to set them (its third argument is null)
    lines += [(equal, 0, 6, special["prlimit64"]), (load, 0, 0, 32), (equal, 0, 3, 0), (load, 0, 0, 36), (equal, 0, 1, 0)]
    lines += [(give, 0, 0, allow), (give, 0, 0, denied), (give, 0, 0, allow)]
    return _Program(len(lines), b"".join(struct.pack("HBBI", *line) for line in lines))


def _main() -> None:
    """Give the rights away, say what holds, run main.py, say how it ended."""
    settings = json.loads(sys.argv[1])
    report = os.fdopen(settings["report"], "w")
    with open("main.py", encoding="utf-8", errors="surrogateescape") as file:
        text = file.read()
    for late in ("encodings.idna", "linecache"):
        __import__(late)
    try:
        held = _hold(settings)
    except (_Unheld, OSError, ValueError) as error:
        report.write(f"{error}\n")
        report.flush()
        os._exit(1)
    report.write(json.dumps(held) + "\n")
    report.flush()
    sys.argv = ["main.py"]
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    ended, status = "end", 0
    try:
        exec(compile(text, "main.py", "exec"), module.__dict__)  # noqa: S102 - it is what this is for
    except SystemExit:
        ended, status = "exit", 1
    except BaseException as error:
        ended, status = "error", 1
        error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
        traceback.print_exception(error)
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    with contextlib.suppress(BaseException):
        report.write(ended)
        report.flush()
    os._exit(status)


if __name__ == "__main__":
    _main()
