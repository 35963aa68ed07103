"""What the command-line programs share: one-line errors, exit status, progress bars, the compilation cache on disk."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import jax
from tqdm import tqdm

from lserve_jax.weights.embedded import default_cache_folder


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the list of all flags before it."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        self.exit(2, _error_line(f"{message} (--help lists the flags)"))


def run_command(command: Callable[[], None]) -> int:
    """Returns the exit status of a command: 0, 2 after one line on stderr that says what to mend, or 130 if stopped."""
    try:
        command()
    except BrokenPipeError:  # whoever read the output, such as `head`, has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails again
        return 141
    except OSError as error:
        sys.stderr.write(_error_line(f"{error.filename or 'input or output'}: {error.strerror or error}"))
        return 2
    except (ValueError, NotImplementedError) as error:
        sys.stderr.write(_error_line(str(error)))
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.stderr.write(
            _error_line(f"the device is out of memory; lower --max-model-len or --prefill-chunk ({error})")
        )
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def layer_numbers(text: str) -> tuple[int, ...]:
    """Returns the layers that ``--dense-layers`` names."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--dense-layers {text!r} must be layer numbers with commas between, such as 0,1") from None


def _error_line(message: str) -> str:
    return f"error: {' '.join(message.split())}\n"


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk between runs, unless JAX_COMPILATION_CACHE_DIR names a folder already.

    Raises:
      ValueError: if the folder cannot be written to.
    """
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = Path(named) if named else default_cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"cache folder {folder} cannot be written to ({error.strerror}): "
            f"set {'JAX_COMPILATION_CACHE_DIR' if named else 'XDG_CACHE_HOME'} to one that can"
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class ProgressBars:
    """A bar on stderr for the stage that is going on; stages are named by the caller as they come."""

    def __init__(self, *, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._stage = ""
        self._bar: tqdm | None = None

    def report(self, stage: str, done: int, total: int) -> None:
        """Shows that ``done`` of ``total`` of a stage is done; a new stage ends the one before."""
        if not self._is_shown:
            return
        if stage != self._stage:
            self.close()
            self._stage = stage
            if total == 1:
                print(f"{stage} …", file=sys.stderr, flush=True)
                return
            self._bar = tqdm(desc=stage, total=total, unit_scale=True, file=sys.stderr, leave=True, mininterval=0.3)
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            if done >= total:
                self.close()

    def close(self) -> None:
        """Ends the bar that is shown, if any."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
