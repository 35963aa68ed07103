"""The routes beside the two that generate: models, the tokenizer, health, metrics."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from lserve_jax.serve.chat import render
from lserve_jax.serve.errors import bad_request
from lserve_jax.serve.protocol import DetokenizeRequest, TokenizeRequest
from lserve_jax.serve.service import Service


def model_card(service: Service) -> dict[str, Any]:
    """Returns what ``/v1/models/{id}`` says."""
    return {
        "id": service.model,
        "object": "model",
        "created": service.started,
        "owned_by": "lserve_jax",
        "max_model_len": service.context,
    }


def models(service: Service) -> dict[str, Any]:
    """Returns what ``/v1/models`` says."""
    return {"object": "list", "data": [model_card(service)]}


def versions() -> dict[str, Any]:
    """Returns what ``/version`` says."""
    return {"version": version("lserve_jax")}


def tokenize(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tokens of a text or of a conversation."""
    request = TokenizeRequest.model_validate(body)
    if (request.prompt is None) == (request.messages is None):
        raise bad_request("give either prompt or messages", "prompt", "missing_required_parameter")
    if request.prompt is None:
        tokens = render(service, request)
    else:
        tokens = service.require_tokenizer().encode(request.prompt, add_special_tokens=request.add_special_tokens)
    texts = [service.token_texts[token] for token in tokens] if request.return_token_strs else None
    return {"count": len(tokens), "max_model_len": service.context, "tokens": tokens, "token_strs": texts}


def detokenize(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the text of tokens, special ones included; ids that the model does not have add nothing."""
    request = DetokenizeRequest.model_validate(body)
    return {"prompt": service.require_tokenizer().decode(request.tokens, skip_special_tokens=False)}


def tokenizer_info(service: Service) -> dict[str, Any]:
    """Returns what lm-eval asks of a remote tokenizer: special tokens by name, and the chat template."""
    tokenizer = service.require_tokenizer()
    named = tokenizer.special_tokens
    ends = [tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.eos_token_ids]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": service.context,
        "bos_token": named.get("bos_token"),
        "eos_token": named.get("eos_token", next(iter(ends), None)),
        "pad_token": named.get("pad_token"),
        "unk_token": named.get("unk_token"),
        "chat_template": tokenizer.chat_template,
    }
