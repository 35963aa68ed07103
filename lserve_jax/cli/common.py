"""What the commands share: one-line errors, exit status, logging, progress bars, the compilation cache on disk."""

import gc
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import jax
from tqdm import tqdm

from lserve_jax.cli.parser import WRONG, error_line
from lserve_jax.cli.streams import open_streams, settle_stdout
from lserve_jax.config.errors import InputError
from lserve_jax.text.tokenizer import Tokenizer, open_tokenizer
from lserve_jax.weights.embedded import default_cache_folder
from lserve_jax.weights.load import Checkpoint

logger = logging.getLogger("lserve_jax")

# Exit status that a shell expects after SIGINT and SIGPIPE.
_STOPPED, _BROKEN_PIPE = 128 + 2, 128 + 13


def run_command(command: Callable[[], None]) -> int:
    """Returns the exit status of a command: 0; 2 after one line on stderr that says what to change; 130 if stopped.

    Args:
      command: the work, reading the arguments included. The user can correct its `InputError` and `OSError`; Ctrl-C is
        a `KeyboardInterrupt`, whose text, if any, is printed. Other exceptions keep their traceback.
    """
    open_streams()
    collect_garbage_rarely()
    try:
        command()
        sys.stdout.flush()  # here, because an error at exit would be a traceback
    except SystemExit:  # of a parser, which has said why or printed its help
        settle_stdout()
        raise
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        settle_stdout()
        return _BROKEN_PIPE
    except OSError as error:
        return _wrong(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except InputError as error:
        return _wrong(str(error))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _wrong(f"the device is out of memory; lower --max-model-len or --prefill-chunk ({error})")
    except KeyboardInterrupt as stop:
        settle_stdout()
        _say(f"{str(stop) or 'stopped'}\n")
        return _STOPPED
    return 0


def _wrong(message: str) -> int:
    settle_stdout()
    _say(error_line(message))
    return WRONG


def _say(text: str) -> None:
    with suppress(OSError):  # a full disk under stderr
        sys.stderr.write(text)


def set_up_logging(*, is_quiet: bool = False, is_once: bool = False) -> None:
    """Sends warnings to stderr, one message per line.

    Args:
      is_quiet: send only errors.
      is_once: send each message once, for a command that loads many models with the same warnings.
    """
    logging.basicConfig(level=logging.ERROR if is_quiet else logging.WARNING, format="%(message)s", force=True)
    if is_once:
        logging.root.handlers[0].addFilter(_Once())


class _Once(logging.Filter):
    """Lets each message through once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        is_new = record.getMessage() not in self._seen
        self._seen.add(record.getMessage())
        return is_new


def required_tokenizer(checkpoint: Checkpoint, named: str | None) -> Tokenizer:
    """Returns the tokenizer that ``--tokenizer`` names, or else the model's; raises InputError if there is none."""
    tokenizer = open_tokenizer(checkpoint.tokenizer_source, named)
    if tokenizer is None:
        raise InputError(f"{checkpoint.name} has no tokenizer: give one with --tokenizer")
    return tokenizer


def collect_garbage_rarely() -> None:
    """Makes Python look for reference cycles less often: while programs are traced it finds none, and takes 10%."""
    gc.set_threshold(100_000)


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk between runs: where JAX_COMPILATION_CACHE_DIR says, else in the user's cache.

    Where nothing can be written, a warning says so, and programs are compiled anew in each run.
    """
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named and "://" in named:  # an address, such as gs://bucket/folder, which jax has read already
        return
    try:
        folder = str(_cache_folder(named))
    except InputError as error:
        logger.warning(f"compiled programs are not kept: {error}")
        folder = None
    jax.config.update("jax_compilation_cache_dir", folder)


def _cache_folder(named: str | None) -> Path:
    folder = Path(named) if named else default_cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cache folder {folder} cannot be written to ({error.strerror}): "
            f"set {'JAX_COMPILATION_CACHE_DIR' if named else 'XDG_CACHE_HOME'} to a folder that can"
        ) from None
    return folder


_RATED = {"weights": "B", "prefill": " tokens", "training": " steps"}
"""The unit of the stages whose speed says something; other stages show how much is done and how long it takes."""


class ProgressBars:
    """A progress bar on stderr for the current stage; the caller names the stages."""

    def __init__(self, *, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._stage = ""
        self._bar: tqdm | None = None

    def report(self, stage: str, done: int, total: int) -> None:
        """Shows that ``done`` of ``total`` is done in a stage; a new stage ends the previous one."""
        if not self._is_shown:
            return
        if stage != self._stage:
            self.close()
            self._stage = stage
            if total == 1:
                print(f"{stage} …", file=sys.stderr, flush=True)
                return
            self._bar = _bar(stage, done, total)
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)  # what the first report had done was not timed
            if done >= total:
                self.close()

    def close(self) -> None:
        """Ends the current bar, if any."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bar(stage: str, done: int, total: int) -> tqdm:
    """Returns a bar whose speed counts from now on; one that is full at once has no time and no speed."""
    unit = _RATED.get(stage, "")
    speed = ", {rate_noinv_fmt}" if unit else ""
    times = f" [{{elapsed}}<{{remaining}}{speed}]" if done < total else ""
    form = f"{{l_bar}}{{bar}}| {{n_fmt}}/{{total_fmt}}{unit}{times}"
    scale = {"unit": unit, "unit_scale": unit == "B"}
    return tqdm(
        desc=stage, total=total, initial=done, bar_format=form, file=sys.stderr, leave=True, mininterval=0.3, **scale
    )
