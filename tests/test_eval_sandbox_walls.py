"""What a judged program may not reach: room outside its bound, signals by way of others, settings that outlive it."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from modeling_deepseek_moe.eval.code import sandbox, system_calls
from modeling_deepseek_moe.eval.code.problems import Problem, judge
from modeling_deepseek_moe.eval.code.sandbox import Limits, check, run_python

try:
    READ_ONLY = check()
except OSError as error:
    pytest.skip(f"no sandbox here: {error}", allow_module_level=True)

writes = pytest.mark.skipif(bool(READ_ONLY), reason=f"no folder to write in: {READ_ONLY}")
QUICK = Limits(seconds=3, disk=8 << 20)
CALLS = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
HELD = "import mmap, os\nheld = []\nfor i in range(400):\n    fd = os.open('x', os.O_RDWR | os.O_CREAT)\n    os.unlink('x')\n"


def taken():
    """Bytes in use of the file system that temporary folders are on."""
    found = os.statvfs("/tmp")
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@writes
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(HELD + "    os.posix_fallocate(fd, 0, 1 << 20)\n    held.append(os.dup(fd))", id="open descriptors"),
        pytest.param(HELD + "    os.posix_fallocate(fd, 0, 1 << 20)\n    held.append(mmap.mmap(fd, 4096)); os.close(fd)", id="mappings"),
        pytest.param(HELD + "    os.pwrite(fd, bytes(1 << 20), 0)\n    held.append(os.dup(fd))", id="written"),
        pytest.param(
            HELD + "    os.ftruncate(fd, 1 << 20)\n    m = mmap.mmap(fd, 1 << 20); os.close(fd); held.append(m)\n"
            "    m[:] = bytes(1 << 20)",
            id="sparse, then touched",
        ),
        pytest.param(
            CALLS + "libc.mmap.restype = ctypes.c_void_p\n" + HELD
            + "    os.posix_fallocate(fd, 0, 1 << 20)\n    libc.mmap(None, 4096, 1, 1, fd, 0); os.close(fd)",
            id="mappings that no object holds",
        ),
        pytest.param("import os\nfor i in range(4000): os.mkdir('d'); os.chdir('d')", id="nested folders"),
        pytest.param("import os\nfor i in range(4000): os.symlink('x' * 4000, str(i))", id="links"),
        pytest.param("import os\nopen('0', 'w')\nfor i in range(4000): os.link('0', str(i + 1))", id="names of one file"),
        pytest.param("import os\nfor i in range(4000): os.mkfifo(str(i))", id="pipes"),
        pytest.param("import os\nos.truncate('program.py', 1 << 40)\nopen('x', 'wb').write(bytes(9 << 20))", id="large"),
    ],
)  # fmt: skip
def test_the_disk_limit_holds(source):
    before = taken()
    result = run_python(source + "\nprint('all of it')", limits=QUICK)
    assert result.verdict in ("disk", "error") and b"all of it" not in result.stdout
    # a bus error where a sparse file grew out of the room; what is refused by name is no matter of room
    assert result.verdict == "disk" or result.status == -signal.SIGBUS or b"Operation not permitted" in result.stderr
    assert taken() - before < 8 << 20  # other processes use the disk too, none of them 400 MiB


@writes
def test_what_fits_may_be_written_and_removed():
    source = """
import os
for i in range(50):
    with open(f"file-{i}", "wb") as file:
        file.write(bytes(1 << 20))
    os.rename(f"file-{i}", "kept")
os.makedirs("a/b/c")
os.remove("kept")
open(b"\\xff\\xfe", "w").write("no UTF-8")
print(len(os.listdir(b".")))
"""
    result = run_python(source, limits=QUICK)
    assert (result.verdict, result.stdout) == ("ok", b"3\n"), result.stderr


@writes
def test_other_files_are_not_even_seen(tmp_path):
    (tmp_path / "expected").write_text("42")
    source = f"""
