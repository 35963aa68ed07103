"""LServe in JAX: long-sequence LLM inference with unified sparse attention.

`LLM` generates text. It builds on pure functions of pytrees: `init_cache`, `prefill_step` and `decode_step`.
"""

from lserve_jax.config.attention import AttentionConfig, from_preset
from lserve_jax.config.errors import InputError
from lserve_jax.config.heads import HeadClasses, classify, load_gates
from lserve_jax.config.hf import read_hf
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.model import ModelConfig, RopeConfig
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.config.selectors import register_selector
from lserve_jax.engine.outputs import RequestOutput, ScoreOutput
from lserve_jax.engine.setup import Setup, prepare
from lserve_jax.llm import LLM
from lserve_jax.runtime.cache import init_cache
from lserve_jax.runtime.recall import attention_recall
from lserve_jax.runtime.steps import decode_loop, decode_step, prefill_step
from lserve_jax.weights.load import open_checkpoint

__all__ = [
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
]
