"""`python -m lserve_jax.demo`: a question about a document, answered by the embedded model with LServe's attention."""

import json
import sys
from collections.abc import Sequence
from importlib import resources

from lserve_jax.cli.common import ProgressBars, run_command, set_up_logging, use_compilation_cache
from lserve_jax.cli.parser import OneLineParser
from lserve_jax.cli.report import summary
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.engine.setup import DEFAULT_MODEL, prepare
from lserve_jax.llm import LLM

TOKEN_BUDGET = 1024
"""A quarter of the document, so that the page selector has to find the answer."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if the answer is right, 1 if it is wrong, 2 if the demo cannot run."""
    parser = OneLineParser(prog="python -m lserve_jax.demo", description=__doc__)
    is_right: list[bool] = []

    def command() -> None:
        parser.parse_args(argv)
        is_right.append(_answer())

    status = run_command(command)
    return status or (0 if all(is_right) else 1)


def _answer() -> bool:
    """Returns whether the model's answer contains the fact that the document states."""
    set_up_logging()
    folder = resources.files("lserve_jax") / "data"
    task = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    document = (folder / task["document"]).read_text(encoding="utf-8")
    use_compilation_cache()
    setup = prepare(DEFAULT_MODEL, attention="lserve", token_budget=TOKEN_BUDGET, kv_dtype="int8", max_num_seqs=1)
    with ProgressBars(is_shown=True) as bars:
        llm = LLM.from_setup(setup, on_progress=bars.report)
        prompt = llm.render_chat([{"role": "user", "content": f"{document}\n\n{task['question']}"}])
        print(f"document: {task['document']}, {len(prompt)} tokens with the question\nquestion: {task['question']}")
        output = llm.generate([prompt], SamplingParams(max_tokens=48))[0]
    is_right = task["answer"] in output.text
    print(f"answer:   {output.text}\nexpected: {task['answer']} ({'found' if is_right else 'NOT FOUND'})")
    print(summary(llm, [output]))
    return is_right


if __name__ == "__main__":
    sys.exit(main())
