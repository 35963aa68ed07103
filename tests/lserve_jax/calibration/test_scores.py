"""Scores of heads: planted heads are found, pages give what dense attention gives, memory is linear in the context."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax import InferenceConfig, classify, from_preset, init_cache, open_checkpoint
from lserve_jax.calibration.pages import Chunk
from lserve_jax.calibration.probe import probe, slopes
from lserve_jax.calibration.prompts import Prompt
from lserve_jax.calibration.scores import BEST_PLACE, MEASURES, SCORES, Scores, combine, score_heads, to_gates
from lserve_jax.models.layers import numbers
from lserve_jax.models.llama import Llama
from lserve_jax.weights import abstract_params
from pallas_kernels.core.quantized_matrix import quantize_groups, quantize_rows
from tests.lserve_jax.calibration import planted
from tests.lserve_jax.runtime.tiny_steps import TINY

pytestmark = pytest.mark.slow

CHUNK = 64


def score(*prompts: Prompt, **options: Any) -> dict[str, Scores]:
    return score_heads(planted.params(), planted.CONFIG, prompts, chunk=CHUNK, **options)


def found(scores: np.ndarray) -> set[tuple[int, int]]:
    """The retrieval heads where as many are to be kept as there are planted ones."""
    share = 1 - len(planted.PLANTED) / scores.size
    classes = classify(to_gates(scores), share)
    kept = enumerate(zip(classes.order, classes.num_retrieval, strict=True))
    return {(layer, head) for layer, (order, count) in kept for head in order[:count]}


@pytest.fixture(scope="module")
def planted_scores() -> dict[str, Scores]:
    return score(planted.prompt(0), planted.prompt(1))


@pytest.mark.parametrize("name", SCORES)
def test_every_score_finds_exactly_the_planted_heads(planted_scores: dict[str, Scores], name: str):
    scores = combine(planted_scores, name)
    assert found(scores) == planted.PLANTED
    others = [scores[layer, head] for layer in range(3) for head in range(4) if (layer, head) not in planted.PLANTED]
    assert max(others) < 0.05 * min(scores[head] for head in planted.PLANTED)


def test_the_merged_ranking_finds_exactly_the_planted_heads(planted_scores: dict[str, Scores]):
    assert found(combine(planted_scores, BEST_PLACE)) == planted.PLANTED


@pytest.mark.parametrize("form", ["int4 in groups", "a tuple"])
def test_an_output_projection_that_is_quantised_is_scored_as_its_numbers(form: str):
    packed, plain = (jax.tree.map(jnp.asarray, planted.params()) for _ in range(2))
    for layer in range(planted.LAYERS):
        kernel = packed[f"layers_{layer}"]["attention"]["o_proj"]["kernel"]
        matrix: Any = quantize_groups(kernel, 16)
        if form == "a tuple":
            matrix = (quantize_rows(kernel[:40]), kernel[40:])
        packed[f"layers_{layer}"]["attention"]["o_proj"]["kernel"] = matrix
        plain[f"layers_{layer}"]["attention"]["o_proj"]["kernel"] = numbers(matrix, jnp.dtype("float32"))
    mine, theirs = (
        score_heads(params, planted.CONFIG, [planted.prompt(0)], chunk=CHUNK, names=tuple(MEASURES))
        for params in (packed, plain)
    )
    for name in MEASURES:
        np.testing.assert_allclose(mine["lookup"][name], theirs["lookup"][name], rtol=2e-3, atol=1e-5)


def test_the_same_prompts_give_the_same_scores_and_others_the_same_heads(planted_scores: dict[str, Scores]):
    again = score(planted.prompt(0), planted.prompt(1))
    for name in SCORES:
        np.testing.assert_array_equal(again["lookup"][name], planted_scores["lookup"][name])
    other = score(planted.prompt(7), planted.prompt(8, length=180, pairs=5, asked=3), names=tuple(MEASURES))
    assert not np.array_equal(other["lookup"]["mass"], again["lookup"]["mass"])
    assert all(found(combine(other, name)) == planted.PLANTED for name in MEASURES)


def test_prompts_of_other_lengths_use_the_same_programs():
    steps: tuple[Any, ...] = (probe, slopes)
    score(planted.prompt(0))
    before = [step._cache_size() for step in steps]
    score(*(planted.prompt(seed, length=length) for seed, length in ((0, 200), (1, 100), (2, 171))))
    assert [step._cache_size() for step in steps] == before


def random_prompt(rng: np.random.Generator, length: int, kind: str = "noise") -> Prompt:
    asks = rng.integers(0, 3, 9)
    return Prompt(
        kind=kind,
        tokens=tuple(rng.integers(0, 128, length).tolist()),
        num_answer=9,
        sources=(0,) * 10 + (1,) * 15 + (2,) * 20 + (0,) * (length - 45),
        asks=tuple(asks.tolist()),
    )


TINY_CONFIG = InferenceConfig(
    model=open_checkpoint(str(TINY / "llama3")).config,
    attention=from_preset("dense", sink=5, local=17, page_size=16),
    dtype="float32",
)


def test_scoring_through_pages_equals_a_dense_computation(rng: np.random.Generator):
    params, prompt = open_checkpoint(str(TINY / "llama3")).load_params("float32"), random_prompt(rng, 130)
    got, expected = score_heads(params, TINY_CONFIG, [prompt], chunk=32)["noise"], dense_scores(params, prompt)
    for name in SCORES:
        np.testing.assert_allclose(got[name], expected[name], rtol=2e-4, atol=2e-6, err_msg=name)


def dense_scores(params: dict[str, Any], prompt: Prompt) -> dict[str, np.ndarray]:
    """Every score of a prompt by whole [T, T] attention matrices, without pages, chunks or padding."""
    model, attention = TINY_CONFIG.model, TINY_CONFIG.attention
    flax_model, nothing = Llama(model, jnp.dtype("float32")), (None,) * model.num_layers
    tokens, length, K = jnp.asarray(prompt.tokens), len(prompt.tokens), model.num_kv_heads
    at, first = np.arange(length), length - prompt.num_answer - 1
    rows = slice(first, length - 1)  # the queries that predict the answer
    causal = at <= at[:, None]
    window = causal & ((at > at[:, None] - attention.local) | (at < attention.sink))
    asks = np.array(prompt.asks)[:, None]
    is_source = (np.array(prompt.sources) == asks) & (asks > 0)

    def attend_both(q: jax.Array, k: jax.Array, v: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """Weights [K, G, T, T] and outputs [T, K, G, H], densely and streaming."""
        q = q[0].reshape(length, K, -1, q.shape[-1])
        products = jnp.einsum("tkgh,skh->kgts", q, k[0], precision="highest") / np.sqrt(q.shape[-1])
        weights = [jax.nn.softmax(jnp.where(mask, products, -jnp.inf), axis=-1) for mask in (causal, window)]
        return [(w, jnp.einsum("kgts,skh->tkgh", w, v[0], precision="highest")) for w in weights]

    @jax.jit
    def run(gates: jax.Array) -> tuple[jax.Array, Any]:
        """Log-probabilities [A, V], and what each layer's attention did."""

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: None) -> tuple[jax.Array, Any]:
            (weights, dense), (_, streaming) = attend_both(q, k, v)
            gate = jnp.where(at[:, None] >= first, gates[layer], 1.0)[:, :, None, None]  # the prompt is read densely
            out = (gate * dense + (1 - gate) * streaming).reshape(1, length, -1, dense.shape[-1])
            return out, (weights, dense, dense - streaming)

        positions = jnp.arange(length)[None]
        hidden, seen = flax_model.apply({"params": params}, tokens[None], positions, nothing, attend)
        logits: Any = flax_model.apply({"params": params}, hidden, method="unembed")
        return jax.nn.log_softmax(logits[0, rows], axis=-1), seen

    def measure(layer: int, weights: np.ndarray, dense: np.ndarray, lost: np.ndarray, x: np.ndarray) -> dict[str, Any]:
        outside = np.where(window, 0, weights)[:, :, rows].sum(-1)  # [K, G, A]
        source = np.where(is_source, weights[:, :, rows], 0).sum(-1)
        kernel = np.asarray(params[f"layers_{layer}"]["attention"]["o_proj"]["kernel"])
        kernel = kernel.reshape(kernel.shape[0], K, -1, model.head_dim)
        dense, lost, x = dense[rows], lost[rows], x[rows]
        harm = np.linalg.norm(np.einsum("akgh,dkgh->akd", lost, kernel), axis=-1)
        written = np.linalg.norm(np.einsum("akgh,dkgh->ad", dense, kernel), axis=-1, keepdims=True)
        return {
            "mass": outside.mean((1, 2)),
            "mass_max": outside.max(1).mean(-1),
            "needle": source.mean((1, 2)),
            "needle_max": source.max(1).mean(-1),
            "error": (np.linalg.norm(lost, axis=-1) / np.linalg.norm(dense, axis=-1)).mean((0, 2)),
            "output_error": (harm / written).mean(0),
            "residual_error": (harm / np.linalg.norm(x, axis=-1, keepdims=True)).mean(0),
        }

    ones = jnp.ones((model.num_layers, K))
    wanted, seen = run(ones)
    entering = residuals(params, [np.asarray(dense) for _, dense, _ in seen], tokens)
    measured = [
        measure(layer, *(np.asarray(array, np.float64) for array in (*told, entering[layer])))
        for layer, told in enumerate(seen)
    ]

    def losses(gates: jax.Array) -> jax.Array:
        found, _ = run(gates)
        nll = -jnp.mean(found[np.arange(prompt.num_answer), tokens[first + 1 :]])
        return jnp.stack([nll, jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1))])

    slope = jax.jit(jax.jacrev(losses))
    at_one, at_half = np.asarray(slope(ones)), np.asarray(slope(ones / 2))
    return {name: np.stack([one[name] for one in measured]) for name in measured[0]} | {
        "loss": -(at_one[0] + at_half[0]) / 2,
        "divergence": -at_half[1],
    }


