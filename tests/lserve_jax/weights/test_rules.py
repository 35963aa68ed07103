import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax.config.hf import read_hf
from lserve_jax.config.model import ModelConfig
from lserve_jax.models.llama import Llama
from lserve_jax.weights import abstract_params
from lserve_jax.weights.rules import check_heads, expected_tensors, head_index
from tests.lserve_jax.checkpoints import gguf_name, random_tensors, tiny_config

CONFIGS = {
    "llama": tiny_config(),
    "tied": tiny_config(tie_word_embeddings=True),
    "biased": tiny_config(attention_bias=True, mlp_bias=True),
    "mistral": tiny_config("mistral"),
    "qwen2": tiny_config("qwen2"),
    "qwen3": tiny_config("qwen3"),
}


class Heads:
    def __init__(self, *order: tuple[int, ...]) -> None:
        self.order = order


def model(name: str) -> ModelConfig:
    return read_hf(CONFIGS[name], source=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_describe_the_tree_that_the_flax_model_has(name: str):
    config = model(name)
    model_of_flax, nothing = Llama(config, jnp.dtype("float32")), (None,) * config.num_layers

    def everything(model: Llama, tokens: jax.Array) -> jax.Array:
        hidden, _ = model(tokens, tokens, nothing, lambda kind, q, k, v, state: (q, state))
        return model.unembed(hidden)

    tokens = jnp.zeros((1, 1), jnp.int32)
    tree = jax.eval_shape(lambda: model_of_flax.init(jax.random.key(0), tokens, method=everything))["params"]
    assert abstract_params(config, "float32") == tree


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_describe_the_tensors_of_hugging_face_and_llama_cpp(name: str):
    tensors = random_tensors(CONFIGS[name])
    expected = expected_tensors(model(name))
    assert {tensor.names["hf"]: tensor.file_shape for tensor in expected} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    assert [gguf_name(tensor.names["hf"]) for tensor in expected] == [tensor.names["gguf"] for tensor in expected]


def test_query_heads_move_in_the_groups_that_share_a_kv_head():
    config = model("biased")
    heads = Heads((2, 0, 1), (0, 1, 2), (0, 2, 1))
    moved = {tensor.path: index for tensor in expected_tensors(config) if (index := head_index(tensor, config, heads))}
    axis, order = moved["layers_0", "attention", "q_proj", "kernel"]
    assert (axis, order.tolist()) == (0, [4, 5, 0, 1, 2, 3])
    axis, order = moved["layers_2", "attention", "k_proj", "bias"]
    assert (axis, order.tolist()) == (0, [0, 2, 1])
    per_layer = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 1}
    names = [path[2] for path in moved if path[0] == "layers_0"]
    assert {name: names.count(name) for name in names} == per_layer
    assert not any(path[0] == "layers_1" for path in moved)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (((0, 1, 2),), "has 1 layers, the model has 3"),
        (((0, 1, 2), (0, 1, 1), (0, 1, 2)), r"layer 1 must hold each KV head 0 to 2 once, got \(0, 1, 1\)"),
        (((0, 1, 2), (0, 1, 2), (0, 1)), "layer 2 must hold each KV head"),
    ],
)
def test_head_order_of_another_model_is_refused(order: tuple[tuple[int, ...], ...], message: str):
    with pytest.raises(ValueError, match=message):
        check_heads(Heads(*order), model("llama"))


def test_identity_order_moves_nothing():
    config = model("llama")
    heads = Heads(*[tuple(np.arange(3).tolist())] * 3)
    assert all(head_index(tensor, config, heads) is None for tensor in expected_tensors(config))
