"""`python -m lserve_jax.convert`: writes any model that can be opened as an orbax checkpoint folder."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lserve_jax.cli.common import OneLineParser, ProgressBars, run_command
from lserve_jax.text.tokenizer import Tokenizer
from lserve_jax.weights import orbax
from lserve_jax.weights.embedded import MODEL_NAME
from lserve_jax.weights.load import Checkpoint, open_checkpoint

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line on stderr that says what to change."""
    parser = OneLineParser(prog="python -m lserve_jax.convert", description=__doc__)
    parser.add_argument("--model", default=MODEL_NAME, help="folder, .gguf file, hub id or name (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="default: %(default)s")
    options = parser.parse_args(arguments)
    return run_command(lambda: convert(options.model, options.out, options.dtype))


def convert(model: str, out: Path, dtype: str = "auto") -> None:
    """Writes `model` into the folder `out`, its parameters in `dtype` ("auto" is the checkpoint's own).

    Raises:
        ValueError: a model that cannot be loaded, or a folder that is not empty; nothing is left behind.
    """
    orbax.check_target(out)
    checkpoint = open_checkpoint(model)
    dtype = checkpoint.config.dtype if dtype == "auto" else dtype
    with ProgressBars(is_shown=True) as bars:
        params = checkpoint.load_params(dtype, None, partial(bars.report, "weights"))
    # The new folder's "auto" is what it was written in.
    hf_config = {key: value for key, value in checkpoint.hf_config.items() if key != "torch_dtype"} | {"dtype": dtype}
    print(f"writing {out}", file=sys.stderr)
    orbax.save(
        out,
        params,
        hf_config=hf_config,
        generation_config=checkpoint.generation_config,
        write_tokenizer=partial(_write_tokenizer, checkpoint),
    )


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
