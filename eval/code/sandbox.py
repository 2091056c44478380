"""Run a program that no one has read, so that it can do no harm: see ``jail.py`` for the walls, this for the watch.

Linux 5.13 or later, x86-64 or aarch64; root is not needed. Anywhere else it refuses to run anything. What a program writes is in
a file system of its own, of the size that it may take and in memory, which goes when the program does: nothing that it leaves
has to be looked at or removed. That takes a mount namespace; where the system gives none (a container without user
namespaces), programs run in a folder that they can only read.
"""

import fcntl
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modeling_deepseek_moe.eval.code.system_calls import rules

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
MESSAGE = 4096  # bytes of a message of the jail, at most
# What limits of the address space and of the folder show in: what the program says of them.
NO_MEMORY = (b"MemoryError", b"bad_alloc", b"Cannot allocate memory")
NO_SPACE = (b"No space left on device", b"File too large")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``seconds`` of wall time; CPU time is limited to one more. ``memory``, ``output`` and ``disk`` in bytes; ``memory`` is address
    space, so an interpreter's libraries count. A file, folder or link counts a page (4,096 bytes) of ``disk`` at least, whether
    it has a name still or not."""

    seconds: float = 10.0
    memory: int = 1 << 30
    output: int = 16 << 20
    disk: int = 64 << 20
    open_files: int = 64


@dataclass(frozen=True, kw_only=True)
class Result:
    """``verdict``: ``ok`` (exit status 0), ``error`` (another), ``timeout``, ``memory``, ``output`` (too much of it), ``disk``,
    ``forbidden`` (it asked for a process, the network, or what else the sandbox ends programs for). ``read_only``: why it could
    write no files on this machine; empty where it could."""

    verdict: str
    stdout: bytes
    stderr: bytes
    status: int
    seconds: float
    peak_memory: int  # bytes resident, as seen every 20 ms
    read_only: str = ""


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
    return run(command, stdin, limits=limits, files={"program.py": source.encode(errors="surrogatepass")})


def check() -> str:
    """Why programs can write no files here; empty where they can.

    Raises:
        OSError: nothing can be run here; the message says what is missing.
    """
    result = run_python("print(1)")
    if result.verdict != "ok":
        raise OSError(
            f"the sandbox works, but not the interpreter in it: {result.stderr.decode(errors='replace')[-500:]}"
        )
    return result.read_only


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


@dataclass(frozen=True)
class _Space:
    """The file system of a program, by a descriptor that outlives it; without one, ``reason`` says why it has none."""

    folder: int | None = None
    reason: str = ""

    def is_full(self) -> bool:
        if self.folder is None:
            return False
        found = os.fstatvfs(self.folder)
        return not found.f_bavail or not found.f_favail


def _watch(command: list[str], stdin: bytes, folder: Path, limits: Limits) -> Result:
    start = time.monotonic()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            process = _start(command, stdin, folder, limits, theirs.fileno())
        try:
            with _space(ours) as space:
                texts, stopped, peak = _collect(process, space, start, limits)
                _end(process)
                stopped = stopped or ("disk" if space.is_full() else None)
        finally:
            _end(process)
    return Result(
        verdict=stopped or _verdict(process.returncode, texts[1]),
        stdout=bytes(texts[0]),
        stderr=bytes(texts[1]),
        status=process.returncode,
        seconds=time.monotonic() - start,
        peak_memory=peak,
        read_only=space.reason,
    )


def _start(command: list[str], stdin: bytes, folder: Path, limits: Limits, status: int) -> subprocess.Popen:
    spec = {
        "folder": str(folder),
        "memory": limits.memory,
        "cpu_seconds": int(limits.seconds) + 1,
        "disk": limits.disk,
        "open_files": limits.open_files,
        "status_fd": status,
        "parent": os.getpid(),
        "readable": _readable(),
        "calls": rules(),
    }
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
    }
    given = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(given, "wb", closefd=False) as file:
            file.write(stdin)
        # else it could grow, out of the folder's bound
        fcntl.fcntl(given, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        os.lseek(given, 0, os.SEEK_SET)
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(JAIL), json.dumps(spec), *command],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(status,),
            env=environment,
            start_new_session=True,
        )
    finally:
        os.close(given)


@contextmanager
def _space(status: socket.socket) -> Iterator[_Space]:
    """What the jail says before the program begins, which is when it closes the socket.

    Raises:
        OSError: it could not be set up.
    """
    space = _Space()
    try:
        while True:
            message, descriptors, _, _ = socket.recv_fds(status, MESSAGE, 1)
            kind, text = message[:1], message[1:].decode(errors="replace")
            if kind == b"M":
                space = _Space(folder=descriptors[0])
            elif kind == b"R":
                space = _Space(reason=text)
            elif kind == b"F":
                raise OSError(f"the sandbox cannot run here: {text}")
            else:
                break
        yield space
    finally:
        if space.folder is not None:
            os.close(space.folder)


def _collect(
    process: subprocess.Popen, space: _Space, start: float, limits: Limits
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
            if space.is_full():
                return texts, "disk", peak
            if not selector.get_map():  # the pipes may be closed long before it ends
                if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    return texts, None, peak
                time.sleep(WATCH)


def _end(process: subprocess.Popen) -> None:
    """There is one process: seccomp lets it make no other."""
    if process.returncode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()
    process.stderr.close()


def _resident(pid: int) -> int:
    """Peak resident bytes of a process; 0 when it has ended. `wait4` would count the process that it was forked from."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _verdict(code: int, stderr: bytearray) -> str:
    if code == 0:
        return "ok"
    if code == -signal.SIGSYS:
        return "forbidden"
    if code == -signal.SIGXCPU:
        return "timeout"
    end = stderr[-2000:]
    if code == -signal.SIGXFSZ or any(words in end for words in NO_SPACE):
        return "disk"
    return "memory" if any(words in end for words in NO_MEMORY) else "error"
