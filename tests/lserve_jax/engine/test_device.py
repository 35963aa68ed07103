"""The device: the platform that is asked for, is there, or is overlooked; and plans for one that is elsewhere."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import pytest

from lserve_jax import InputError, calibrate, convert, demo, evaluate, generate, prepare
from lserve_jax.engine.device import Device, device_elsewhere, overlooked_gpu, this_device

ROOT = Path(__file__).parents[3]
TINY = ROOT / "tests" / "golden" / "tiny" / "llama3"
PLAN = ("--model", "llama-3.1-8b", "--dry-run")
GIB = 2**30
CUDA_EXTRA = "pip install 'lserve_jax[cuda13]'"
# What jax raises, by what is asked for; for cuda alone it asserts if no GPU is visible.
RAISED = {
    "cuda": AssertionError(),
    "gpu": RuntimeError(
        "Unable to initialize backend 'rocm': Backend 'rocm' is not in the list of known backends: ['cpu', 'tpu']. "
        "(set JAX_PLATFORMS='' to automatically choose an available backend)"
    ),
    "tpu": RuntimeError(
        "Unable to initialize backend 'tpu': INTERNAL: Failed to open libtpu.so: no such file "
        "(set JAX_PLATFORMS='' to automatically choose an available backend)"
    ),
    "": RuntimeError(
        "Unable to initialize backend 'cuda': INTERNAL: no supported devices found "
        "(you may need to uninstall the failing plugin package, or set JAX_PLATFORMS=cpu to skip this backend.)"
    ),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets the platforms that are asked for, those that are installed, and lets jax fail as it then does."""
    before = jax.config.jax_platforms
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)  # benches set it in this process

    def ask(platforms: str, *, installed: Sequence[str] = ("cpu",), fails: bool = True) -> None:
        def fail() -> str:
            raise RAISED[platforms]

        jax.config.update("jax_platforms", platforms)
        monkeypatch.setattr("lserve_jax.engine.device.installed_platforms", lambda: tuple(installed))
        if fails:
            monkeypatch.setattr(jax, "default_backend", fail)

    yield ask
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    ("platforms", "installed", "line"),
    [
        (
            "cuda",
            ("cpu",),
            f"JAX_PLATFORMS=cuda: there is no such device here; this jax has cpu; for an NVIDIA GPU: {CUDA_EXTRA}",
        ),
        ("cuda", ("cpu", "cuda"), "this jax has cpu, cuda; does nvidia-smi list a GPU here?"),
        ("gpu", ("cpu",), CUDA_EXTRA),
        ("gpu", ("cpu", "cuda"), "an NVIDIA GPU is named cuda"),
        ("tpu", ("cpu",), "this jax has cpu; INTERNAL: Failed to open libtpu.so: no such file"),
        ("", ("cpu", "cuda"), "jax cannot start a device (INTERNAL: no supported devices found); JAX_PLATFORMS=cpu"),
    ],
)
def test_a_platform_that_is_not_there_is_named_with_those_that_are_and_what_to_install(
    platforms: str, installed: tuple[str, ...], line: str, asked: Callable[..., None]
):
    asked(platforms, installed=installed)
    with pytest.raises(InputError) as caught:
        this_device()
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (generate.main, ("--prompt", "hi")),
        (calibrate.main, ("--out", "new", "--no-picture")),
        (evaluate.main, ("--out", "new")),
        (convert.main, ("--out", "new")),
        (demo.main, None),
    ],
)
def test_every_command_says_in_one_line_that_its_platform_is_not_there(
    main: Callable[[Sequence[str]], int],
    arguments: tuple[str, ...] | None,
    asked: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)
    asked("cuda")
    assert main(() if arguments is None else ("--model", str(TINY), *arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: JAX_PLATFORMS=cuda: ")
    assert not [*tmp_path.iterdir()]


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """The rows of a plan."""
    assert generate.main([*PLAN, *arguments]) == 0
    rows = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    return {name: value.strip() for name, value in rows.items()}


def test_a_plan_needs_no_device_and_says_what_it_does_not_know(
    asked: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    here = plan(capsys, "--prefill-chunk", "2048")
    asked("cuda")
    rows = plan(capsys)
    unknown = "not known: the device is not here"
    assert rows == {name: value for name, value in here.items() if name != "largest context"} | {
        "memory": unknown,
        "kernels": unknown,
    }
    assert generate.main([*PLAN, "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [found[name] for name in ("free_bytes", "fits", "largest_context", "implementations")] == [None] * 4
    assert "JAX_PLATFORMS=cuda: there is no such device here" in captured.err
    assert "--memory 80GiB" in captured.err


def test_a_plan_for_a_named_memory_asks_no_device(asked: Callable[..., None], capsys: pytest.CaptureFixture[str]):
    asked("cuda")
    rows = plan(capsys, "--memory", "80GiB")
    assert rows["memory"] == "60.00 GiB free, 90% of it usable: fits"
    assert rows["kernels"] == "not known: the device is not here"
    # 0.9 · 60 GiB − weights of 16,060,522,496 bytes − an open page of 8,388,608, in pages of 8,912,896 bytes
    pages = (int(0.9 * 60 * GIB) - 16_060_522_496 - 8_388_608) // 8_912_896
    assert rows["largest context"] == f"{pages * 64:,} tokens x 1 sequence(s)"
    assert "DOES NOT FIT" in plan(capsys, "--memory", "24GB")["memory"]


def test_a_memory_without_a_plan_is_refused(capsys: pytest.CaptureFixture[str]):
    assert generate.main(["--model", str(TINY), "--prompt", "hi", "--memory", "80GiB"]) == 2
    assert "--memory is for a plan: give --dry-run too" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("platforms", "fraction", "device"),
    [
        ("", None, Device(platform="gpu", free_bytes=60 * GIB, is_here=False)),
        ("cuda", "0.9", Device(platform="gpu", free_bytes=72 * GIB, is_here=False)),
        ("cpu", None, Device(platform="cpu", free_bytes=80 * GIB, is_here=False)),
    ],
)
def test_jax_takes_a_share_of_a_gpus_memory(
    platforms: str, fraction: str | None, device: Device, asked: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    asked(platforms, fails=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    if fraction is not None:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", fraction)
    assert device_elsewhere(80 * GIB) == device


def test_a_share_of_a_gpus_memory_that_is_no_number_is_refused(
    asked: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    asked("", fails=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(InputError, match="XLA_PYTHON_CLIENT_MEM_FRACTION='most' must be a number"):
        device_elsewhere(GIB)


@pytest.mark.parametrize(
    ("platforms", "is_visible", "installed", "line"),
    [
        ("", True, ("cpu",), f"the CPU computes: an NVIDIA GPU is here, but jax has no CUDA plugin: {CUDA_EXTRA}"),
        ("", False, ("cpu", "cuda"), "the CPU computes: jax has a CUDA plugin, but no NVIDIA GPU is visible"),
        ("", False, ("cpu",), None),
        ("cpu", True, ("cpu",), None),
    ],
)
def test_a_gpu_that_is_overlooked_is_warned_of(
    platforms: str,
    is_visible: bool,
    installed: tuple[str, ...],
    line: str | None,
    asked: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    (tmp_path / "there").write_text("")
    path = tmp_path / ("there" if is_visible else "absent")
    monkeypatch.setattr("lserve_jax.engine.device.NVIDIA_DEVICES", (path,))
    asked(platforms, installed=installed, fails=False)
    warnings = [one for one in prepare(str(TINY), attention="dense").warnings if "the CPU computes" in one]
    assert len(warnings) == (line is not None)
    assert all(one.startswith(line or "") for one in warnings)
    assert overlooked_gpu(Device(platform="gpu", free_bytes=GIB)) is None


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_program_without_its_platform_plans_and_refuses(platform: str, tmp_path: Path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *arguments]
        environment = os.environ | {"JAX_PLATFORMS": platform}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    planned = run("lserve_jax.generate", *PLAN, "--quiet")
    assert (planned.returncode, planned.stderr) == (0, "")
    assert "not known" in planned.stdout
    refused = run("lserve_jax.convert", "--model", str(TINY), "--out", str(tmp_path / "new"))
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"error: JAX_PLATFORMS={platform}: there is no such device here; this jax has cpu")
    assert not [*tmp_path.iterdir()]
