"""The one probe of free memory, on trees like those of Linux: control groups of both versions, containers, none."""

from pathlib import Path

import pytest

from qwen2vl_tc.toolchain.host.memory import available_bytes

MB = 1 << 20
MEMINFO = "MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:    8192000 kB\n"
V2 = {"limit": "memory.max", "used": "memory.current", "stat": "memory.stat"}
V1 = {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "stat": "memory.stat"}


def machine(root: Path, groups: str, files: dict[str, str], meminfo: str = MEMINFO) -> Path:
    for path, text in {"proc/meminfo": meminfo, "proc/self/cgroup": groups, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def group(folder: str, names: dict[str, str], limit: int | str, used: int, stat: str = "") -> dict[str, str]:
    values = {"limit": str(limit), "used": str(used), "stat": stat}
    return {f"sys/fs/cgroup/{folder}{names[field]}": f"{value}\n" for field, value in values.items()}


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/\n", group("", V2, 1000 * MB, 400 * MB)),
        ("0::/pod/box\n", group("pod/box/", V2, 1000 * MB, 400 * MB)),
        # the limit of a group above holds for all below it
        ("0::/pod/box\n", group("pod/", V2, 1000 * MB, 400 * MB) | group("pod/box/", V2, "max", 10 * MB)),
        # without a namespace of groups the path is the host's, and the mount is the container's
        ("0::/docker/1234\n", group("", V2, 1000 * MB, 400 * MB)),
        ("4:cpu,memory:/box\n0::/\n", group("memory/box/", V1, 1000 * MB, 400 * MB)),
        ("4:memory:/docker/1234\n1:cpu:/\n", group("memory/", V1, 1000 * MB, 400 * MB)),
    ],
)
def test_a_containers_limit_counts(tmp_path: Path, groups: str, files: dict[str, str]) -> None:
    assert available_bytes(machine(tmp_path, groups, files)) == 600 * MB


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/\n", group("", V2, 1000 * MB, 900 * MB, f"anon 1\nactive_file {100 * MB}\ninactive_file {MB}")),
        (
            "4:memory:/\n",
            group("memory/", V1, 1000 * MB, 900 * MB, f"total_active_file {100 * MB}\ntotal_inactive_file {MB}"),
        ),
    ],
)
def test_what_a_container_has_cached_of_files_is_free(tmp_path: Path, groups: str, files: dict[str, str]) -> None:
    assert available_bytes(machine(tmp_path, groups, files)) == 201 * MB


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("", {}),
        ("0::/\n", group("", V2, "max", 400 * MB)),
        ("4:memory:/\n", group("memory/", V1, 9223372036854771712, 400 * MB)),
        ("0::/\n", group("", V2, 1 << 60, 400 * MB)),
    ],
)
def test_without_a_limit_the_machines_memory_counts(tmp_path: Path, groups: str, files: dict[str, str]) -> None:
    assert available_bytes(machine(tmp_path, groups, files)) == 8192000 << 10


def test_a_full_container_has_nothing_left(tmp_path: Path) -> None:
    assert available_bytes(machine(tmp_path, "0::/\n", group("", V2, 100 * MB, 101 * MB))) == 0


def test_another_system_says_nothing(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
    assert available_bytes(machine(tmp_path, "", {}, meminfo="MemTotal: 1 kB\n")) is None
