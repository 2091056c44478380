"""Run as a script: shut this process in, then become the program. Standard library only.

``python -I -S jail.py SPEC COMMAND...`` with SPEC as JSON: ``folder``, ``memory`` (bytes of address space), ``cpu_seconds``,
``disk`` (bytes), ``open_files``, ``status_fd``, ``parent``, ``readable`` (paths), ``calls`` (see ``system_calls.py``).

Five walls, none of which needs root: a mount namespace, in which a tmpfs of fixed size is all that can be written and, of the
rest, only what is readable is there; resource limits; no capability; Landlock (writes in the folder only, reads of the system and the interpreter only, no signals to others
where the kernel is 6.12 or later); seccomp (a list of harmless calls). Where no file system can be mounted, nothing can be
written at all: without one there is no bound to what unlinked and mapped files take.

Over the socket ``status_fd``: ``M`` with a descriptor of the mounted folder, or ``R`` with the reason why it can only be read;
then ``F`` with what could not be set up, and nothing runs, or the socket's end.
"""

import _socket  # the module on top of it takes longer to import than all else here
import ctypes
import errno
import json
import os
import resource
import stat
import struct
import sys

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
SECCOMP_MODE_FILTER = 2
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
STREAMS = ("/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/fd")  # links into /proc
CAPABILITY_VERSION = 0x20080522
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
LANDLOCK_VERSION, LANDLOCK_PATH_BENEATH = 1, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
TCP = 0b11  # bind and connect, since ABI 4
SCOPES = 0b11  # abstract Unix sockets and signals, since ABI 6
CLONE_THREAD, AF_UNIX, O_ACCMODE = 0x10000, 1, 3
PAGE = 4096  # bytes that a file counts at least

LOAD, AND, EQUAL, GREATER, GREATER_EQUAL, ANY_BIT, RETURN = 0x20, 0x54, 0x15, 0x25, 0x35, 0x45, 0x06
ALLOW, END, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
REFUSE, UNKNOWN = FAIL | errno.EPERM, FAIL | errno.ENOSYS
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, (16, 24, 32)  # places in what a filter sees: the low half of each argument

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    spec, command = json.loads(sys.argv[1]), sys.argv[2:]
    os.set_inheritable(spec["status_fd"], False)
    status = _socket.socket(fileno=spec["status_fd"])
    try:
        writable = mount_folder(spec, status)
        limit_resources(spec)
        drop_capabilities()
        _prctl(PR_SET_PDEATHSIG, 9)  # after the above, which clear it
        if os.getppid() != spec["parent"]:
            raise OSError("the process that wanted it is gone")
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        restrict_files(spec["folder"], spec["readable"], writable)
        filter_calls(spec["calls"])
        os.chdir(spec["folder"])
        os.execve(command[0], command, dict(os.environ))
    except OSError as error:
        status.send(b"F" + str(error).encode(errors="replace"))
        os._exit(127)


def mount_folder(spec: dict, status: _socket.socket) -> bool:
    """Mount a tmpfs over the folder, with the files that are in it; whether that could be done.

    Its size and its number of files hold whatever a program does with them: unlinked, mapped, nested. It is gone with the
    last process, so there is nothing to remove afterwards.
    """
    files, folder, disk = [], spec["folder"], spec["disk"]
    for entry in os.scandir(folder):
        with open(entry.path, "rb") as file:
            files.append((entry.path, stat.S_IMODE(entry.stat().st_mode), file.read()))
    # one page and one file more than allowed: that it is full says that it was more
    room = PAGE + disk + sum(-(-len(content) // PAGE) * PAGE for _, _, content in files)
    options = f"size={room},nr_inodes={2 + disk // PAGE + len(files)},mode=700"
    try:
        _new_namespace()
        _mount("none", "/", MS_REC | MS_PRIVATE)
        _new_root(spec, options)
    except OSError as error:
        status.send(b"R" + str(error).encode())
        return False
    for path, mode, content in files:
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, mode)
    mounted = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    status.sendmsg([b"M"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("=i", mounted))])
    os.close(mounted)
    return True


