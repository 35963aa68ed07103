"""Random weights of a model of which only the shapes are known."""

from pathlib import Path

import jax
import numpy as np
import pytest

from bench.cpu.random_weights import with_random_weights
from lserve_jax.weights import open_checkpoint
from pallas_kernels.core.quantized_matrix import expand
from tests.lserve_jax.checkpoints import random_tensors, tiny_config, write_folder

CONFIG = tiny_config(hidden_size=64, intermediate_size=128, head_dim=32)


@pytest.mark.parametrize("weight_dtype", [None, "int8", "int4"])
def test_a_tree_of_the_promised_form_with_numbers_of_a_usual_size(weight_dtype: str | None, tmp_path: Path):
    checkpoint = open_checkpoint(str(write_folder(tmp_path, CONFIG, random_tensors(CONFIG))))
    params = with_random_weights(checkpoint).load_params("float32", weight_dtype=weight_dtype)
    promised = checkpoint.abstract_params("float32", weight_dtype)
    assert jax.tree.structure(params) == jax.tree.structure(promised)
    for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(promised), strict=True):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
    kernel = np.asarray(expand(params["layers_0"]["mlp"]["gate_up_proj"]["kernel"], np.float32))
    assert abs(kernel.std() / 0.02 - 1) < 0.1
    assert abs(kernel.mean()) < 0.002
    assert (np.asarray(params["layers_0"]["input_norm"]["scale"]) == 1).all()
