"""The system calls that a jailed program may not make, as a filter for bubblewrap's --seccomp.

A BPF program (linux/filter.h): load the number, compare it with each forbidden one, answer EPERM or let it
through. Limits by number of processes do not hold for root, this does. Numbers: the kernel's unistd.h.
"""

import platform
import struct

# name: (x86_64, aarch64); None where the machine has no such call
FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435),
    "execveat": (322, 281), "ptrace": (101, 117), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "bpf": (321, 280), "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "memfd_create": (319, 279),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "pidfd_open": (434, 434),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "setpriority": (141, 140),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_*
LOAD, EQUAL, ABOVE, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # the second: errno 1, EPERM
NUMBER, MACHINE = 0, 4  # offsets in seccomp_data
X32 = 0x40000000  # x86_64's second set of numbers for the same calls


def program() -> bytes | None:
    """The filter for this machine; None where its numbers are not known."""
    if platform.machine() not in MACHINES:
        return None
    column, arch = MACHINES[platform.machine()]
    numbers = [numbers[column] for numbers in FORBIDDEN.values() if numbers[column] is not None]
    lines = [(LOAD, 0, 0, MACHINE), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    lines += [(ABOVE, 0, 1, X32), (RETURN, 0, 0, REFUSE)]
    for number in numbers:
        lines += [(EQUAL, 0, 1, number or 0), (RETURN, 0, 0, REFUSE)]
    lines.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