def _new_root(spec: dict, options: str) -> None:
    """A root that holds what is readable and the folder: sizes and names of other files are not to be seen either.

    Where the system refuses that, the folder is mounted where it is, and Landlock alone keeps files from being read.
    """
    folder, bound = spec["folder"], []
    try:
        _mount("tmpfs", folder, MS_NOSUID | MS_NODEV, "size=4m,mode=755")
        for path in sorted(("/proc", "/dev/null", *spec["readable"]), key=len):
            if not path.startswith("/proc/"):
                _show(folder, path, bound)
        for path in filter(os.path.islink, STREAMS):
            os.symlink(os.readlink(path), folder + path)
        if _is_in(folder, bound):
            raise OSError("the folder is within what is readable")
        os.makedirs(folder + folder)
        _mount("tmpfs", folder + folder, MS_NOSUID | MS_NODEV, options)
        os.chdir(folder)
        if libc.syscall(spec["calls"]["pivot_root"], b".", b"."):
            raise OSError(f"pivot_root: {os.strerror(ctypes.get_errno())}")
        _call(libc.umount2, b".", MNT_DETACH)
        os.chdir("/")
    except OSError:
        os.chdir("/")
        libc.umount2(os.fsencode(folder), MNT_DETACH)
        _mount("tmpfs", folder, MS_NOSUID | MS_NODEV, options)


def _show(root: str, path: str, bound: list[str]) -> None:
    """Bind ``path`` to its place below ``root``, with the links on its way. What is bound is never written in: its paths end here."""
    if not os.path.exists(path):
        return
    here, parts = "/", path.strip("/").split("/")
    for i, part in enumerate(parts, 1):
        here = os.path.join(here, part)
        if _is_in(here, bound):
            return
        if os.path.islink(here):
            target = os.readlink(here)
            if not os.path.islink(root + here):
                os.symlink(target, root + here)
            return _show(root, os.path.normpath(os.path.join(os.path.dirname(here), target, *parts[i:])), bound)
        if i < len(parts) or os.path.isdir(here):
            os.makedirs(root + here, exist_ok=True)
        else:
            open(root + here, "w").close()
    _mount(here, root + here, MS_BIND | MS_REC)
    bound.append(here)


