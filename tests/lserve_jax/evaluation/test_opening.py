"""Whether measurements are in the chat format, and what is said of a model that has none."""

import logging
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from lserve_jax.config.errors import InputError
from lserve_jax.evaluation.measurement import Measurement
from lserve_jax.evaluation.opening import PromptSettings, open_measurements
from lserve_jax.text.tokenizer import Tokenizer

VOCABULARY = Path(__file__).parents[2] / "golden" / "tiny" / "llama3" / "tokenizer.json"
NAMES = ["copy", "vt", "perplexity"]


def tokenizer_of(templates: dict[str, str]) -> Tokenizer:
    backend = Backend.from_file(str(VOCABULARY))
    return Tokenizer(backend, special_tokens={}, eos_token_ids=[], chat_template=templates, source="model")


def opened(templates: dict[str, str], *, raw: bool = False) -> list[Measurement]:
    settings = PromptSettings(raw=raw, corpus=str(Path(__file__)))
    return open_measurements(NAMES, settings, tokenizer_of(templates), 4096)


def test_a_model_without_a_chat_template_is_measured_raw_with_one_warning(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        opened({}, raw=True)
        opened({"default": "{{ messages[0].content }}"})
        assert not caplog.records
        opened({})
    (record,) = caplog.records
    assert record.getMessage() == (
        "model has no chat template: the prompt is continued as it is (--raw says that prompts are meant to have no "
        "chat format)"
    )


def test_a_model_whose_templates_have_no_default_is_refused_unless_raw_is_asked_for():
    templates = {"rag": "r", "tool_use": "t"}
    with pytest.raises(InputError, match="model: its chat templates are rag, tool_use, and none is the default: --raw"):
        opened(templates)
    assert len(opened(templates, raw=True)) == len(NAMES)