import os
for path in ({str(tmp_path)!r}, {str(tmp_path / "expected")!r}, {str(Path(__file__))!r}, "/dev/shm", "/etc/passwd", "/proc/self/root/etc/passwd"):
    try:
        print(os.stat(path).st_size)
    except FileNotFoundError:
        print("none")
print(os.path.exists(os.__file__), len(open("/dev/urandom", "rb").read(4)), open("/dev/stdin").read())
"""
    result = run_python(source, b"in", limits=QUICK)
    assert result.stdout.decode().split() == ["none"] * 6 + ["True", "4", "in"], result.stderr


def test_where_no_root_can_be_made_the_folder_is_mounted_as_it_is(monkeypatch, tmp_path):
    if READ_ONLY:
        pytest.skip(f"no folder to write in: {READ_ONLY}")
    other = tmp_path / "jail.py"
    other.write_text(sandbox.JAIL.read_text().replace('spec["calls"]["pivot_root"]', "9999"))
    monkeypatch.setattr(sandbox, "JAIL", other)
    result = run_python(
        "import os\nopen('x', 'w').write('y')\nprint(os.listdir(), os.path.exists('/etc/passwd'))", limits=QUICK
    )
    assert result.stdout == b"['x', 'program.py'] True\n" or result.stdout == b"['program.py', 'x'] True\n"
    assert run_python("open('x', 'wb').write(bytes(9 << 20))", limits=QUICK).verdict == "disk"


@writes
def test_nested_folders_end_no_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where no other test's programs run
    source = "import os\nfor i in range(3000): os.mkdir('d'); os.chdir('d')\nprint(1)"
    problem = Problem(id="a", statement="", tests=(("1", "1"),), seconds=10)
    assert judge(problem, f"```python\n{source}\n```").verdict == "accepted"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["print('\ud800')", "print(1)\0", "\ufeffprint(1)", "print(1)\r\x0c\n" * 3, "x = '" + "a" * 3_000_000]
)
def test_any_text_gets_a_verdict(text):
    problem = Problem(id="a", statement="", tests=(("\ud800", "1"),))
    assert judge(problem, f"```python\n{text}\n```").verdict in ("error", "accepted", "wrong answer", "memory")


@pytest.mark.parametrize(
    "call",
    [
        pytest.param("fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())", id="F_SETOWN"),
        pytest.param("fcntl.fcntl(r, 15, struct.pack('ii', 1, os.getppid()))", id="F_SETOWN_EX"),
        pytest.param("fcntl.fcntl(r, 10, 9)", id="F_SETSIG"),
        pytest.param("fcntl.fcntl(r, 1031, 1 << 20)", id="F_SETPIPE_SZ"),
        pytest.param("fcntl.fcntl(os.open('/usr', 0), 1026, 1)", id="F_NOTIFY"),
        pytest.param("fcntl.fcntl(os.open(sys.executable, 0), 1024, 0)", id="F_SETLEASE"),
        pytest.param("fcntl.flock(os.open(sys.executable, 0), fcntl.LOCK_EX)", id="flock"),
        pytest.param("fcntl.ioctl(r, 0x8901, struct.pack('i', os.getppid()))", id="FIOSETOWN"),
        pytest.param("fcntl.ioctl(r, 0x8902, struct.pack('i', os.getppid()))", id="SIOCSPGRP"),
        pytest.param("fcntl.ioctl(r, 0x5452, struct.pack('i', 1))", id="FIOASYNC"),
        pytest.param("fcntl.ioctl(os.open('program.py', 0), 0x40086602, bytes(8))", id="FS_IOC_SETFLAGS"),
        pytest.param("fcntl.ioctl(os.open('program.py', 0), 0x401C5820, bytes(28))", id="FS_IOC_FSSETXATTR"),
        pytest.param("os.write(0, b'more')", id="writing to stdin"),
        pytest.param("os.truncate('program.py', 0)", id="truncate"),
        pytest.param("os.open('program.py', os.O_RDONLY | os.O_TRUNC)", id="O_RDONLY with O_TRUNC"),
        pytest.param("os.open('program.py', 3)", id="neither for reading nor for writing"),
        pytest.param("os.open('program.py', 3 | os.O_TRUNC)", id="the same, cut"),
        pytest.param("os.setuid(os.getuid())", id="setuid"),
        pytest.param("os.setresuid(os.getuid(), os.getuid(), os.getuid())", id="setresuid"),
        pytest.param("os.setpgid(0, 0)", id="setpgid"),
    ],
)
def test_signals_locks_and_attributes_are_refused(call):
    source = f"import fcntl, os, struct, sys\nr, w = os.pipe()\ntry:\n    {call}\n    print('done')\nexcept OSError as e:\n    print(e.errno)"
    assert run_python(source, b"given", limits=QUICK).stdout == b"1\n"


# What each would be told by a kernel that lets it through is another number: these are on both architectures.
NUMBERED = {
    "prctl: parent death signal": "libc.prctl(1, 0, 0, 0, 0)",
    "prctl: dumpable": "libc.prctl(4, 1, 0, 0, 0)",
    "prctl: ambient capabilities": "libc.prctl(47, 2, 1, 0, 0)",
    "prctl: tracer": "libc.prctl(0x59616D61, -1, 0, 0, 0)",
    "capset": "libc.capset(bytes(8), bytes(24))",
    "inotify_init1": "libc.inotify_init1(0)",
    "fanotify_init": "libc.fanotify_init(0, 0)",
    "personality": "libc.personality(0xffffffff)",
    "setns": "libc.setns(0, 0)",
    "unshare": "libc.unshare(0x10000000)",
    "mount": "libc.mount(b'none', b'/', b'tmpfs', 0, None)",
    "ptrace": "libc.ptrace(16, os.getppid(), 0, 0)",
    "process_vm_readv": "libc.process_vm_readv(os.getppid(), None, 0, None, 0, 0)",
    "shmget": "libc.shmget(0, 4096, 0o600)",
    "semget": "libc.semget(0, 1, 0o600)",
    "msgget": "libc.msgget(0, 0o600)",
    "memfd_create": "libc.memfd_create(b'x', 0)",
    "mq_open": "libc.syscall({'x86_64': 240, 'aarch64': 180}[os.uname().machine], b'x', 66, 0o600, None)",
    "keyctl": "libc.syscall({'x86_64': 250, 'aarch64': 219}[os.uname().machine], 0, -3, 1)",
    "kcmp": "libc.syscall({'x86_64': 312, 'aarch64': 272}[os.uname().machine], os.getppid(), os.getppid(), 0, 0, 0)",
    "seccomp": "libc.syscall({'x86_64': 317, 'aarch64': 277}[os.uname().machine], 2, 0, 0)",
    "bpf": "libc.syscall({'x86_64': 321, 'aarch64': 280}[os.uname().machine], 0, 0, 0)",
    "userfaultfd": "libc.syscall({'x86_64': 323, 'aarch64': 282}[os.uname().machine], 0)",
    "vmsplice": "libc.vmsplice(1, None, 0, 0)",
    "io_uring_setup": "libc.syscall(425, 8, bytes(120))",
    "pidfd_send_signal": "libc.syscall(424, 0, 9, 0, 0)",
    "pidfd_open": "libc.syscall(434, os.getppid(), 0)",
    "pidfd_getfd": "libc.syscall(438, 0, 0, 0)",
    "process_madvise": "libc.syscall(440, 0, 0, 0, 0, 0)",
    "mount_setattr": "libc.syscall(442, -100, b'', 0, 0, 0)",
    "landlock_create_ruleset": "libc.syscall(444, None, 0, 1)",
    "process_mrelease": "libc.syscall(448, 0, 0)",
    "fchmodat2": "libc.syscall(452, -100, b'program.py', 0, 0)",
    "setxattrat": "libc.syscall(463, -100, b'program.py', 0, b'user.x', bytes(16), 16)",
    "file_setattr": "libc.syscall(469, -100, b'program.py', bytes(24), 24, 0)",
}


def test_calls_that_reach_beyond_the_program_are_refused():
    lines = [f"print({name!r}, {call}, ctypes.get_errno(), sep='|')" for name, call in NUMBERED.items()]
    result = run_python(CALLS + "\n".join(lines), limits=QUICK)
    assert result.verdict == "ok", result.stderr
    assert result.stdout.decode().splitlines() == [f"{name}|-1|1" for name in NUMBERED]


def test_calls_of_later_kernels_are_unknown():
    """ENOSYS, so that a library falls back; openat2, whose flags a filter cannot see, and clone3 among them."""
    source = CALLS + "for n in (435, 500, 1000):\n    print(libc.syscall(n, 0, 0, 0, 0), ctypes.get_errno())"
    assert run_python(source, limits=QUICK).stdout.split() == [b"-1", b"38"] * 3


@pytest.mark.parametrize("machine", sorted(system_calls.ARCHITECTURES))
def test_the_table_of_calls(machine):
    tables = [
        system_calls.numbers(table, machine)
        for table in (system_calls.ALLOWED, system_calls.CHECKED, system_calls.KILLED)
    ]
    every = [number for table in tables for number in table.values()]
    assert len(set(every)) == len(every) > 140  # none twice
    assert max(every) <= system_calls.NEWEST
    spans = system_calls.ranges(tables[0].values())
    assert {n for first, last in spans for n in range(first, last + 1)} == set(tables[0].values())


@pytest.mark.slow
def test_capabilities_are_not_inherited():
    """A judge that may hand its capabilities down hands none to a program, not even as root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    judge = """
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
header, held = struct.pack("=Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
libc.capget(header, held)
e0, p0, _, e1, p1, _ = struct.unpack("=6I", held.raw)
assert libc.capset(header, struct.pack("=6I", e0, p0, p0, e1, p1, p1)) == 0
from modeling_deepseek_moe.eval.code.sandbox import run_python
print(run_python("print([line.split()[1] for line in open('/proc/self/status') if line.startswith('Cap')])").stdout)
"""
    done = subprocess.run([sys.executable, "-c", judge], capture_output=True, text=True, check=True)
    assert done.stdout.count("'0000000000000000'") == 5