def _is_in(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


def _mount(source: str, target: str, flags: int, options: str = "") -> None:
    kind = None if flags & (MS_BIND | MS_PRIVATE) else source.encode()
    _call(libc.mount, os.fsencode(source), os.fsencode(target), kind, flags, options.encode())


def _new_namespace() -> None:
    """A mount namespace: in a user namespace of its own, as any user may where the system allows it, or by root's right."""
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        reason = os.strerror(ctypes.get_errno())
        if libc.unshare(CLONE_NEWNS):
            raise OSError(f"no user namespace: {reason}")
        return
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def limit_resources(spec: dict) -> None:
    limits = {
        resource.RLIMIT_AS: spec["memory"],
        resource.RLIMIT_CPU: spec["cpu_seconds"],
        resource.RLIMIT_FSIZE: spec["disk"],
        resource.RLIMIT_NOFILE: spec["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def drop_capabilities() -> None:
    """None is held, none is inherited, and with an empty bounding set and no new privileges root gets none by execve."""
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) and ctypes.get_errno() not in (errno.EINVAL, errno.EPERM):
            raise OSError(f"capability {capability} cannot be dropped: {os.strerror(ctypes.get_errno())}")
    _call(
        libc.capset, struct.pack("=Ii", CAPABILITY_VERSION, 0), bytes(24)
    )  # the ambient ones go with the inheritable


def restrict_files(folder: str, readable: list[str], writable: bool) -> None:
    """Landlock: everything below ``folder`` if it is ``writable``; reading and execution below ``readable``; nothing elsewhere."""
    abi = libc.syscall(LANDLOCK_CREATE, None, 0, LANDLOCK_VERSION)
    if abi < 1:
        raise OSError(
            f"no Landlock ({os.strerror(ctypes.get_errno())}): without it writes cannot be confined; it needs Linux 5.13 "
            "or later with landlock among the lsm= of the boot options"
        )
    rights = RIGHTS_BY_ABI[max(known for known in RIGHTS_BY_ABI if known <= abi)]
    attributes = struct.pack("=QQQ", rights, TCP if abi >= 4 else 0, SCOPES if abi >= 6 else 0)
    attributes = attributes[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        raise OSError(f"Landlock: no ruleset: {os.strerror(ctypes.get_errno())}")
    reading = EXECUTE | READ_FILE | READ_DIR
    _allow(ruleset, folder, rights if writable else reading)
    for path in readable:
        _allow(ruleset, path, reading)
    _allow(ruleset, "/dev/null", (READ_FILE | WRITE_FILE | TRUNCATE) & rights)
    if libc.syscall(LANDLOCK_RESTRICT, ruleset, 0):
        raise OSError(f"Landlock: cannot restrict: {os.strerror(ctypes.get_errno())}")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= FILE_RIGHTS
    if libc.syscall(LANDLOCK_ADD, ruleset, LANDLOCK_PATH_BENEATH, struct.pack("=Qi", rights, fd), 0):
        raise OSError(f"Landlock: {path}: {os.strerror(ctypes.get_errno())}")
    os.close(fd)


def filter_calls(calls: dict) -> None:
    """seccomp: what is not allowed fails with EPERM, what is too new to be known with ENOSYS; a new process, the network, and
    the numbers of another architecture end the program."""
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, calls["architecture"]),
        (RETURN, 0, 0, END),
        (LOAD, 0, 0, NUMBER),
    ]
    if calls["x32"]:
        program += [(GREATER_EQUAL, 0, 1, 0x40000000), (RETURN, 0, 0, END)]
    for first, last in calls["allowed"]:
        program += [(GREATER_EQUAL, 0, 2, first), (GREATER, 1, 0, last), (RETURN, 0, 0, ALLOW)]
    for number in calls["killed"]:
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, END)]
    # clone of a thread is fine; the flags of clone3 are out of a filter's sight, so libc is made to use clone
    program += [(EQUAL, 0, 1, calls["clone3"]), (RETURN, 0, 0, UNKNOWN)]
    program += [(EQUAL, 0, 4, calls["clone"]), (LOAD, 0, 0, ARGUMENTS[0]), (ANY_BIT, 1, 0, CLONE_THREAD)]
    program += [(RETURN, 0, 0, END), (RETURN, 0, 0, ALLOW)]
    # Unix sockets fail quietly: libc tries one to look up a user's name. Any other asks for the network.
    program += [(EQUAL, 0, 4, calls["socket"]), (LOAD, 0, 0, ARGUMENTS[0]), (EQUAL, 0, 1, AF_UNIX)]
    program += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, END)]
    # signals to oneself, as abort() sends, and to no other; its own limits only
    for name, own in (("kill", os.getpid()), ("tgkill", os.getpid()), ("prlimit64", 0)):
        program += _only(calls[name], ARGUMENTS[0], [own])
    for name, place in (("prctl", 0), ("fcntl", 1), ("ioctl", 1)):
        program += _only(calls[name], ARGUMENTS[place], calls["commands"][name])
    # Landlock before 6.2 does not see a file cut by an opening that cannot write
    for name, place in (("open", 1), ("openat", 2)):
        if name in calls:
            program += [
                (EQUAL, 0, 7, calls[name]),
                (LOAD, 0, 0, ARGUMENTS[place]),
                (AND, 0, 0, os.O_TRUNC | O_ACCMODE),
            ]
            program += [(EQUAL, 2, 0, os.O_TRUNC), (EQUAL, 1, 0, O_ACCMODE), (EQUAL, 0, 1, os.O_TRUNC | O_ACCMODE)]
            program += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    program += [(GREATER, 0, 1, calls["newest"]), (RETURN, 0, 0, UNKNOWN), (RETURN, 0, 0, REFUSE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]

    fprog = Program(len(program), ctypes.addressof(code))
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(fprog))


def _only(number: int, place: int, values: list[int]) -> list[tuple[int, int, int, int]]:
    """Steps that allow a call with some values of an argument and refuse it with all others."""
    checks = [step for value in values for step in ((EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW))]
    return [(EQUAL, 0, len(checks) + 2, number), (LOAD, 0, 0, place), *checks, (RETURN, 0, 0, REFUSE)]


def _call(function, *arguments) -> None:
    if function(*arguments):
        raise OSError(f"{function.__name__}: {os.strerror(ctypes.get_errno())}")


def _prctl(option: int, first: int, second: int = 0) -> None:
    if libc.prctl(option, ctypes.c_ulong(first), ctypes.c_ulong(second), ctypes.c_ulong(0), ctypes.c_ulong(0)):
        raise OSError(f"prctl({option}): {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
