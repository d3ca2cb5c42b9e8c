"""Memory that is free: where a container or a job may have less than its machine, that is what counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpift.formats.sizes import available_memory

V2 = ("0::/job/step", "sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file", "max")
V1 = (
    "4:memory:/job/step",
    "sys/fs/cgroup/memory",
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    "total_inactive_file",
    str(2**63 - 4096),
)


def group(folder: Path, names: tuple[str, str], cache: str, limit: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (limit, "700", f"anon 1\n{cache} 300"), strict=True):
        (folder / name).write_text(f"{text}\n")


@pytest.mark.parametrize(("line", "root", "names", "cache", "none"), [V2, V1], ids=["v2", "v1"])
def test_the_narrowest_group_counts(
    line: str, root: str, names: tuple[str, str], cache: str, none: str, tmp_path: Path
) -> None:
    process = tmp_path / "proc/self/cgroup"
    process.parent.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2 kB\n")
    assert available_memory(tmp_path) == 2048, "nothing is said of groups"
    process.write_text(f"5:cpu,cpuacct:/other\n{line}\n")
    assert available_memory(tmp_path) == 2048, "a group that is seen from outside alone"
    group(tmp_path / root / "job/step", names, cache, none)
    assert available_memory(tmp_path) == 2048
    group(tmp_path / root / "job", names, cache, "1000")
    assert available_memory(tmp_path) == 600, "page cache can go"
    group(tmp_path / root / "job", names, cache, "300")
    assert available_memory(tmp_path) == 0
