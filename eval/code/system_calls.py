"""The system calls that a judged program may make, for seccomp: a list of what is allowed, so that a call that a later
kernel brings is refused until it stands here.

What is left out, because it reaches beyond the program: processes, the network, signals to others and everything by which the
kernel sends one on a program's behalf (owners of descriptors, leases, notifications), tracing, memory of others or outside
the limits, mounts, keys, watches on folders, modes, owners, times, attributes and flags of files, priorities of others.
"""

import platform
import sys

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # -> audit number

# name:number on x86-64:number on aarch64
ALLOWED = """
    read:0:63 write:1:64 pread64:17:67 pwrite64:18:68 readv:19:65 writev:20:66 preadv:295:69 pwritev:296:70
    preadv2:327:286 pwritev2:328:287 lseek:8:62 sendfile:40:71 copy_file_range:326:285
    creat:85:- close:3:57 close_range:436:436 dup:32:23 dup2:33:- dup3:292:24 pipe:22:-
    pipe2:293:59 stat:4:- fstat:5:80 lstat:6:- newfstatat:262:79 statx:332:291 statfs:137:43 fstatfs:138:44
    access:21:- faccessat:269:48 faccessat2:439:439 readlink:89:- readlinkat:267:78 getdents:78:-
    getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50 mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:-
    unlinkat:263:35 rename:82:- renameat:264:38 renameat2:316:276 link:86:- linkat:265:37 symlink:88:-
    symlinkat:266:36 umask:95:166 ftruncate:77:46 fallocate:285:47 fsync:74:82 fdatasync:75:83
    fadvise64:221:223
    poll:7:- ppoll:271:73 select:23:- pselect6:270:72 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21
    epoll_wait:232:- epoll_pwait:281:22 epoll_pwait2:441:441 eventfd:284:- eventfd2:290:19
    timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87
    mmap:9:222 munmap:11:215 mprotect:10:226 mremap:25:216 madvise:28:233 msync:26:227 mincore:27:232
    brk:12:214 mlock:149:228 mlock2:325:284 munlock:150:229 mlockall:151:230 munlockall:152:231
    pkey_alloc:330:289 pkey_free:331:290 pkey_mprotect:329:288 membarrier:324:283 mseal:462:462
    signalfd:282:- signalfd4:289:74
    rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigpending:127:136 rt_sigsuspend:130:133
    rt_sigtimedwait:128:137 rt_sigreturn:15:139 sigaltstack:131:132 restart_syscall:219:128 alarm:37:-
    pause:34:- setitimer:38:103 getitimer:36:102 timer_create:222:107 timer_settime:223:110
    timer_gettime:224:108 timer_getoverrun:225:109 timer_delete:226:111 nanosleep:35:101
    clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169 time:201:-
    times:100:153
    getpid:39:172 gettid:186:178 getppid:110:173 getpgrp:111:- getpgid:121:155 getsid:124:156 getuid:102:174
    geteuid:107:175 getgid:104:176 getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158
    capget:125:90 getpriority:140:141 getrlimit:97:163 setrlimit:160:164 getrusage:98:165 sysinfo:99:179
    uname:63:160 getcpu:309:168 getrandom:318:278
    sched_yield:24:124 sched_getaffinity:204:123 sched_getparam:143:121 sched_getscheduler:145:120
    sched_getattr:315:275 sched_get_priority_max:146:125 sched_get_priority_min:147:126
    sched_rr_get_interval:148:127
    futex:202:98 futex_wake:454:454 futex_wait:455:455 futex_requeue:456:456 futex_waitv:449:449
    set_robust_list:273:99 set_tid_address:218:96 rseq:334:293 arch_prctl:158:- execve:59:221 exit:60:93
    exit_group:231:94 wait4:61:260 waitid:247:95
"""
# Ended with the program: a new process.
KILLED = "fork:57:- vfork:58:-"
# Decided by their arguments, in `jail.filter_calls`.
CHECKED = """
    open:2:- openat:257:56 clone:56:220 clone3:435:435 socket:41:198 kill:62:129 tgkill:234:131
    prlimit64:302:261 prctl:157:167 fcntl:72:25 ioctl:16:29
"""
ITS_OWN = "pivot_root:155:41"  # by number, since libc has no name for it; the jail's, not the program's
NEWEST = 469  # a later call is unknown here: ENOSYS, on which a libc falls back to an older one

# The commands of three calls that change nothing outside the program.
PRCTL = {"GET_PDEATHSIG": 2, "GET_DUMPABLE": 3, "SET_NAME": 15, "GET_NAME": 16, "GET_SECCOMP": 21, "CAPBSET_READ": 23}
PRCTL |= {"GET_NO_NEW_PRIVS": 39, "SET_VMA": 0x53564D41}
FCNTL = {"DUPFD": 0, "GETFD": 1, "SETFD": 2, "GETFL": 3, "SETFL": 4, "GETLK": 5, "SETLK": 6, "SETLKW": 7}
FCNTL |= {
    "OFD_GETLK": 36,
    "OFD_SETLK": 37,
    "OFD_SETLKW": 38,
    "DUPFD_CLOEXEC": 1030,
    "GETPIPE_SZ": 1032,
    "GET_SEALS": 1034,
}
IOCTL = {
    "TCGETS": 0x5401,
    "TIOCGWINSZ": 0x5413,
    "FIONREAD": 0x541B,
    "FIONBIO": 0x5421,
    "FIONCLEX": 0x5450,
    "FIOCLEX": 0x5451,
}


def rules() -> dict:
    """What `jail.filter_calls` takes, for this machine.

    Raises:
        OSError: another system or processor than those of the table.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ARCHITECTURES:
        raise OSError(f"found {sys.platform} on {machine}, wanted Linux on {' or '.join(ARCHITECTURES)}")
    return {
        "architecture": ARCHITECTURES[machine],
        "x32": machine == "x86_64",
        "allowed": ranges(numbers(ALLOWED, machine).values()),
        "killed": list(numbers(KILLED, machine).values()),
        "newest": NEWEST,
        "pivot_root": numbers(ITS_OWN, machine)["pivot_root"],
        **numbers(CHECKED, machine),
        "commands": {
            "prctl": sorted(PRCTL.values()),
            "fcntl": sorted(FCNTL.values()),
            "ioctl": sorted(IOCTL.values()),
        },
    }


def numbers(table: str, machine: str) -> dict[str, int]:
    """Name -> number, of the calls that the machine has."""
    column = 1 + list(ARCHITECTURES).index(machine)
    rows = (entry.split(":") for entry in table.split())
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def ranges(values) -> list[tuple[int, int]]:
    """Sorted numbers as ``(first, last)`` of each unbroken run: fewer steps for the kernel."""
    found: list[tuple[int, int]] = []
    for value in sorted(values):
        if found and found[-1][1] + 1 == value:
            found[-1] = (found[-1][0], value)
        else:
            found.append((value, value))
    return found
