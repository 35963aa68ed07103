"""Runs by itself, in an environment with neither pytest nor the constraints: the installed packages import and answer.

`python smoke.py` imports the installed wheel, without what needs an extra, and refuses the checkout. `python smoke.py
serve` imports what needs that extra. Exit status 0 or a traceback.
"""

import importlib.metadata
import pkgutil
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

import lserve_jax
import pallas_kernels
from lserve_jax import (
    LLM,
    InferenceConfig,
    RequestOutput,
    SamplingParams,
    decode_step,
    from_preset,
    init_cache,
    prefill_step,
    read_hf,
)
from lserve_jax.weights import abstract_params
from pallas_kernels import PageTables

PRINTED = ("lserve_jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "gguf", "tokenizers", "numpy")
EXTRAS = {"serve": "lserve_jax.serve"}
TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def import_everything(package: ModuleType) -> None:
    """Imports the modules of a package, except those below that need an extra."""
    assert package.__file__ is not None
    checkout, location = Path(__file__).resolve().parents[1], Path(package.__file__).resolve()
    assert checkout not in location.parents, f"{location} is the checkout, not an installed package"
    count = sum(import_below(found.name) for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."))
    assert count > 0, f"{package.__name__} is empty"
    print(f"{package.__name__}: {count} modules imported")


def import_below(name: str) -> int:
    """How many modules a name stands for, all of them imported; none if they need an extra."""
    if name in EXTRAS.values():
        return 0
    module = import_module(name)
    below = pkgutil.iter_modules(getattr(module, "__path__", ()), name + ".")
    return 1 + sum(import_below(found.name) for found in below)


def main(extras: list[str]) -> None:
    if extras:
        for extra in extras:
            import_everything(import_module(EXTRAS[extra]))
        return
    for package in (lserve_jax, pallas_kernels):
        import_everything(package)
    versions = {name: importlib.metadata.version(name) for name in PRINTED}
    print(", ".join(f"{name} {version}" for name, version in versions.items()), f"on Python {sys.version.split()[0]}")
    generate()
    answer()
    print("smoke test passed")


def generate() -> None:
    """A tiny random model takes a prompt and some decode steps through the pure functions, dense and sparse alike."""
    model = read_hf(TINY, source="smoke test")
    shapes, rng = abstract_params(model, jnp.dtype("float32")), np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype), shapes)
    prompt, pages = rng.integers(0, 64, (1, 32)).astype(np.int32), 4
    tables = PageTables(*2 * [jnp.arange(pages, dtype=jnp.int32)[None]])
    results = []
    for budget in (None, 64):
        policy = from_preset("dense", token_budget=budget, page_size=16, sink=16, sub_page_size=4)
        config = InferenceConfig(model=model, attention=policy)
        cache = init_cache(config, max_num_seqs=1, retrieval_pages=pages, streaming_pages=pages)
        start, count = jnp.zeros(1, jnp.int32), jnp.full(1, prompt.shape[1], jnp.int32)
        logits, cache = prefill_step(params, cache, prompt, start, count, tables, config=config)
        tokens = []
        for step in range(8):
            tokens.append(int(logits.argmax()))
            now, length = jnp.array([step], jnp.int32), count + step + 1
            new = jnp.array(tokens[-1:], jnp.int32)
            logits, cache = decode_step(params, cache, new, length, now, tables, config=config)
        assert bool(jnp.isfinite(logits).all())
        results.append(tokens)
    assert results[0] == results[1], results
    print(f"a random model continues with {results[0]}")


def answer() -> None:
    """The embedded model, a GGUF file, is fetched, loaded and asked: gguf and tokenizers do what is needed of them."""
    llm = LLM(max_model_len=512, max_num_seqs=1)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    output = llm.chat(question, SamplingParams(max_tokens=24))
    assert isinstance(output, RequestOutput) and "Paris" in output.text, output
    print(f"the embedded model says: {output.text}")


if __name__ == "__main__":
    main(sys.argv[1:])
