"""A model of lm-evaluation-harness that answers requests with an `LLM`.

Decode steps score continuations, as if the model had generated them, with page selection as in generation. Only whole
texts (perplexity) go through prefill, which reads all pages.
"""

import dataclasses
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

from tqdm import tqdm

from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.llm import LLM
from lserve_jax.text.chat import ChatOptions
from lserve_jax.text.chat_template import RefusedError
from lserve_jax.text.parts import DEFAULT_TEMPLATE
from lserve_jax.text.tokenizer import Tokenizer

logger = logging.getLogger("lserve_jax")

ROUNDS = 16
"""Ratio of requests per call to those that run at once: enough to keep slots busy, few enough to save results often."""
_DEFAULT_MAX_TOKENS = 256  # the harness's default
_PENALTIES = frozenset({"repetition_penalty", "presence_penalty", "frequency_penalty"})
_SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p"}) | _PENALTIES
"""On the names and meanings of these the harness and `SamplingParams` agree."""

type _Key = tuple[str, str] | None
"""The texts of context and continuation, under which the harness caches an answer; None for no caching."""


class HarnessMethods:
    """The methods of the harness's model class, a base class to put before the harness's `TemplateLM`.

    It does not inherit from `TemplateLM`, so that importing this module does not import the harness.

    Args:
      llm: a model with a tokenizer.
    """

    cache_hook: Any

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        if llm.tokenizer is None:
            raise InputError(f"{llm.setup.checkpoint.name} has no tokenizer, which the harness needs: give tokenizer=")
        self.llm = llm
        self._tokenizer: Tokenizer = llm.tokenizer
        self._template: str | None = None  # the name of the chosen chat template; None for the default one

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Self:
        """Returns the model that ``--model_args`` describes.

        Args:
          arg_dict: arguments of `LLM`.
          additional_config: the harness's ``batch_size``, ``max_batch_size`` and ``device``.
        """
        settings = dict(arg_dict)
        batch_size = str((additional_config or {}).get("batch_size"))
        if batch_size.isdecimal() and int(batch_size) > 1:
            settings.setdefault("max_num_seqs", int(batch_size))
        return cls(LLM(**settings))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Self:
        """Returns the model that ``key=value,key=value`` describes."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence."""
        return self.llm.setup.sizes.max_model_len

    @cached_property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if not self.llm.end_token_ids:
            raise InputError(f"{self.llm.setup.checkpoint.name} names no end token, which the harness needs")
        return self.llm.end_token_ids[0]

    @cached_property
    def prefix_token_id(self) -> int:
        """The token before the first token of a text."""
        begin = self._tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @cached_property
    def _prefix_text(self) -> str:
        return self._tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the tokens of a text, in which the texts of control tokens mean those tokens.

        Args:
          string: the text.
          add_special_tokens: whether the tokenizer adds its special tokens; None adds them unless the text starts with
            the beginning token, as rendered chats do.
          **kwargs: arguments of the harness, without effect.
        """
        del kwargs
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches prepared prompts."""
        template = [] if self._template is None else [self._template]
        return "__".join([*self.llm.setup.checkpoint.name.split("/"), *template])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Chooses the chat template, and returns its source for the harness's records.

        Args:
          chat_template: the name of a template; or True for the default one; or False for none, which returns None.

        Raises:
          InputError: if the checkpoint has no such template.
        """
        self._template = chat_template if isinstance(chat_template, str) else None
        if not chat_template:
            return None
        name, templates = self._template or DEFAULT_TEMPLATE, self._tokenizer.chat_templates
        if name not in templates:
            raise InputError(
                f"{self.llm.setup.checkpoint.name} has no chat template {shown(name)}: its templates are "
                f"{', '.join(templates) or 'none'} (--apply_chat_template NAME chooses one)"
            )
        return templates[name]

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as the checkpoint's template writes it.

        Args:
          chat_history: messages ``{"role": …, "content": …}``.
          add_generation_prompt: whether the assistant's answer comes next; if not, the last message begins it.
        """
        options: ChatOptions = {"continue_final_message": not add_generation_prompt, "chat_template": self._template}
        try:
            return self._tokenizer.render_chat(chat_history, **options)
        except RefusedError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = self._tokenizer.render_chat(others, **options)
            logger.warning("the chat template refuses the system message: it is left out, as the harness does")
            return text

    def get_model_info(self) -> dict[str, Any]:
        """Returns the current settings, which the harness adds to its results."""
        config = self.llm.config
        return {
            "model_dtype": str(config.dtype),
            "weights": self.llm.setup.plan.weight_words,
            "max_length": self.max_length,
            "kv_dtype": config.kv_dtype,
            "attention": dataclasses.asdict(config.attention),
            "retrieval_heads": list(config.num_retrieval),
        }

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[_Key, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether greedy decoding gives that continuation."""
        del kwargs
        fitted = [self._fit(context, continuation) for _, context, continuation in requests]
        _warn_of_cuts(
            [len(context) for _, context, _ in requests], [len(context) for context, _ in fitted], self.max_length
        )
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        lengths = [len(context) + len(continuation) for context, continuation in fitted]
        for indices in self._batches(lengths, "loglikelihood", disable_tqdm):
            outputs = self.llm.score([fitted[i][0] for i in indices], [fitted[i][1] for i in indices])
            for i, output in zip(indices, outputs, strict=True):
                answers[i] = (math.fsum(output.logprobs), output.is_greedy)
                if (key := requests[i][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answers[i])
        return answers

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Returns context and continuation, without the context's beginning if they are too long together."""
        if not continuation:
            raise InputError("a continuation adds no token to its context: there is nothing to score")
        room = self.max_length - len(continuation)
        if room < 1:
            raise InputError(
                f"a continuation has {len(continuation)} tokens, but max_model_len is {self.max_length}: raise it"
            )
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each text; windows of the model's length score each token once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,  # one less for the token that the last one predicts
                context_len=1,
            )
            pairs = map(make_disjoint_window, windows)
            total = math.fsum(
                float(self.llm.prompt_logprobs(context + scored)[-len(scored) :].sum()) for context, scored in pairs
            )
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the model's continuation of each context, up to but without a stop string."""
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        params = [self._sampling_params(request.args[1]) for request in requests]
        prompts = [context[-self._room(one.max_tokens) :] for context, one in zip(contexts, params, strict=True)]
        _warn_of_cuts([len(one) for one in contexts], [len(one) for one in prompts], self.max_length)
        texts = [""] * len(requests)
        for indices in self._batches([len(prompt) for prompt in prompts], "generate_until", disable_tqdm):
            outputs = self.llm.generate([prompts[i] for i in indices], [params[i] for i in indices])
            for i, output in zip(indices, outputs, strict=True):
                texts[i] = output.text
                self.cache_hook.add_partial("generate_until", requests[i].args, output.text)
        return texts

    def _room(self, max_tokens: int) -> int:
        """Returns the most tokens of a context that leave room for an answer of ``max_tokens``."""
        room = self.max_length - max_tokens
        if room < 1:
            raise InputError(
                f"an answer of max_gen_toks={max_tokens} leaves no room for its context, as max_model_len is "
                f"{self.max_length}: raise it, or lower max_gen_toks"
            )
        return room

    def _sampling_params(self, generation_kwargs: Mapping[str, Any]) -> SamplingParams:
        """Returns the sampling parameters of a task; the harness's ``--seed`` determines their seeds."""
        from lm_eval.models.utils import normalize_gen_kwargs

        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(generation_kwargs), _DEFAULT_MAX_TOKENS))
        max_tokens, until = given.pop("max_gen_toks"), given.pop("until")
        given.pop("do_sample")  # normalize_gen_kwargs has set the temperature to 0 for False
        if given.get("num_beams") == 1:
            del given["num_beams"]
        if unknown := sorted(given.keys() - _SAMPLING):
            known = ", ".join(sorted({*_SAMPLING, "do_sample", "max_gen_toks", "until"}))
            raise InputError(f"unknown generation setting {', '.join(unknown)}; known are {known}")
        stop = tuple(text for text in until if text)
        return SamplingParams(max_tokens=max_tokens, stop=stop, seed=random.getrandbits(32), **given)

    def _batches(self, lengths: Sequence[int], title: str, disable_tqdm: bool) -> Iterator[list[int]]:
        """Yields the indices of each call's requests, the longest first: one that does not fit fails at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        size = ROUNDS * self.llm.setup.sizes.max_num_seqs
        with tqdm(total=len(order), desc=title, disable=disable_tqdm) as bar:
            for start in range(0, len(order), size):
                indices = order[start : start + size]
                yield indices
                bar.update(len(indices))


def _warn_of_cuts(before: Sequence[int], after: Sequence[int], max_length: int) -> None:
    cut = sum(old > new for old, new in zip(before, after, strict=True))
    if cut:
        logger.warning(
            f"{cut} of {len(before)} contexts are too long for max_model_len={max_length} and lose their beginning "
            f"(the longest has {max(before)} tokens)"
        )
