import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax.config.hf import read_hf
from lserve_jax.config.model import ModelConfig
from lserve_jax.models.llama import Llama
from lserve_jax.weights import abstract_params
from lserve_jax.weights.rules import check_heads, expected_tensors, head_order, parameters
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


def test_heads_move_as_blocks_of_one_kv_head():
    config = model("biased")
    heads = Heads((2, 0, 1), (0, 1, 2), (0, 2, 1))
    every = parameters(config)
    moved = {
        parameter.path: order for parameter in every if (order := head_order(parameter, config, heads)) is not None
    }
    assert {path[0] for path in moved} == {"layers_0", "layers_2"}
    names = ["qkv_proj.kernel", "o_proj.kernel", "qkv_proj.bias"]
    assert [".".join(path[2:]) for path in moved if path[0] == "layers_0"] == names
    assert all(order.tolist() == [2, 0, 1] for path, order in moved.items() if path[0] == "layers_0")
    axes = {parameter.path[-2]: parameter.head_axis for parameter in every if parameter.path in moved}
    assert axes == {"qkv_proj": 0, "o_proj": -1}


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
    assert all(head_order(parameter, config, heads) is None for parameter in parameters(config))