def residuals(params: dict[str, Any], outputs: list[np.ndarray], tokens: jax.Array) -> list[np.ndarray]:
    """The hidden states [T, D] before each layer, from what its heads give, in numpy."""
    x, found = np.asarray(params["embed"]["embedding"], np.float64)[np.asarray(tokens)], []
    for layer, output in enumerate(outputs):
        found.append(x)
        tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[f"layers_{layer}"])
        kernel = tree["attention"]["o_proj"]["kernel"]
        x = x + output.reshape(len(x), -1) @ kernel.reshape(len(kernel), -1).T
        mean = np.mean(np.square(x), axis=-1, keepdims=True)
        normed = x / np.sqrt(mean + TINY_CONFIG.model.rms_norm_eps) * tree["post_attention_norm"]["scale"]
        gate, up = tree["mlp"]["gate_up_proj"]["kernel"]
        gated = normed @ gate.T
        x = x + (gated / (1 + np.exp(-gated)) * (normed @ up.T)) @ tree["mlp"]["down_proj"]["kernel"].T
    return found


def test_kinds_of_prompts_weigh_alike_and_a_head_that_one_kind_needs_counts():
    small, large = np.array([[1.0, 0.0], [0.0, 3.0]]), np.array([[0.0, 100.0], [300.0, 0.0]])
    scores = {kind: {"mass": value} for kind, value in (("a", small), ("b", large), ("c", np.zeros((2, 2))))}
    np.testing.assert_allclose(combine(scores, "mass"), [[0.25, 0.25], [0.75, 0.75]])


