"""`python -m lserve_jax.convert`: reads any model that can be opened and writes it as an orbax checkpoint.

The tokenizer goes along, and the model's head pattern.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lserve_jax.cli.common import OneLineParser, ProgressBars, run_command
from lserve_jax.cli.flags import add_shared
from lserve_jax.config.heads import HeadPattern
from lserve_jax.engine.patterns import OWN_FOLDER, find_pattern
from lserve_jax.text.tokenizer import Tokenizer
from lserve_jax.weights import orbax
from lserve_jax.weights.load import Checkpoint, open_checkpoint

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags."""
    parser = OneLineParser(prog="python -m lserve_jax.convert", description=__doc__)
    add_shared(parser, "--model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; must be new or empty")
    add_shared(parser, "--dtype", help="element type of the weights; auto is the model's own (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr that says what to change."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: convert(args.model, args.out, args.dtype))


def convert(model: str, out: Path, dtype: str = "auto") -> None:
    """Writes ``model`` into the folder ``out``, its parameters in ``dtype`` ("auto" is the checkpoint's type).

    The model's head pattern goes along, so that the new folder may have any name. A pattern that only its architecture
    suggests does not: it remains a guess, about which `lserve_jax.prepare` warns.

    Raises:
      InputError: if the model cannot be loaded or the folder is not empty; nothing is left behind.
    """
    orbax.check_target(out)
    checkpoint = open_checkpoint(model)
    pattern = find_pattern(checkpoint)
    if pattern is not None:
        _ = pattern.gates  # finds what is wrong with it before the weights are read
    dtype = checkpoint.config.dtype if dtype == "auto" else dtype
    with ProgressBars(is_shown=True) as bars:
        params = checkpoint.load_params(dtype, None, partial(bars.report, "weights"))
    # So that "auto" means the written type for the new folder.
    hf_config = {key: value for key, value in checkpoint.hf_config.items() if key != "torch_dtype"} | {"dtype": dtype}
    print(f"writing {out}", file=sys.stderr)
    orbax.save(
        out,
        params,
        hf_config=hf_config,
        generation_config=checkpoint.generation_config,
        write_others=partial(_write_others, checkpoint, pattern),
    )


def _write_others(checkpoint: Checkpoint, pattern: HeadPattern | None, folder: Path) -> None:
    _write_tokenizer(checkpoint, folder)
    if pattern is not None and not pattern.is_guess:
        (folder / OWN_FOLDER).mkdir()
        for file in pattern.files:
            (folder / OWN_FOLDER / file.name).write_bytes(file.read_bytes())


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    source: Path | Mapping[str, Any] | None = checkpoint.tokenizer_source
    if isinstance(source, Path):
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    elif source is not None:
        Tokenizer.from_gguf(source).save(folder)


if __name__ == "__main__":
    sys.exit(main())
