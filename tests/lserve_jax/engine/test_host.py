"""The free memory of the host and of the control groups around a process, on file systems that the tests make."""

from pathlib import Path

import pytest

from lserve_jax.engine.host import host_memory

GIB = 2**30
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


def host(root: Path, *, available: int = 64 * GIB, groups: str = "0::/\n") -> Path:
    """A host with some available memory, whose process is in the groups of `/proc/self/cgroup`."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal:  99999999999 kB\nMemAvailable:  {available // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    return root


def group(folder: Path, **files: object) -> None:
    """A control group; `memory_max=1` is the file memory.max, a dict is the rows of memory.stat."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        rows = "".join(f"{row} {size}\n" for row, size in value.items()) if isinstance(value, dict) else f"{value}\n"
        (folder / name.replace("memory_", "memory.")).write_text(rows)


def test_page_cache_of_a_container_is_free_memory(tmp_path: Path):
    """Reading a checkpoint fills the page cache: 30 of 32 GiB are "used", and 24 of these are given up on demand."""
    stat = {"anon": 5 * GIB, "file": 25 * GIB, "shmem": GIB, "inactive_file": 20 * GIB, "active_file": 4 * GIB}
    group(host(tmp_path) / V2, memory_max=32 * GIB, memory_current=30 * GIB, memory_stat=stat)
    assert host_memory(tmp_path) == 26 * GIB


def test_the_caches_of_files_that_the_kernel_keeps_are_free_memory_too(tmp_path: Path):
    stat = {"inactive_file": GIB, "slab_reclaimable": 2 * GIB, "slab_unreclaimable": 4 * GIB}
    group(host(tmp_path) / V2, memory_max=32 * GIB, memory_current=30 * GIB, memory_stat=stat)
    assert host_memory(tmp_path) == 5 * GIB


def test_version_1_counts_the_page_cache_of_the_groups_within(tmp_path: Path):
    """`inactive_file` is that of the group alone there, `total_inactive_file` that of its children too."""
    stat = {"inactive_file": 0, "total_inactive_file": 20 * GIB, "total_active_file": 4 * GIB}
    host(tmp_path, groups="5:cpu,cpuacct:/\n4:memory:/\n0::/\n")
    limits = {"memory_limit_in_bytes": 32 * GIB, "memory_usage_in_bytes": 30 * GIB}
    group(tmp_path / V1, memory_stat=stat, **limits)
    assert host_memory(tmp_path) == 26 * GIB


@pytest.mark.parametrize("hierarchy", [V2, V1])
def test_the_tightest_of_nested_groups_counts(hierarchy: str, tmp_path: Path):
    """A service within a slice: the outermost group has no limit of its own, and the slice holds other services."""
    host(
        tmp_path,
        groups="0::/one.slice/two.service\n" if hierarchy == V2 else "3:cpuset,memory:/one.slice/two.service\n",
    )
    limit, used = (
        ("memory_max", "memory_current") if hierarchy == V2 else ("memory_limit_in_bytes", "memory_usage_in_bytes")
    )
    group(tmp_path / hierarchy)
    group(tmp_path / hierarchy / "one.slice", **{limit: 16 * GIB, used: 13 * GIB})
    group(tmp_path / hierarchy / "one.slice/two.service", **{limit: 8 * GIB, used: GIB})
    group(tmp_path / hierarchy / "one.slice/another.service", **{limit: GIB, used: GIB})
    assert host_memory(tmp_path) == 3 * GIB


@pytest.mark.parametrize("groups", ["4:memory:/docker/0123\n0::/docker/0123\n", "0::/../../elsewhere\n", ""])
def test_a_group_whose_path_is_outside_the_container_is_found_where_it_is_mounted(groups: str, tmp_path: Path):
    group(host(tmp_path, groups=groups) / V2, memory_max=8 * GIB, memory_current=GIB)
    group(tmp_path / "sys/fs/elsewhere", memory_max=GIB, memory_current=GIB)
    assert host_memory(tmp_path) == 7 * GIB


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 64),  # a system without control groups
        ({"memory_max": "max", "memory_current": GIB}, 64),
        ({"memory_max": 900 * GIB, "memory_current": GIB}, 64),  # more than the host has
        ({"memory_max": GIB, "memory_current": 3 * GIB}, 0),  # a limit that was lowered
        ({"memory_max": 8 * GIB, "memory_current": GIB, "memory_stat": {"inactive_file": 2 * GIB}}, 8),  # counted later
        ({"memory_max": "max", "memory_high": 4 * GIB, "memory_current": GIB}, 3),  # beyond it a process is slowed down
        ({"memory_limit_in_bytes": 2**63 - 4096, "memory_usage_in_bytes": GIB}, 64),  # version 1's word for "max"
    ],
)
def test_limits_as_they_occur(files: dict[str, object], free: int, tmp_path: Path):
    host(tmp_path)
    group(tmp_path / (V1 if "memory_limit_in_bytes" in files else V2), **files)
    assert host_memory(tmp_path) == free * GIB


def test_swap_is_not_memory(tmp_path: Path):
    group(host(tmp_path) / V2, memory_max=8 * GIB, memory_current=GIB, memory_swap_max=64 * GIB, memory_swap_current=0)
    assert host_memory(tmp_path) == 7 * GIB


def test_this_machine_has_free_memory():
    assert 0 < host_memory() < 2**50
