"""Runs EleutherAI's lm-evaluation-harness, with hundreds of tasks and its command line, on models of this package.

    python -m lserve_jax.harness --model_args model=FOLDER,attention=lserve,kv_dtype=int8 --tasks hellaswag
    python -m lserve_jax.harness ls tasks

The flags are the harness's; ``--model_args`` takes the arguments of `LLM`, such as ``token_budget=all`` or
``weight_dtype=int8``. ``--batch_size N`` above 1 is ``max_num_seqs``. ``--device`` has no effect: JAX_PLATFORMS chooses
the device. In Python, `register` returns the harness's model class, which wraps an `LLM`.
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache

from lserve_jax.cli.common import run_command, use_compilation_cache
from lserve_jax.config.errors import InputError
from lserve_jax.evaluation.harness_model import HarnessMethods

NAME = "lserve_jax"
_COMMANDS = ("run", "ls", "validate")


@cache
def register() -> type:
    """Returns the harness's model class, and registers it with the harness as ``lserve_jax``.

    ``register()(llm)`` returns a model for ``lm_eval.simple_evaluate``.

    Raises:
      InputError: if the harness is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise InputError(f"the harness needs lm_eval: pip install 'lserve_jax[eval]' ({error})") from None
    return register_model(NAME)(type("LServeLM", (HarnessMethods, TemplateLM), {"__module__": __name__}))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr that says what to change."""
    return run_command(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(arguments: list[str]) -> None:
    register()
    from lm_eval.__main__ import cli_evaluate

    use_compilation_cache()
    before = sys.argv
    sys.argv = [f"{NAME}.harness", *with_model(arguments)]  # the harness's command line reads them
    try:
        cli: Callable[[], None] = cli_evaluate
        cli()
    except ValueError as error:
        if _is_of_harness(error):
            raise InputError(str(error)) from None
        raise
    finally:
        sys.argv = before


def _is_of_harness(error: Exception) -> bool:
    """Returns whether the harness itself raised an error: with a `ValueError` it says what the user has to correct."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "lm_eval"


def with_model(arguments: list[str]) -> list[str]:
    """Returns the arguments, with the name of our model added if the command is a run."""
    if not arguments:
        return ["--help"]
    command, rest = (arguments[0], arguments[1:]) if arguments[0] in _COMMANDS else ("run", arguments)
    return [command, *(["--model", NAME] if command == "run" else []), *rest]


if __name__ == "__main__":
    sys.exit(main())
