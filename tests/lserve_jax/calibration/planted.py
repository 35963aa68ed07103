"""A Llama made by hand: two heads look things up anywhere in the context, all others attend to the last few tokens.

Token i of `KEYS` is followed by a value somewhere; where the key comes again, the value is to be predicted. Layer 0 has
a head that tells each token what stood before it; the planted heads, in later layers, find the token that stood after
the key, on rotary dimensions that hardly turn, and name it. Everything else about the model is noise.
"""

import dataclasses
import random
from functools import cache
from typing import Any

import numpy as np

from lserve_jax import InferenceConfig, ModelConfig, RopeConfig, from_preset
from lserve_jax.calibration.prompts import Prompt
from lserve_jax.models.rope import rope_frequencies

LAYERS, HEADS, GROUP, HEAD_DIM, WIDTH = 3, 4, 2, 32, 96
PLANTED = {(1, 2), (2, 0)}
"""(layer, KV head) of the heads that look things up."""

KEYS, VALUES, FILLERS = range(1, 17), range(17, 33), range(33, 64)
SINK, LOCAL = 4, 24

# What the channels of the hidden states hold: what a token is, what stood before it, its value, what was looked up, …
CODE, BEFORE, VALUE, ANSWER, NOISE, FILLER = (slice(start, start + 16) for start in range(0, WIDTH, 16))

MODEL = ModelConfig(
    architecture="llama",
    vocab_size=64,
    hidden_size=WIDTH,
    intermediate_size=8,
    num_layers=LAYERS,
    num_heads=HEADS * GROUP,
    num_kv_heads=HEADS,
    head_dim=HEAD_DIM,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=1e8),
    max_context=65536,
    tie_embeddings=False,
    qkv_bias=True,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    dtype="float32",
    bos_token_id=None,
    eos_token_ids=(),
)
CONFIG = InferenceConfig(model=MODEL, attention=from_preset("dense", sink=SINK, local=LOCAL, page_size=16))


def config_of(layers: int) -> InferenceConfig:
    """The same shapes with another number of layers."""
    return dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, num_layers=layers), heads=None)


def planted(head: tuple[int, int]) -> bool:
    """Whether a (layer, KV head) is one that looks things up."""
    return head in PLANTED


@cache
def params() -> dict[str, Any]:
    """The parameters, as numpy arrays."""
    rng = np.random.default_rng(0)
    embedding = np.zeros((MODEL.vocab_size, WIDTH), np.float32)
    embedding[:, FILLER] = rng.standard_normal((MODEL.vocab_size, 16)) / 4
    embedding[list(KEYS), CODE] = _hadamard(16) / 4
    embedding[list(VALUES), VALUE] = np.eye(16)
    unembedding = np.zeros((MODEL.vocab_size, WIDTH), np.float32)
    unembedding[list(VALUES), ANSWER] = np.eye(16) * 2
    tree: dict[str, Any] = {
        "embed": {"embedding": embedding},
        "final_norm": {"scale": np.ones(WIDTH, np.float32)},
        "lm_head": {"kernel": unembedding},
    }
    for layer in range(LAYERS):
        tree[f"layers_{layer}"] = {
            "input_norm": {"scale": np.ones(WIDTH, np.float32)},
            "attention": _attention(layer, rng),
            "post_attention_norm": {"scale": np.ones(WIDTH, np.float32)},
            "mlp": {
                "gate_up_proj": {"kernel": rng.standard_normal((2, 8, WIDTH)).astype(np.float32)},
                "down_proj": {"kernel": np.zeros((WIDTH, 8), np.float32)},
            },
        }
    return tree


def _attention(layer: int, rng: np.random.Generator) -> dict[str, Any]:
    q, k, v, o = (np.zeros((heads, HEAD_DIM, WIDTH), np.float32) for heads in (HEADS, HEADS, HEADS, HEADS))
    q_bias, k_bias = np.zeros((HEADS, HEAD_DIM), np.float32), np.zeros((HEADS, HEAD_DIM), np.float32)
    slow = [*range(8, 16), *range(24, 32)]
    for head in range(HEADS):
        if planted((layer, head)):
            q[head, slow, CODE] = k[head, slow, BEFORE] = 3 * np.eye(16)
            v[head, :16, VALUE] = np.eye(16)
            o[head, :16, ANSWER] = np.eye(16)
            continue
        is_teller = (layer, head) == (0, 0)
        back = 1 if is_teller else (head + layer) % 4
        angles = back * rope_frequencies(MODEL.rope, HEAD_DIM)[0][:4]
        q_bias[head, :4] = 12
        k_bias[head, :4], k_bias[head, 16:20] = 12 * np.cos(angles), 12 * np.sin(angles)
        if is_teller:
            v[head, :16, CODE] = o[head, :16, BEFORE] = np.eye(16)
        else:
            v[head] = rng.standard_normal((HEAD_DIM, WIDTH)) / 10
            o[head, :, NOISE] = rng.standard_normal((HEAD_DIM, 16)) / 10
    kernels, biases = [q] * GROUP + [k, v], [q_bias] * GROUP + [k_bias, np.zeros((HEADS, HEAD_DIM), np.float32)]
    outputs = np.moveaxis(np.repeat(o, GROUP, axis=0) / GROUP, 2, 0)
    return {
        "qkv_proj": {"kernel": np.stack(kernels, axis=1), "bias": np.stack(biases, axis=1)},
        "o_proj": {"kernel": outputs.reshape(WIDTH, -1).copy()},
    }


def _hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def prompt(seed: int, length: int = 200, pairs: int = 8, asked: int = 4) -> Prompt:
    """Keys and values hidden before the window, some of the keys at the end."""
    rng = random.Random(seed)
    answer = 2 * asked - 1
    tokens = [rng.choice(FILLERS) for _ in range(length)]
    sources = [0] * length
    keys, values = rng.sample(KEYS, pairs), rng.sample(VALUES, pairs)
    places = rng.sample(range(SINK, length - LOCAL - answer - 2, 2), pairs)
    for number, (key, value, place) in enumerate(zip(keys, values, places, strict=True), start=1):
        tokens[place : place + 2] = key, value
        sources[place + 1] = number
    tail = [token for index in range(asked) for token in (keys[index], values[index])]
    tokens[length - len(tail) :] = tail
    asks = [index // 2 + 1 if index % 2 == 0 else 0 for index in range(answer)]
    return Prompt(kind="lookup", tokens=tuple(tokens), num_answer=answer, sources=tuple(sources), asks=tuple(asks))