def test_heads_take_the_better_of_their_places_for_facts_and_for_copying():
    facts = {"needle": np.array([[0.5, 0.3], [0.2, 0.1]]), "residual_error": np.array([[0.0, 0.0], [0.0, 9.0]])}
    copying = {"needle": np.array([[0.0, 9.0], [0.0, 0.0]]), "residual_error": np.array([[0.2, 0.1], [0.4, 0.3]])}
    text = {"needle": np.zeros((2, 2)), "residual_error": np.array([[0.0, 9.0], [0.0, 0.0]])}
    ranked = combine({"retrieval": facts, "copying": copying, "text": text}, BEST_PLACE)
    assert np.argsort(-ranked.ravel()).tolist() == [0, 2, 1, 3]  # by facts 0 1 2 3, by copying 2 3 0 1


def test_the_merged_ranking_needs_answers_that_come_from_somewhere():
    with pytest.raises(ValueError, match="best_place needs prompts whose answers come from a passage"):
        combine({"text": {"needle": np.zeros((2, 2)), "residual_error": np.ones((2, 2))}}, BEST_PLACE)


def test_gates_are_ranks_that_the_loader_ranks_alike(rng: np.random.Generator):
    scores = rng.standard_normal((5, 4))
    gates = to_gates(scores)
    assert sorted(gates.ravel()) == pytest.approx(np.arange(1, 21) / 20)
    for share in (0.0, 0.25, 0.5, 0.9, 1.0):
        assert classify(gates, share) == classify(scores, share)
        classes = classify(gates, share)
        kept = {(layer, head) for layer in range(5) for head in classes.order[layer][: classes.num_retrieval[layer]]}
        assert kept == {(layer, head) for layer in range(5) for head in range(4) if gates[layer, head] > share + 1e-9}


