"""The free memory of the host, within the limits of the control groups (containers, services) around this process."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["host_memory"]


@dataclass(frozen=True, kw_only=True)
class _Interface:
    """Where a version of control groups says what a group may use and uses.

    Attributes:
      mount: folder of the hierarchy.
      controller: how `/proc/self/cgroup` names the hierarchy.
      limits: files with the most bytes that a group may use; "max" for no limit.
      used: file with the bytes that it uses, page cache included.
      reclaimable: rows of `memory.stat` that the kernel gives up before it refuses memory. They are those that
        `MemAvailable` counts as free: page cache (without tmpfs) and, where the group counts it, slab.
    """

    mount: str
    controller: str
    limits: tuple[str, ...]
    used: str
    reclaimable: tuple[str, ...]


_INTERFACES = (
    _Interface(
        mount="sys/fs/cgroup",
        controller="",
        limits=("memory.max", "memory.high"),
        used="memory.current",
        reclaimable=("inactive_file", "active_file", "slab_reclaimable"),
    ),
    _Interface(
        mount="sys/fs/cgroup/memory",
        controller="memory",
        limits=("memory.limit_in_bytes",),
        used="memory.usage_in_bytes",
        reclaimable=("total_inactive_file", "total_active_file"),
    ),
)


def host_memory(root: Path = Path("/")) -> int:
    """Returns the bytes of memory that this process can still use; ``root`` is for tests.

    They are the host's available bytes, or what a control group leaves if that is less. Page cache counts as free in
    both, and swap does not count.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *(free for interface in _INTERFACES for free in _left_by_groups(root, interface))])


def _left_by_groups(root: Path, interface: _Interface) -> Iterator[int]:
    """Yields the bytes that each group with a limit leaves: those of the process and all groups that hold them."""
    for group in _groups(root, interface):
        limits = [int(text) for name in interface.limits if (text := _read(group / name)).isdecimal()]
        used = _read(group / interface.used)
        if limits and used:
            rows = dict(line.split() for line in _read(group / "memory.stat").splitlines())
            reclaimable = sum(int(rows.get(name, 0)) for name in interface.reclaimable)
            yield max(min(limits) - max(int(used) - reclaimable, 0), 0)


def _groups(root: Path, interface: _Interface) -> Iterator[Path]:
    """Yields the folders of a hierarchy's groups that hold this process, from the outermost one inwards.

    In a container, the outermost folder is often the container's own group, and the path of the process is one outside
    the container: then its folder does not exist, and has no files to read.
    """
    folder = root / interface.mount
    yield folder
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        parts = PurePosixPath(path).parts[1:]
        if interface.controller in controllers.split(",") and ".." not in parts:
            yield from (folder.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1))


def _read(path: Path) -> str:
    """Returns the stripped text of a file; nothing if it cannot be read, as where a system has no control groups."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
