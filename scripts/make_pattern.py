"""Writes a head pattern for a model, training-free: what each KV head's output would lose by streaming.

    python scripts/make_pattern.py --model smollm2-135m-instruct --out lserve_jax/data/patterns/smollm2-135m-instruct

Synthetic prompts (numbers hidden in prose and asked for, a passage to be copied) run once with dense attention. At the
answer's tokens, each KV head's output is compared with what the same queries, keys and values give under the streaming
mask: the gate is the relative error, averaged. Folder format: DuoAttention's.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax import open_checkpoint
from lserve_jax.models import Llama
from lserve_jax.tokenizer import Tokenizer
from pallas_kernels.core.paging import is_visible

WHO = (
    "The baker",
    "A tired pilot",
    "Her uncle",
    "The old teacher",
    "A young farmer",
    "My neighbour",
    "The captain",
    "An engineer",
)
DID = (
    "walked past",
    "wrote about",
    "repaired",
    "painted",
    "forgot",
    "remembered",
    "sold",
    "looked for",
    "talked about",
    "dreamed of",
)
WHAT = (
    "the wooden bridge",
    "a silver watch",
    "the garden wall",
    "an old map",
    "the red boat",
    "a letter",
    "the long road",
)
WHEN = (
    "before breakfast",
    "in the autumn",
    "after the storm",
    "every Sunday",
    "without a word",
    "last winter",
    "at noon",
)
THINGS = (
    "river",
    "candle",
    "mirror",
    "violin",
    "harbour",
    "lantern",
    "orchard",
    "compass",
    "feather",
    "anchor",
    "meadow",
    "kettle",
)


def sentence(rng: random.Random) -> str:
    """Returns a sentence of prose."""
    return f"{rng.choice(WHO)} {rng.choice(DID)} {rng.choice(WHAT)} {rng.choice(WHEN)}."


def needle_prompt(rng: random.Random, sentences: int) -> tuple[str, str]:
    """Returns prose with numbers in it and a question, and the answer."""
    things = rng.sample(THINGS, 4)
    numbers = {thing: str(rng.randrange(10000, 99999)) for thing in things}
    lines = [sentence(rng) for _ in range(sentences)]
    for thing, number in numbers.items():
        lines.insert(rng.randrange(len(lines)), f"The number of the {thing} is {number}.")
    asked = rng.choice(things)
    question = f"What is the number of the {asked}?"
    return " ".join(lines) + f"\n\n{question}", f"The number of the {asked} is {numbers[asked]}."


def copy_prompt(rng: random.Random, sentences: int) -> tuple[str, str]:
    """Returns prose whose middle is to be repeated, and that passage."""
    lines = [sentence(rng) for _ in range(sentences)]
    at = rng.randrange(len(lines) // 3, len(lines) // 2)
    passage = " ".join(lines[at : at + 10])
    return " ".join(lines) + f'\n\nRepeat the text from "{lines[at]}" on.', passage


def streaming_error(
    q: jax.Array, k: jax.Array, v: jax.Array, sink: int, local: int, answer: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns dense outputs [1, T, N, H], and each KV head's relative error of streaming at the answer's tokens."""
    tokens, heads = q.shape[1], k.shape[2]
    grouped = q[0].reshape(tokens, heads, -1, q.shape[-1])
    positions = jnp.arange(tokens)

    def attend(visible: jax.Array) -> jax.Array:
        scores = jnp.einsum("tkgh,skh->kgts", grouped, k[0]) * q.shape[-1] ** -0.5
        return jnp.einsum("kgts,skh->tkgh", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1), v[0])

    dense = attend(is_visible(positions[:, None], positions, None, None))
    streaming = attend(is_visible(positions[:, None], positions, sink, local))
    lost = jnp.linalg.norm(dense - streaming, axis=-1) / jnp.linalg.norm(dense, axis=-1)
    return dense.reshape(q.shape), jnp.sum(jnp.mean(lost, axis=2) * answer[:, None], axis=0) / jnp.sum(answer)


def main() -> None:
    """Writes the pattern."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--sentences", type=int, default=150)
    parser.add_argument("--sink", type=int, default=128)
    parser.add_argument("--local", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    assert checkpoint.tokenizer_source is not None and not isinstance(checkpoint.tokenizer_source, Path)
    tokenizer = Tokenizer.from_gguf(checkpoint.tokenizer_source)
    params = checkpoint.load_params("float32")
    model = Llama(checkpoint.config, jnp.dtype("float32"))
    size = 2048

    @jax.jit
    def errors(tokens: jax.Array, answer: jax.Array) -> jax.Array:
        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: None) -> tuple[jax.Array, jax.Array]:
            return streaming_error(q, k, v, args.sink, args.local, answer)

        nothing = (None,) * checkpoint.config.num_layers
        result: Any = model.apply({"params": params}, tokens, jnp.arange(size)[None], nothing, attend)
        return jnp.stack(result[1])

    rng, found = random.Random(args.seed), []
    for index in range(args.prompts):
        prompt, answer = (needle_prompt, copy_prompt)[index % 2](rng, args.sentences)
        before = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        ids = [*before, *tokenizer.encode(answer)]
        assert len(ids) <= size, len(ids)
        tokens, mask = np.zeros((1, size), np.int32), np.zeros(size, np.float32)
        tokens[0, : len(ids)] = ids
        mask[len(before) - 1 : len(ids) - 1] = 1
        found.append(np.asarray(errors(tokens, mask)))
        print(f"{index + 1}/{args.prompts}: {len(ids)} tokens, mean error {found[-1].mean():.3f}", flush=True)
    gates = np.clip(np.mean(found, axis=0), 0, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    np.savetxt(args.out / "full_attention_heads.tsv", gates, delimiter="\t", fmt="%.6f")
    settings = {"model_name": checkpoint.name, "method": "relative output error of streaming at answer tokens"}
    settings |= {"sink_size": args.sink, "recent_size": args.local, "seed": args.seed, "num_prompts": args.prompts}
    (args.out / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
