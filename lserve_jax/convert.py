"""`python -m lserve_jax.convert`: reads any model that can be opened and writes it as an orbax checkpoint.

The tokenizer goes along, and the model's head pattern. Quantised weights stay packed, or are quantised here.
"""

import argparse
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from lserve_jax.cli.common import ProgressBars, run_command, set_up_logging
from lserve_jax.cli.flags import add_shared, local_path
from lserve_jax.cli.parser import OneLineParser
from lserve_jax.config.heads import SMOOTHING_FILE, HeadPattern
from lserve_jax.engine.device import this_device
from lserve_jax.engine.patterns import OWN_FOLDER, find_pattern, find_smoothing
from lserve_jax.text.folder import tokenizer_files
from lserve_jax.text.tokenizer import Tokenizer, TokenizerSource, tokenizer_source
from lserve_jax.weights import orbax
from lserve_jax.weights.load import open_checkpoint

logger = logging.getLogger("lserve_jax")

_REPLACED = ("torch_dtype", "quantization_config", "compression_config")
"""What a ``config.json`` says of the old files' weights."""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags."""
    parser = OneLineParser(prog="python -m lserve_jax.convert", description=__doc__)
    add_shared(parser, "--model", "--tokenizer")
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="folder to write; must be new or empty"
    )
    add_shared(parser, "--dtype", help="type of all numbers; auto is the model's own (default: %(default)s)")
    add_shared(
        parser,
        "--weight-dtype",
        default="auto",
        help="form of the weight matrices: auto keeps what the file has; bfloat16 and float32 make numbers; int8 and "
        "int4 quantise (default: %(default)s)",
    )
    add_shared(parser, "--head-pattern")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr that says what to change."""
    return run_command(lambda: _convert(build_parser().parse_args(argv)))


def _convert(args: argparse.Namespace) -> None:
    set_up_logging()
    convert(
        args.model, args.out, args.dtype, args.tokenizer, weight_dtype=args.weight_dtype, head_pattern=args.head_pattern
    )


def convert(
    model: str,
    out: Path,
    dtype: str = "auto",
    tokenizer: str | None = None,
    *,
    weight_dtype: str | None = "auto",
    head_pattern: str | Path | None = None,
) -> None:
    """Writes a model into a new folder.

    The model's head pattern goes along, so that the new folder may have any name. A pattern that only its architecture
    suggests does not: it remains a guess, about which `lserve_jax.prepare` warns. Weights that get 8 bits are smoothed
    by the pattern's factors, which then stay behind.

    Args:
      model: what to read, see `open_checkpoint`.
      out: the folder to write.
      dtype: the type of numbers; "auto" is the checkpoint's.
      tokenizer: folder or GGUF file to take the tokenizer from instead.
      weight_dtype: the form of matrices, see `Checkpoint.load_params`; "auto" keeps what the checkpoint has.
      head_pattern: folder of the pattern, and of smoothing factors; None takes the model's own, or those that ship.

    Raises:
      InputError: if the model cannot be loaded or the folder is not empty; nothing is left behind.
    """
    orbax.check_target(out)
    this_device()  # which holds the weights on their way
    checkpoint = open_checkpoint(model)
    source = tokenizer_source(checkpoint.tokenizer_source, tokenizer)
    write_tokenizer = _tokenizer_writer(source, is_checked=tokenizer is not None)
    for warning in checkpoint.warnings:
        logger.warning(warning)
    pattern = find_pattern(checkpoint, head_pattern)
    if pattern is not None:
        _ = pattern.gates  # finds what is wrong with it before the weights are read
    dtype = checkpoint.config.dtype if dtype == "auto" else dtype
    smoothing = find_smoothing(checkpoint, head_pattern) if weight_dtype == "int8" else None
    forms = checkpoint.forms(dtype, weight_dtype, smoothing)
    if weight_dtype == "int8" and smoothing is None and not checkpoint.is_w8a8:
        logger.warning("no smoothing factors: int8 loses more without them; python -m lserve_jax.calibrate finds some")
    with ProgressBars(is_shown=True) as bars:
        params = checkpoint.load(forms, None, partial(bars.report, "weights"))
    # So that "auto" means the written type for the new folder. Beside the weights, a list says how they are quantised.
    hf_config = {key: value for key, value in checkpoint.hf_config.items() if key not in _REPLACED} | {"dtype": dtype}
    print(f"writing {out}", file=sys.stderr)
    orbax.save(
        out,
        params,
        config=checkpoint.config,
        hf_config=hf_config,
        generation_config=checkpoint.generation_config,
        write_others=partial(_write_others, write_tokenizer, pattern, is_smoothed=forms.smoothing is not None),
    )


def _write_others(
    write_tokenizer: Callable[[Path], None], pattern: HeadPattern | None, folder: Path, *, is_smoothed: bool
) -> None:
    write_tokenizer(folder)
    if pattern is not None and not pattern.is_guess:
        (folder / OWN_FOLDER).mkdir()
        for file in pattern.files:
            if file.name == SMOOTHING_FILE and is_smoothed:
                continue  # these weights need no factors: they have them
            (folder / OWN_FOLDER / file.name).write_bytes(file.read_bytes())


def _tokenizer_writer(source: TokenizerSource, *, is_checked: bool) -> Callable[[Path], None]:
    """Returns what writes the tokenizer into a folder; finds errors of a GGUF file now, and of a folder if asked to."""
    if source is None:
        return lambda folder: None
    if not isinstance(source, Path):
        return Tokenizer.from_gguf(source).save
    if is_checked:
        Tokenizer.from_folder(source)
    return partial(_copy_tokenizer, source)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for file in tokenizer_files(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


if __name__ == "__main__":
    sys.exit(main())
