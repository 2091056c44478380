"""Run a program that no one has read, so that it can do no harm: see ``jail.py`` for the walls, this for the watch.

Linux 5.13 or later, x86-64 or aarch64; root is not needed. Anywhere else it refuses to run anything.
"""

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

JAIL = Path(__file__).with_name("jail.py")
SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/urandom",
    "/dev/zero",
    "/proc/self",
)
WATCH = 0.02  # seconds between two looks at the clock and the folder
CHUNK = 65_536


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``seconds`` of wall time; CPU time is limited to one more. ``memory``, ``output`` and ``disk`` in bytes; ``memory`` is address
    space, so an interpreter's libraries count."""

    seconds: float = 10.0
    memory: int = 1 << 30
    output: int = 16 << 20
    disk: int = 64 << 20
    open_files: int = 64


@dataclass(frozen=True, kw_only=True)
class Result:
    """``verdict``: ``ok`` (exit status 0), ``error`` (another), ``timeout``, ``memory``, ``output`` (too much of it), ``disk``,
    ``forbidden`` (it asked for a process, the network, or what else the sandbox ends programs for)."""

    verdict: str
    stdout: bytes
    stderr: bytes
    status: int
    seconds: float
    peak_memory: int  # bytes resident, as seen every 20 ms


def run(
    command: Sequence[str], stdin: bytes = b"", *, limits: Limits = Limits(), files: dict[str, bytes] | None = None
) -> Result:
    """Run ``command`` in a folder of its own, which is gone afterwards.

    Args:
        command: the program, found on PATH or, as ``./name``, among ``files``; and its arguments.
        files: name -> content, put into the folder first.

    Raises:
        OSError: this machine cannot confine it; nothing was run. FileNotFoundError: no such program.
    """
    own = command[0].removeprefix("./") if command[0].startswith("./") else None
    program = command[0] if own in (files or {}) else shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(f"{command[0]}: found no such program")
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        for name, content in (files or {}).items():
            (Path(folder) / name).write_bytes(content)
            (Path(folder) / name).chmod(0o700 if name == own else 0o600)
        return _watch([program, *command[1:]], stdin, Path(folder).resolve(), limits)


def run_python(source: str, stdin: bytes = b"", *, limits: Limits = Limits()) -> Result:
    """Run a Python program, by this interpreter, without the packages that are installed next to it. See `run`."""
    command = [sys.executable, "-I", "-S", "-B", "program.py"]
    return run(command, stdin, limits=limits, files={"program.py": source.encode()})


def check() -> None:
    """
    Raises:
        OSError: nothing can be run here; the message says what is missing.
    """
    result = run_python("print(1)")
    if result.verdict != "ok":
        raise OSError(
            f"the sandbox works, but not the interpreter in it: {result.stderr.decode(errors='replace')[-500:]}"
        )


def _readable() -> list[str]:
    """Of the system and this interpreter: no home, no results, no tests."""
    interpreter = [sys.base_prefix, sysconfig.get_path("stdlib"), os.path.dirname(os.path.realpath(sys.executable))]
    return [
        *SYSTEM,
        *interpreter,
        os.path.realpath(sys.executable),
        sys.executable,
        os.path.join(sys.prefix, "pyvenv.cfg"),
    ]


def _watch(command: list[str], stdin: bytes, folder: Path, limits: Limits) -> Result:
    status_read, status_write = os.pipe()
    spec = {
        "folder": str(folder),
        "memory": limits.memory,
        "cpu_seconds": int(limits.seconds) + 1,
        "file_bytes": limits.disk,
        "open_files": limits.open_files,
        "status_fd": status_write,
        "readable": _readable(),
    }
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
    }
    start = time.monotonic()
    with tempfile.TemporaryFile() as given:
        given.write(stdin)
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(JAIL), json.dumps(spec), *command],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(status_write,),
            env=environment,
            start_new_session=True,
        )
    os.close(status_write)
    try:
        with os.fdopen(status_read, "rb") as status:
            if failure := status.read():  # ends when the program has started, or the jail has not
                process.wait()
                raise OSError(f"the sandbox cannot run here: {failure.decode(errors='replace')}")
        texts, stopped, peak = _collect(process, folder, start, limits)
    finally:
        _end(process)
    _, wait_status = os.waitpid(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(wait_status)
    seconds = time.monotonic() - start
    return Result(
        verdict=stopped or _verdict(wait_status, texts[1]),
        stdout=bytes(texts[0]),
        stderr=bytes(texts[1]),
        status=process.returncode,
        seconds=seconds,
        peak_memory=peak,
    )


def _collect(
    process: subprocess.Popen, folder: Path, start: float, limits: Limits
) -> tuple[tuple[bytearray, bytearray], str | None, int]:
    """What it writes until it ends, what it was stopped for, if it was, and its peak memory."""
    texts, peak = (bytearray(), bytearray()), 0
    with selectors.DefaultSelector() as selector:
        for pipe, text in zip((process.stdout, process.stderr), texts, strict=True):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, text)
        while True:
            for key, _ in selector.select(WATCH) if selector.get_map() else ():
                part = os.read(key.fd, CHUNK)
                key.data.extend(part)
                if not part:
                    selector.unregister(key.fileobj)
            peak = max(peak, _resident(process.pid))
            if sum(map(len, texts)) > limits.output:
                return texts, "output", peak
            if time.monotonic() - start > limits.seconds:
                return texts, "timeout", peak
            if _disk_used(folder) > limits.disk:
                return texts, "disk", peak
            if not selector.get_map():  # the pipes may be closed long before it ends
                if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    return texts, None, peak
                time.sleep(WATCH)


def _disk_used(folder: Path) -> int:
    total = 0
    for root, folders, files in os.walk(folder):
        for name in files:
            try:
                total += 4096 + os.lstat(os.path.join(root, name)).st_blocks * 512
            except OSError:  # gone, or a path too long to look at: its blocks are not seen, its folders are
                continue
        total += 4096 * len(folders)
    return total


def _end(process: subprocess.Popen) -> None:
    """There is one process: seccomp lets it make no other."""
    if process.returncode is None:
        os.kill(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.stderr.close()


def _resident(pid: int) -> int:
    """Peak resident bytes of a process; 0 when it has ended. `wait4` would count the process that it was forked from."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _verdict(wait_status: int, stderr: bytearray) -> str:
    code = os.waitstatus_to_exitcode(wait_status)
    if code == 0:
        return "ok"
    if code == -signal.SIGSYS:
        return "forbidden"
    if code == -signal.SIGXCPU:
        return "timeout"
    if code == -signal.SIGXFSZ:
        return "disk"
    # an address-space limit shows only in what the program says of it
    if any(word in stderr[-2000:] for word in (b"MemoryError", b"bad_alloc", b"Cannot allocate memory")):
        return "memory"
    return "error"
