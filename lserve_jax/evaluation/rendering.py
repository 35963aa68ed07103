"""From a task's text to a prompt: in the model's chat format, raw, or by words where only the length matters."""

from lserve_jax.evaluation.sample import Render
from lserve_jax.text.tokenizer import Tokenizer


def chat_render(tokenizer: Tokenizer) -> Render:
    """Returns a render in the checkpoint's chat format: one user's message, and the answer begun in its name."""

    def render(text: str, answer_prefix: str) -> list[int]:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        return prompt + tokenizer.encode(answer_prefix, add_special_tokens=False)

    return render


def raw_render(tokenizer: Tokenizer) -> Render:
    """Returns a render without any format, for base models: the answer begins right behind the text."""

    def render(text: str, answer_prefix: str) -> list[int]:
        return tokenizer.encode(f"{text} {answer_prefix}" if answer_prefix else text)

    return render


def word_render(text: str, answer_prefix: str) -> list[int]:
    """Returns the position of every word: a render for `Request` that gives lengths in words, for any model alike.

    Prompts made with it hold as many words as asked for; `chat_render` or `raw_render` turns them into tokens.
    """
    return list(range(len(text.split()) + len(answer_prefix.split())))