@pytest.mark.slow
def test_a_program_ends_with_its_judge(tmp_path):
    program = "import ctypes, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nprint('on', flush=True)\ntime.sleep(60)"
    judge = (
        f"from modeling_deepseek_moe.eval.code.sandbox import *\nrun_python({program!r}, limits=Limits(seconds=50))"
    )
    process = subprocess.Popen([sys.executable, "-c", judge], env=os.environ | {"TMPDIR": str(tmp_path)})

    def programs():
        found = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        return [int(line.split()[0]) for line in found.splitlines()[1:] if line.split()[1] == str(process.pid)]

    try:
        end = time.monotonic() + 60
        while not (found := programs()) or b"jail.py" in Path(f"/proc/{found[0]}/cmdline").read_bytes():
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.5)  # for it to have asked
    finally:
        process.kill()
        process.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{found[0]}").exists():
        assert time.monotonic() < end, "the program lives on"
        time.sleep(0.05)


def test_without_a_mount_nothing_can_be_written(monkeypatch, tmp_path):
    """As in a container that allows no namespaces: programs run, their folder can be read, and the reason is told."""
    bare = tmp_path / "jail.py"
    names = "CLONE_NEWNS, CLONE_NEWUSER = "
    bare.write_text(sandbox.JAIL.read_text().replace(names + "0x20000, 0x10000000", names + "1, 1"))
    monkeypatch.setattr(sandbox, "JAIL", bare)
    assert check() == "no user namespace: Invalid argument"
    assert run_python("print(int(input()) * 2)", b"21").stdout == b"42\n"
    for attempt in (
        "open('x', 'w')",
        "os.mkdir('d')",
        "open('program.py', 'a')",
        "os.symlink('a', 'b')",
        "os.rename('program.py', 'x')",
    ):
        result = run_python(f"import os\n{attempt}", limits=QUICK)
        assert result.verdict == "error" and b"rror: " in result.stderr and result.read_only
