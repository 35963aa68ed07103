"""The texts of a command as token ids: in the model's chat format or as they are, whole or after a saved context."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from lserve_jax.config.errors import InputError
from lserve_jax.text.chat import ChatOptions, Message
from lserve_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Turns texts into token ids.

    Attributes:
      tokenizer: the model's.
      options: of the chat format; None takes texts as they are.
      first: messages before that of the user.
      last: messages after it.
    """

    tokenizer: Tokenizer
    options: ChatOptions | None = None
    first: Sequence[Message] = ()
    last: Sequence[Message] = field(default=())

    def whole(self, text: str) -> list[int]:
        """Returns a whole prompt."""
        if self.options is None:
            return self.tokenizer.encode(text)
        return self.tokenizer.apply_chat_template([*self.first, _of_user(text), *self.last], **self.options)

    def opening(self, text: str) -> list[int]:
        """Returns a prompt that ends with the text, for further text of the user to follow: what a context saves."""
        if self.options is None:
            return self.tokenizer.encode(text)
        options: Any = {**self.options, "continue_final_message": True}
        return self.tokenizer.apply_chat_template([*self.first, _of_user(text)], **options)

    def rest(self, text: str, context: Sequence[int], source: str) -> list[int]:
        """Returns what follows a context's tokens: the text, and in the chat format the end of the user's message.

        Args:
          text: the user's text.
          context: the tokens of the context.
          source: its name, for messages.

        Raises:
          InputError: if the chat format begins in another way than the context.
        """
        if self.options is None:
            return self.tokenizer.encode(text, add_special_tokens=False)
        head = _common(self.opening("a"), self.opening("b"))
        # The last token of the head may have been joined with the beginning of the context's text.
        if list(context[: len(head) - 1]) != head[:-1]:
            raise InputError(
                f"{source}: does not begin as the chat format does here: give the same --system-prompt and "
                "--chat-template as when it was saved, or --raw if it was saved with that"
            )
        found = self.whole(text)
        if found[: len(head)] != head:
            raise InputError("after a context, the prompt must begin with a word: its first characters would change")
        return found[len(head) :]


def _of_user(text: str) -> Message:
    return {"role": "user", "content": text}


def _common(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """Returns the tokens with which both begin."""
    return [mine for mine, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
