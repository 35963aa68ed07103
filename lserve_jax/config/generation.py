"""Hugging Face's ``generation_config.json``: the sampling settings that a model recommends."""

import re
from collections.abc import Mapping
from typing import Any

from lserve_jax.config.errors import InputError
from lserve_jax.config.sampling import SamplingParams

GENERATION_FILE = "generation_config.json"

_ALWAYS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "repetition_penalty": "repetition_penalty",
    "suppress_tokens": "suppress_tokens",
    "begin_suppress_tokens": "begin_suppress_tokens",
    "bad_words_ids": "bad_words",
    "sequence_bias": "logit_bias",
    "stop_strings": "stop",
}
"""Keys that always count, and our names for them."""

_IF_SAMPLED = ("temperature", "top_p", "top_k", "min_p")
"""Keys that count if ``do_sample`` is true, as in transformers."""

_NEUTRAL: dict[str, Any] = {
    "constraints": None,
    "diversity_penalty": 0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_time": None,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "top_h": None,
    "typical_p": 1,
    "watermarking_config": None,
}
"""Keys that are not honoured, and the values at which they change nothing."""

_UNSET_LENGTH = 20  # what transformers takes for a ``max_length`` that nobody set

_HARMLESS = frozenset(
    (
        *("_commit_hash", "_from_model_config", "transformers_version", "do_sample"),
        # Read elsewhere, or of encoder-decoder models.
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        # How transformers works and what it returns, not which text.
        *("cache_config", "cache_implementation", "compile_config", "continuous_batching_config", "disable_compile"),
        *("low_memory", "max_cache_len", "prefill_chunk_size", "use_cache"),
        *("output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate"),
        *("remove_invalid_values", "renormalize_logits"),
        # Drafts, which change the speed alone.
        *(
            "assistant_confidence_threshold",
            "assistant_early_exit",
            "assistant_ensemble_weight",
            "assistant_lookbehind",
        ),
        *("is_assistant", "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule"),
        *("prompt_lookup_num_tokens", "speculation_type", "target_lookbehind", "token_healing", "use_mtp"),
        # Of beams, which `num_beams` would switch on.
        *("early_stopping", "length_penalty"),
    )
)
"""Keys that change nothing here."""


def recommended_params(config: Mapping[str, Any], *, source: str, vocabulary: int | None = None) -> SamplingParams:
    """Returns the sampling settings that a parsed ``generation_config.json`` recommends: greedy if it names none.

    Args:
      config: the parsed file; empty if there is none.
      source: the model's name, for messages.
      vocabulary: the model's number of tokens, if ids are to be checked.

    Raises:
      InputError: if a value is out of range, in one line that names the file's keys.
    """
    values = {ours: config[theirs] for theirs, ours in _ALWAYS.items() if config.get(theirs) is not None}
    if "logit_bias" in values:
        values["logit_bias"] = _single_biases(values["logit_bias"])
    if config.get("do_sample") is True:
        values |= {"temperature": 1.0} | {name: config[name] for name in _IF_SAMPLED if config.get(name) is not None}
    try:
        params = SamplingParams(**values)
        if vocabulary is not None:
            params.require_vocabulary(vocabulary)
    except InputError as error:
        message = str(error)
        for theirs, ours in _ALWAYS.items():
            message = re.sub(rf"\b{ours}(?= must be |: token )", theirs, message)
        raise InputError(f"{source}: {GENERATION_FILE}: {message}") from None
    return params


def not_honoured(config: Mapping[str, Any], context: int) -> list[str]:
    """Returns the keys of a parsed ``generation_config.json`` that would change the text and are not honoured.

    Args:
      config: the parsed file.
      context: tokens of the model's context, which bounds a text here; a lower ``max_length`` does not.
    """
    known = {*_ALWAYS, *_IF_SAMPLED, *_HARMLESS}
    length = config.get("max_length")
    if length == _UNSET_LENGTH or (isinstance(length, int) and length >= context):
        known.add("max_length")
    found = [
        key
        for key, value in config.items()
        if key not in known and value is not None and not (key in _NEUTRAL and value == _NEUTRAL[key])
    ]
    biases = config.get("sequence_bias")
    if isinstance(biases, list) and len(_single_biases(biases)) != len(biases):
        found.append("sequence_bias (of several tokens)")
    return found


def _single_biases(biases: Any) -> Any:
    """Returns pairs of token and bias; the biases of sequences of several tokens are left out.

    The file has pairs of a list of ids and a number. Anything else stays as it is, for `SamplingParams` to refuse.
    """
    if not isinstance(biases, list) or not all(_is_sequence_bias(pair) for pair in biases):
        return biases
    return [(ids[0], bias) for ids, bias in biases if len(ids) == 1]


def _is_sequence_bias(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], list) and bool(pair[0])
