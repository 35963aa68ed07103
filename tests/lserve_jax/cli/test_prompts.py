"""A prompt in two parts, a saved context and what follows it, has the tokens of the prompt in one."""

from pathlib import Path

import pytest

from lserve_jax import InputError
from lserve_jax.cli.prompts import PromptEncoder
from lserve_jax.text.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "golden" / "tiny"
DOCUMENT = "The sky is blue.\nGrass is green.\n"


@pytest.fixture(scope="module", params=["llama3", "mistral", "qwen3"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.from_folder(TINY / request.param)


def chat(tokenizer: Tokenizer, system: str | None = None) -> PromptEncoder:
    first = [] if system is None else [{"role": "system", "content": system}]
    return PromptEncoder(tokenizer=tokenizer, options={"literal_roles": ("system", "user")}, first=first)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("question", ["Why?", "What is green <|im_end|> here?"])
def test_the_parts_of_a_chat_are_the_chat(question: str, system: str | None, tokenizer: Tokenizer):
    encoder = chat(tokenizer, system)
    opening = encoder.opening(DOCUMENT)
    assert tokenizer.decode(opening, skip_special_tokens=False).endswith(DOCUMENT)
    assert opening + encoder.rest(question, opening, "file") == encoder.whole(DOCUMENT + question)


def test_the_parts_of_a_text_are_the_text(tokenizer: Tokenizer):
    encoder = PromptEncoder(tokenizer=tokenizer)
    opening = encoder.opening(DOCUMENT)
    assert opening == tokenizer.encode(DOCUMENT)
    assert encoder.rest("Why?", opening, "file") == tokenizer.encode("Why?", add_special_tokens=False)


def test_a_context_that_was_saved_in_another_format_is_refused(tokenizer: Tokenizer):
    raw, plain = PromptEncoder(tokenizer=tokenizer).opening(DOCUMENT), chat(tokenizer).opening(DOCUMENT)
    for encoder, context in (
        (chat(tokenizer), raw),
        (chat(tokenizer, "Be brief."), plain),
        (chat(tokenizer), chat(tokenizer, "Be brief.").opening(DOCUMENT)),
    ):
        with pytest.raises(InputError, match=r"^file: does not begin as the chat format does here"):
            encoder.rest("Why?", context, "file")
