"""Renders a task's text as a prompt: in the model's chat format, raw, or by words if only the length matters."""

from lserve_jax.evaluation.sample import Render
from lserve_jax.text.tokenizer import Tokenizer


def chat_render(tokenizer: Tokenizer) -> Render:
    """Returns a render in the checkpoint's chat format: one user's message and the beginning of the answer."""

    def render(text: str, answer_prefix: str) -> list[int]:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        return prompt + tokenizer.encode(answer_prefix, add_special_tokens=False)

    return render


def raw_render(tokenizer: Tokenizer) -> Render:
    """Returns a render without any format, for base models: the answer begins right after the text."""

    def render(text: str, answer_prefix: str) -> list[int]:
        return tokenizer.encode(f"{text} {answer_prefix}" if answer_prefix else text)

    return render


def word_render(text: str, answer_prefix: str) -> list[int]:
    """Returns the position of every word: a render for `Request` with lengths in words, the same for all models.

    Prompts that use it have the requested number of words; `chat_render` or `raw_render` turns them into tokens.
    """
    return list(range(len(text.split()) + len(answer_prefix.split())))
