"""Run as a script: shut this process in, then become the program. Standard library only.

``python -I -S jail.py SPEC COMMAND...`` with SPEC as JSON: ``folder``, ``memory`` (bytes of address space), ``cpu_seconds``,
``file_bytes``, ``open_files``, ``status_fd``, ``readable`` (paths). What cannot be set up is written to ``status_fd``, and nothing runs.

Four walls, none of which needs root: resource limits; Landlock (writes in the folder only, reads of the system and the
interpreter only, no signals to others where the kernel is 6.12 or later); seccomp (one process, no network, no tracing, no
signals, nothing of the kernel's administration); and, under root, an empty capability bounding set.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
SECCOMP_MODE_FILTER = 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
LANDLOCK_VERSION, LANDLOCK_PATH_BENEATH = 1, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
TCP = 0b11  # bind and connect, since ABI 4
SCOPES = 0b11  # abstract Unix sockets and signals, since ABI 6

# Architecture -> its audit number and the numbers of its system calls.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
KILLED = {  # a program that asks for these is ended: a new process
    "x86_64": {"fork": 57, "vfork": 58},
    "aarch64": {},
}
CLONE, CLONE3 = {"x86_64": 56, "aarch64": 220}, {"x86_64": 435, "aarch64": 435}
SOCKET, KILL, TGKILL = {"x86_64": 41, "aarch64": 198}, {"x86_64": 62, "aarch64": 129}, {"x86_64": 234, "aarch64": 131}
PRLIMIT = {"x86_64": 302, "aarch64": 261}
CLONE_THREAD, AF_UNIX = 0x10000, 1
REFUSED = {  # fail with EPERM
    "x86_64": {
        **{
            "socketpair": 53,
            "connect": 42,
            "bind": 49,
            "ptrace": 101,
            "tkill": 200,
            "shmget": 29,
            "semget": 64,
            "msgget": 68,
        },
        **{
            "mq_open": 240,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "unshare": 272,
            "setns": 308,
            "mount": 165,
        },
        **{"umount2": 166, "pivot_root": 155, "chroot": 161, "bpf": 321, "perf_event_open": 298, "memfd_create": 319},
        **{
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "userfaultfd": 323,
            "rt_sigqueueinfo": 129,
            "setuid": 105,
        },
        **{
            "rt_tgsigqueueinfo": 297,
            "reboot": 169,
            "swapon": 167,
            "init_module": 175,
            "finit_module": 313,
            "setgid": 106,
        },
        **{
            "kexec_load": 246,
            "open_by_handle_at": 304,
            "personality": 135,
            "setpriority": 141,
            "sched_setaffinity": 203,
        },
        "sched_setscheduler": 144,
        # of files that are not its own: modes, owners, times, attributes, which Landlock leaves alone
        **{
            "chmod": 90,
            "fchmod": 91,
            "fchmodat": 268,
            "chown": 92,
            "fchown": 93,
            "lchown": 94,
            "fchownat": 260,
            "utime": 132,
        },
        **{"utimes": 235, "futimesat": 261, "utimensat": 280, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190},
        **{
            "removexattr": 197,
            "lremovexattr": 198,
            "fremovexattr": 199,
            "shmat": 30,
            "shmctl": 31,
            "semop": 65,
            "semctl": 66,
        },
        **{"semtimedop": 220, "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "mq_unlink": 241, "sched_setattr": 314},
        **{"sched_setparam": 142, "ioprio_set": 251},
    },
    "aarch64": {
        **{"socketpair": 199, "connect": 203, "bind": 200, "ptrace": 117, "tkill": 130, "shmget": 194, "semget": 190},
        **{
            "msgget": 186,
            "mq_open": 180,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "unshare": 97,
            "setns": 268,
        },
        **{
            "mount": 40,
            "umount2": 39,
            "pivot_root": 41,
            "chroot": 51,
            "bpf": 280,
            "perf_event_open": 241,
            "setuid": 146,
        },
        **{"memfd_create": 279, "process_vm_readv": 270, "process_vm_writev": 271, "userfaultfd": 282, "setgid": 144},
        **{"rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "reboot": 142, "swapon": 224, "init_module": 105},
        **{"finit_module": 273, "kexec_load": 104, "open_by_handle_at": 265, "personality": 92, "setpriority": 140},
        **{
            "sched_setaffinity": 122,
            "sched_setscheduler": 119,
            "fchmod": 52,
            "fchmodat": 53,
            "fchownat": 54,
            "fchown": 55,
        },
        **{"utimensat": 88, "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15},
        **{
            "fremovexattr": 16,
            "shmctl": 195,
            "shmat": 196,
            "semctl": 191,
            "semop": 193,
            "semtimedop": 192,
            "msgctl": 187,
        },
        **{
            "msgrcv": 188,
            "msgsnd": 189,
            "mq_unlink": 181,
            "sched_setattr": 274,
            "sched_setparam": 118,
            "ioprio_set": 30,
        },
    },
}
REFUSED_EVERYWHERE = {  # newer calls have one number on all architectures
    **{
        "pidfd_send_signal": 424,
        "io_uring_setup": 425,
        "io_uring_enter": 426,
        "io_uring_register": 427,
        "open_tree": 428,
    },
    **{"move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "pidfd_open": 434, "pidfd_getfd": 438},
    **{"process_madvise": 440, "memfd_secret": 447, "fchmodat2": 452, "setxattrat": 463, "removexattrat": 466},
}
LOAD, EQUAL, GREATER_EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, END, FAIL = 0x7FFF0000, 0x80000000, 0x00050000

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    spec, command = json.loads(sys.argv[1]), sys.argv[2:]
    status = spec["status_fd"]
    os.set_inheritable(status, False)
    try:
        machine = platform.machine()
        if sys.platform != "linux" or machine not in ARCHITECTURES:
            raise OSError(f"found {sys.platform} on {machine}, wanted Linux on {' or '.join(ARCHITECTURES)}")
        limit_resources(spec)
        _prctl(PR_SET_PDEATHSIG, 9)
        drop_capabilities()
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        restrict_files(spec["folder"], spec["readable"])
        filter_calls(machine)
        os.chdir(spec["folder"])
        os.execve(command[0], command, dict(os.environ))
    except OSError as error:
        os.write(status, str(error).encode())
        os._exit(127)


def limit_resources(spec: dict) -> None:
    limits = {
        resource.RLIMIT_AS: spec["memory"],
        resource.RLIMIT_CPU: spec["cpu_seconds"],
        resource.RLIMIT_FSIZE: spec["file_bytes"],
        resource.RLIMIT_NOFILE: spec["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def drop_capabilities() -> None:
    """With an empty bounding set, root has no capability after the program has started."""
    if os.geteuid() == 0:
        for capability in range(64):
            if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) and ctypes.get_errno() != errno.EINVAL:
                raise OSError(f"capability {capability} cannot be dropped: {os.strerror(ctypes.get_errno())}")


def restrict_files(folder: str, readable: list[str]) -> None:
    """Landlock: everything below ``folder``; reading and execution below ``readable``; nothing elsewhere."""
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
    _allow(ruleset, folder, rights)
    for path in readable:
        _allow(ruleset, path, EXECUTE | READ_FILE | READ_DIR)
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


def filter_calls(machine: str) -> None:
    """seccomp: see the module's docstring. The numbers of another architecture's calls end the process."""
    refuse, ignore = FAIL | errno.EPERM, FAIL | errno.ENOSYS
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, ARCHITECTURES[machine]), (RETURN, 0, 0, END), (LOAD, 0, 0, 0)]
    if machine == "x86_64":
        program += [(GREATER_EQUAL, 0, 1, 0x40000000), (RETURN, 0, 0, END)]  # x32
    for number in KILLED[machine].values():
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, END)]
    # clone of a thread is fine; the flags of clone3 are out of a filter's sight, so libc is made to use clone
    program += [(EQUAL, 0, 1, CLONE3[machine]), (RETURN, 0, 0, ignore)]
    program += [(EQUAL, 0, 4, CLONE[machine]), (LOAD, 0, 0, 16), (ANY_BIT, 1, 0, CLONE_THREAD)]
    program += [(RETURN, 0, 0, END), (RETURN, 0, 0, ALLOW)]
    # Unix sockets fail quietly: libc tries one to look up a user's name. Any other asks for the network.
    program += [(EQUAL, 0, 4, SOCKET[machine]), (LOAD, 0, 0, 16), (EQUAL, 0, 1, AF_UNIX)]
    program += [(RETURN, 0, 0, refuse), (RETURN, 0, 0, END)]
    for number in (KILL[machine], TGKILL[machine]):  # signals to oneself, as abort() sends, and to no other
        program += [(EQUAL, 0, 4, number), (LOAD, 0, 0, 16), (EQUAL, 0, 1, os.getpid())]
        program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, refuse)]
    program += [(EQUAL, 0, 4, PRLIMIT[machine]), (LOAD, 0, 0, 16), (EQUAL, 0, 1, 0)]  # its own limits only
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, refuse)]
    for number in (REFUSED[machine] | REFUSED_EVERYWHERE).values():
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, refuse)]
    program.append((RETURN, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]

    fprog = Program(len(program), ctypes.addressof(code))
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(fprog))


def _prctl(option: int, first: int, second: int = 0) -> None:
    if libc.prctl(option, ctypes.c_ulong(first), ctypes.c_ulong(second), ctypes.c_ulong(0), ctypes.c_ulong(0)):
        raise OSError(f"prctl({option}): {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
