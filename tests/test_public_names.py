"""What users import keeps its name, or warns for a release before it goes."""

import importlib
import subprocess
import sys

import pytest

import lserve_jax
import pallas_kernels
from lserve_jax import ModelConfig, init_cache
from tests.lserve_jax.checkpoints import tiny_config
from tests.lserve_jax.runtime.tiny_steps import tiny_config as tiny_inference_config

PUBLIC = {
    "LLM",
    "AttentionConfig",
    "HeadClasses",
    "InferenceConfig",
    "InputError",
    "ModelConfig",
    "RequestOutput",
    "RopeConfig",
    "SamplingParams",
    "ScoreOutput",
    "Setup",
    "attention_recall",
    "classify",
    "decode_loop",
    "decode_step",
    "from_preset",
    "init_cache",
    "load_gates",
    "open_checkpoint",
    "prefill_step",
    "prepare",
    "read_hf",
    "register_selector",
}
PUBLIC_OPS = {
    "NO_PAGE",
    "LayerKV",
    "PageTables",
    "PagedKV",
    "QuantizedArray",
    "QuantizedMatrix",
    "Selection",
    "choose_pages",
    "decode_attention",
    "dequantize",
    "kv_write",
    "page_select",
    "prefill_attention",
    "quantize",
    "quantized_matmul",
    "rotate",
    "selection_width",
}
COMMANDS = ("generate", "calibrate", "evaluate", "convert", "harness", "demo", "serve.__main__")


def test_the_packages_export_what_they_always_did():
    assert set(lserve_jax.__all__) == PUBLIC
    assert set(pallas_kernels.__all__) >= PUBLIC_OPS
    assert all(hasattr(lserve_jax, name) for name in PUBLIC)
    assert all(hasattr(pallas_kernels, name) for name in pallas_kernels.__all__)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_with_a_main(name: str):
    assert callable(importlib.import_module(f"lserve_jax.{name}").main)


def test_the_old_module_of_prepare_warns_and_works():
    program = (
        "from lserve_jax.engine_setup import prepare, Setup; import lserve_jax; assert prepare is lserve_jax.prepare"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "lserve_jax.engine_setup is deprecated: import prepare from lserve_jax" in done.stderr


def test_old_names_of_the_model_warn_and_work():
    from lserve_jax import models

    with pytest.warns(FutureWarning, match=r"ModelConfig\.from_hf is deprecated: call lserve_jax\.read_hf"):
        config = ModelConfig.from_hf(tiny_config(), source="a test")
    assert config == lserve_jax.read_hf(tiny_config(), source="a test")
    with pytest.warns(FutureWarning, match=r"import it from lserve_jax\.weights"):
        tree = models.abstract_params(config, "float32")
    assert tree["final_norm"]["scale"].shape == (config.hidden_size,)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = models.nothing
    with pytest.warns(FutureWarning, match=r"say kind\(layer\)\.decode\.num_selected"):
        assert tiny_inference_config().num_selected(0) == 256


def test_the_old_module_of_model_configurations_still_has_them():
    from lserve_jax import config

    assert (config.ModelConfig, config.RopeConfig) == (ModelConfig, lserve_jax.RopeConfig)


def test_the_old_name_of_a_batchs_size_warns_and_works():
    config = tiny_inference_config()
    new = init_cache(config, max_num_seqs=2, retrieval_pages=300, streaming_pages=60)
    for sizes in ({}, {"slots": 2, "max_num_seqs": 2}):
        with pytest.raises(TypeError, match="init_cache needs max_num_seqs"):
            init_cache(config, retrieval_pages=300, streaming_pages=60, **sizes)
    with pytest.warns(FutureWarning, match=r"init_cache\(slots=\) is deprecated: say max_num_seqs="):
        old = init_cache(config, slots=2, retrieval_pages=300, streaming_pages=60)
    assert old[0].selected is not None and new[0].selected is not None
    assert old[0].selected.pages.shape == new[0].selected.pages.shape
