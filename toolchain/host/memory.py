"""How much memory is free: to this process, not to the machine, where a container has a limit of its own."""

from collections.abc import Iterator
from pathlib import Path

# of each version of control groups: the limit, what is used, and the fields of memory.stat that are page cache
_V2 = ("memory.max", "memory.current", ("active_file", "inactive_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping, within the limits of every control group that this process is in.

    None where the system does not say: only Linux does. `root` holds proc and sys.
    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    free = _fields(root / "proc/meminfo").get("MemAvailable")
    if free is None:
        return None
    # in kB
    return max(0, min([free << 10, *_within_limits(root)]))


def _within_limits(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, names = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        group = mount / path.lstrip("/")
        # in a container the path may be the host's, and not there: the mount itself then has the container's limit
        for folder in (group, *group.parents):
            limit, used = _text(folder / names[0]).strip(), _text(folder / names[1]).strip()
            # "max" is no limit; without one version 1 has a number larger than any memory
            if limit.isdecimal() and used.isdecimal():
                stat = _fields(folder / "memory.stat")
                # what is cached of files is given back when it is needed
                yield int(limit) - int(used) + sum(stat.get(name, 0) for name in names[2])
            if folder == mount:
                break


def _fields(path: Path) -> dict[str, int]:
    words = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        # no such group, or another system: nothing is said
        return ""
