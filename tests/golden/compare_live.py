"""Compares LLM.logits and greedy generation with `transformers`, live, for any checkpoint of a supported architecture.

jax (Python 3.12 or newer) and the torch reference (Python 3.11, tests/golden/requirements.txt) do not share an
environment, so this one script runs as two processes, one after the other. Start it in the product's environment:

    python tests/golden/compare_live.py --torch-python .venv311/bin/python [--model FOLDER_OR_GGUF]

It starts itself under --torch-python with --reference-to, which writes tokens, logits, greedy tokens and their margins
as .npy files into a temporary folder; then it computes the same with lserve_jax, prints a table and exits with 1 where
a difference is beyond the tolerance. Both sides compute in float32 with dense attention. The prompt is the start of
--text; a checkpoint without a tokenizer gets random tokens.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

Result = dict[str, np.ndarray]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder or a .gguf file; the embedded model where not given")
    parser.add_argument("--torch-python", type=Path, help="the Python with tests/golden/requirements.txt installed")
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("text.txt"), help="the prompt")
    parser.add_argument("--tokens", type=int, default=512, help="how much of the prompt is used")
    parser.add_argument("--new-tokens", type=int, default=32, help="how many tokens are generated greedily")
    parser.add_argument("--tolerance", type=float, default=2e-3, help="largest absolute difference of two logits")
    parser.add_argument("--reference-to", type=Path, help=argparse.SUPPRESS)  # set: this is the torch process
    arguments = parser.parse_args()
    if arguments.model is None:
        from lserve_jax.weights import embedded

        arguments.model = embedded.path()
    if not arguments.model.exists():
        parser.error(f"--model {arguments.model} does not exist")
    if arguments.reference_to is None and arguments.torch_python is None:
        parser.error("--torch-python is needed, a Python with tests/golden/requirements.txt installed")
    return arguments


def prompt_tokens(arguments: argparse.Namespace, vocab_size: int, where: tuple[Any, dict[str, Any]]) -> list[int]:
    """Returns the prompt as the checkpoint's own tokenizer splits it, or random tokens where it has none."""
    from transformers import AutoTokenizer

    if not where[1] and not (arguments.model / "tokenizer.json").exists():
        return np.random.default_rng(0).integers(0, vocab_size, arguments.tokens).tolist()
    tokenizer = AutoTokenizer.from_pretrained(where[0], **where[1])
    return tokenizer(arguments.text.read_text()).input_ids[: arguments.tokens]


def write_reference(arguments: argparse.Namespace) -> None:
    """The torch process: writes each array of `transformers`' result into the folder --reference-to."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    is_gguf = arguments.model.suffix == ".gguf"
    where = (arguments.model.parent, {"gguf_file": arguments.model.name}) if is_gguf else (arguments.model, {})
    model = AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1]).eval()
    tokens = torch.tensor([prompt_tokens(arguments, model.config.vocab_size, where)])
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=arguments.new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    with torch.inference_mode():
        logits = model(tokens).logits[0]
        output = model.generate(tokens, attention_mask=torch.ones_like(tokens))
    top = torch.stack(output.logits)[:, 0].topk(2).values
    result = {
        "tokens": tokens[0],
        "logits": logits,
        "greedy": output.sequences[0, tokens.shape[1] :],
        "margins": top[:, 0] - top[:, 1],
    }
    for name, value in result.items():
        np.save(arguments.reference_to / f"{name}.npy", value.numpy())


def reference(arguments: argparse.Namespace) -> Result:
    """Returns what the torch process computes."""
    with tempfile.TemporaryDirectory() as folder:
        same = [f"--{name}={getattr(arguments, name.replace('-', '_'))}" for name in ("model", "text", "tokens")]
        command = [arguments.torch_python, __file__, *same, f"--new-tokens={arguments.new_tokens}"]
        subprocess.run([*command, f"--reference-to={folder}"], check=True)
        return {file.stem: np.load(file) for file in Path(folder).iterdir()}


def ours(arguments: argparse.Namespace, tokens: list[int]) -> Result:
    """Returns lserve_jax's logits [T, V] and greedy tokens for the same prompt."""
    from lserve_jax import LLM, SamplingParams

    llm = LLM(
        str(arguments.model),
        attention="dense",
        dtype="float32",
        kv_dtype="float32",
        max_model_len=len(tokens) + arguments.new_tokens,
    )
    (output,) = llm.generate([tokens], SamplingParams(max_tokens=arguments.new_tokens, ignore_eos=True))
    return {"logits": np.asarray(llm.logits(tokens)), "greedy": np.asarray(output.token_ids)}


def report(theirs: Result, mine: Result, tolerance: float) -> bool:
    """Prints the comparison; returns whether it is within the tolerance.

    Where the greedy tokens part, they may do so only at a step so near to a tie that the tolerance decides it.
    """
    error = np.abs(mine["logits"] - theirs["logits"]).max(axis=-1)
    is_same = mine["greedy"] == theirs["greedy"]
    steps = len(is_same)
    first = steps if is_same.all() else int(np.argmin(is_same))
    margin = theirs["margins"][first] if first < steps else np.inf
    at_parting = "" if first == steps else f", where the reference's margin is {margin:.2e}"
    agreement = float((mine["logits"].argmax(-1) == theirs["logits"].argmax(-1)).mean())
    rows = {
        "positions": str(len(error)),
        "max |difference| of logits": f"{error.max():.2e} at position {error.argmax()} (tolerance {tolerance:.0e})",
        "median over positions": f"{np.median(error):.2e}",
        "range of the reference's logits": f"{theirs['logits'].min():.1f} to {theirs['logits'].max():.1f}",
        "same most likely token": f"{agreement:.2%} of positions",
        "greedy tokens equal": f"{first} of {steps}{at_parting}",
    }
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
    return bool(error.max() <= tolerance) and (first == steps or bool(margin <= 2 * tolerance))


def main() -> int:
    arguments = parse_arguments()
    if arguments.reference_to is not None:
        write_reference(arguments)
        return 0
    theirs = reference(arguments)
    return 0 if report(theirs, ours(arguments, theirs["tokens"].tolist()), arguments.tolerance) else 1


if __name__ == "__main__":
    sys.exit(main())