@pytest.mark.parametrize("quota", ["model", "layer"])
def test_equal_scores_rank_as_the_loader_ranks_them(quota: str):
    scores = np.zeros((2, 4))
    assert classify(to_gates(scores, quota), 0.5) == classify(scores, 0.5, quota)


def test_a_quota_gives_every_layer_as_many_streaming_heads(rng: np.random.Generator):
    scores = rng.standard_normal((6, 4)) + 10 * np.arange(6)[:, None]  # the last layers would keep all of theirs
    assert set(classify(to_gates(scores), 0.5).num_retrieval) == {0, 4}
    for share, kept in ((0.25, 3), (0.5, 2), (0.75, 1)):
        assert classify(to_gates(scores, "layer"), share) == classify(scores, share, "layer")
        assert classify(to_gates(scores, "layer"), share).num_retrieval == (kept,) * 6


def temporaries(program: str, layers: int, length: int, answer: int = 32) -> int:
    """Bytes that a compiled program needs besides arguments and results; nothing is allocated."""
    config = planted.config_of(layers)
    pages = length // config.attention.page_size
    shape = jax.ShapeDtypeStruct
    tokens, scalar, table, sources = (shape(size, jnp.int32) for size in ((answer,), (), (pages,), (length,)))
    chunk: Any = (tokens, tokens, tokens, scalar, scalar, table, sources)
    arguments: list[Any] = [
        abstract_params(config.model, jnp.dtype("float32")),
        jax.eval_shape(lambda: init_cache(config, max_num_seqs=1, retrieval_pages=pages, streaming_pages=1)),
        Chunk(*chunk),
    ]
    if program == "slopes":
        gates = shape((layers, planted.HEADS), jnp.float32)
        arguments += [gates, shape((1, answer, planted.WIDTH), jnp.float32)]
    step = {"probe": probe, "slopes": slopes}[program]
    analysis = step.lower(*arguments, config=config).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("program", ["probe", "slopes"])
def test_memory_at_32k_tokens_is_a_few_times_one_heads_scores(program: str):
    length, answer = 32768, 32
    scores = planted.GROUP * answer * (length + answer) * 4
    keys = 2 * length * planted.HEAD_DIM * 4
    two_layers, three_layers = (temporaries(program, layers, length, answer) for layers in (2, 3))
    assert two_layers < 8 * (scores + keys)  # linear in the context: [S, S] would be 4 GiB
    assert three_layers < 1.05 * two_layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_dtype": "int8"}, "kv_dtype='int8' must be auto: heads are compared on unquantised pages"),
        ({"prompts": []}, "prompts must hold at least one prompt, got none"),
        ({"names": ("mass", "luck")}, f"score 'luck' must be one of {', '.join(SCORES)}"),
        ({"heads": True}, "config.heads must be None: streaming heads are compared with a dense model"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(changes: dict[str, Any], message: str):
    config = planted.CONFIG
    if "kv_dtype" in changes:
        config = dataclasses.replace(config, attention=from_preset("dense", kv_dtype="int8"))
    if "heads" in changes:
        config = dataclasses.replace(config, heads=classify(np.zeros((3, 4)), 0.5))
    prompts = changes.get("prompts", [planted.prompt(0)])
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        score_heads(planted.params(), config, prompts, names=changes.get("names", ("mass",)), chunk=CHUNK)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_answer": 0}, "num_answer=0 must be from 1 to less than the 4 tokens"),
        ({"num_answer": 4, "asks": (0,) * 4}, "num_answer=4 must be from 1 to less than the 4 tokens"),
        ({"sources": (0,)}, "sources must have an entry for each token, asks one for each token of the answer"),
        ({"asks": (0,)}, "sources must have an entry for each token, asks one for each token of the answer"),
    ],
)
def test_a_prompt_whose_parts_do_not_fit_is_refused(changes: dict[str, Any], message: str):
    fields: dict[str, Any] = {"kind": "x", "tokens": (1, 2, 3, 4), "num_answer": 2, "sources": (0,) * 4, "asks": (0, 0)}
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        Prompt(**(fields | changes))
    assert str(error.value) == message
