"""Writes what the logits processors of `transformers` make of given logits, and the keys of its GenerationConfig.

    pip install -r tests/golden/requirements.txt
    python tests/golden/make_sampling_golden.py

The processors are those that `generate` builds, in its own order. N cases over a vocabulary of V = 61 tokens:

    sampling.json                 a list of N cases: the name, the ids of the prompt and of the generated text, which
                                  together are the text so far, and the params, named as in SamplingParams; a setting
                                  that a case leaves out is off, and without a temperature the case is greedy
    sampling.npz                  logits [N, V] float32, the model's output;
                                  processed [N, V] float32, the scores that a greedy `generate` takes the argmax of,
                                  so before temperature, top-k, top-p and min-p; excluded tokens hold minus infinity;
                                  greedy [N] int32, that argmax, the first one of equals;
                                  final [N, V] float32, the scores after temperature, top-k, top-p and min-p, in this
                                  order; equal to `processed` where the temperature is 0
    generation_config_keys.json   each attribute of GenerationConfig and the value that `generate` gives it where
                                  generation_config.json is silent

`bad_words` are lists of ids, and `stop_token_ids` are the ids that `transformers` calls eos. A bad word of one token
that is in `stop_token_ids` has no effect. The same versions give the same bytes again.
"""

import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from make_golden import GOLDEN, record_versions
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

Params = Mapping[str, Any]
VOCAB = 61
LAST = VOCAB - 1
PROMPT = [1, 9, 14, 17, 30, 9, 52, 40]
GENERATED = [7, 33, 17, 8, 33, 12]
TOP = [17, 23]  # these tie as the likeliest; the text has the first
NEXT = [5, 40, 41]  # these tie as the next likely
ZERO = 9  # its logit is 0
MARGIN = 1e-3  # a token nearer to the threshold of top-p or min-p would test the rounding
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
EXCEPT_44 = [token for token in range(VOCAB) if token != 44]
EVERYTHING = {
    "repetition_penalty": 1.3,
    "logit_bias": {17: 2.5, 12: -4.0, 2: 30.0, 50: 9.0},
    "suppress_tokens": [5, 0],
    "begin_suppress_tokens": [23, 2],
    "bad_words": [[33, 12, 40], [12, 50], [52, 40, 41], [3]],
    "min_tokens": 4,
    "stop_token_ids": [2, LAST],
}
FILTERS = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02}

# Those of the first table change the logits, those of the second do not: a test of an effect, and of its absence.
CHANGED: dict[str, Params] = {
    "repetition_penalty 0.7": {"repetition_penalty": 0.7},
    "repetition_penalty 1.3": {"repetition_penalty": 1.3},
    "repetition_penalty, only a prompt": {"generated": [], "repetition_penalty": 1.3},
    "repetition_penalty, a prompt of one token": {"prompt": [1], "repetition_penalty": 1.3},
    "repetition_penalty 5": {"repetition_penalty": 5.0},
    "logit_bias above 0": {"logit_bias": {12: 4.5, 0: 1.25}},
    "logit_bias below 0": {"logit_bias": {17: -3.5, LAST: -0.5}},
    "logit_bias at its limits": {"logit_bias": {LAST: 100.0, 17: -100.0}},
    "logit_bias on every token": {"logit_bias": {token: (token % 7 - 3) / 2 for token in range(VOCAB)}},
    "suppress_tokens": {"suppress_tokens": [17]},
    "suppress_tokens, several": {"suppress_tokens": [LAST, 0, 17, 23, 0]},
    "suppress_tokens, all but one": {"suppress_tokens": EXCEPT_44},
    "begin_suppress_tokens at the first token": {"generated": [], "begin_suppress_tokens": [17, 2]},
    "begin_suppress_tokens after a prompt of one token": {"prompt": [1], "generated": [], "begin_suppress_tokens": [0]},
    "bad_words of one token": {"bad_words": [[17], [0]]},
    "bad_words of two tokens, begun in the generated text": {"bad_words": [[12, 17]]},
    "bad_words of three tokens, begun in the generated text": {"bad_words": [[33, 12, 17]]},
    "bad_words of two tokens, begun in the prompt": {"generated": [], "bad_words": [[40, 17]]},
    "bad_words of three tokens, begun in the prompt": {"generated": [], "bad_words": [[52, 40, 17]]},
    "bad_words, begun in the prompt and the generated text": {"generated": [7], "bad_words": [[40, 7, 17]]},
    "bad_words that overlap": {"bad_words": [[12, 17], [12, 23], [33, 12, 5], [8, 33, 12, 40], [12, 12, 41], [41, 5]]},
    "bad_words that end alike, one begun": {"bad_words": [[7, 17], [12, 17], [9, 12, 17]]},
    "bad_words that end alike, two begun": {"bad_words": [[17], [12, 17], [12, 17]]},
    "bad_words that repeat a token": {"generated": [33, 33], "bad_words": [[33, 33, 33], [33, 33, 33, 33, 17]]},
    "bad_words, one as long as the text and one token": {"prompt": [1], "generated": [7], "bad_words": [[1, 7, 17]]},
    "bad_words, one a stop token": {"bad_words": [[2], [17]], "stop_token_ids": [2, LAST]},
    "bad_words that end in a stop token": {"bad_words": [[12, 2]], "stop_token_ids": [2, LAST]},
    "min_tokens before the first token": {"generated": [], "min_tokens": 3, "stop_token_ids": [2]},
    "min_tokens, one short": {"generated": [7, 33], "min_tokens": 3, "stop_token_ids": [2, 17, LAST]},
    "penalty after bias": {"repetition_penalty": 1.3, "logit_bias": {17: 5.0, 12: -2.0, 50: 1.0}},
    "penalty after bias that takes 0 below 0": {"repetition_penalty": 1.3, "logit_bias": {ZERO: -3.0}},
    "penalty after bias that takes 0 above 0": {"repetition_penalty": 0.7, "logit_bias": {ZERO: 3.0}},
    "penalty of 0.7 and suppressed tokens": {"repetition_penalty": 0.7, "suppress_tokens": [17, 12, 3]},
    "bias cannot lift a suppressed token": {"logit_bias": {17: 100.0, 5: 100.0}, "suppress_tokens": [17]},
    "bias cannot lift a bad word": {"logit_bias": {17: 100.0}, "bad_words": [[12, 17]]},
    "bias cannot lift a stop token": {"logit_bias": {2: 100.0}, "min_tokens": 7, "stop_token_ids": [2]},
    "bias lifts a stop token": {"logit_bias": {2: 100.0}, "min_tokens": 6, "stop_token_ids": [2]},
    "both lists of suppressed tokens": {"generated": [], "suppress_tokens": [17], "begin_suppress_tokens": [23, 17]},
    "penalty and bad_words": {"repetition_penalty": 1.3, "bad_words": [[33, 12, 17], [12, 23], [40, 12, 5]]},
    "everything at the first token": {"generated": [], **EVERYTHING},
    "everything below min_tokens": {"generated": [8, 33, 12], **EVERYTHING},
    "everything at min_tokens": {"generated": [7, 8, 33, 12], **EVERYTHING},
    "everything later": EVERYTHING,
    "temperature 0.7": {"temperature": 0.7},
    "temperature 2": {"temperature": 2.0},
    "top_k 1 of a tie": {"temperature": 1.0, "top_k": 1},
    "top_k 3 within a tie": {"temperature": 1.0, "top_k": 3},
    "top_k 5": {"temperature": 1.0, "top_k": 5},
    "top_p 0.5": {"temperature": 2.0, "top_p": 0.5},
    "top_p 0.95": {"temperature": 1.5, "top_p": 0.95},
    "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "min_p 1 of a tie": {"temperature": 1.0, "min_p": 1.0},
    "top_p of what top_k leaves": {"temperature": 3.0, "top_k": 12, "top_p": 0.8},
    "min_p of what top_p leaves": {"temperature": 3.0, "top_p": 0.8, "min_p": 0.3},
    "all four filters": FILTERS,
    "penalty and temperature": {"repetition_penalty": 1.3, "temperature": 0.7},
    "bias and top_k": {"logit_bias": {44: 30.0, 17: -50.0}, "temperature": 1.0, "top_k": 4},
    "bad_words and top_k": {"bad_words": [[12, 17], [23]], "temperature": 1.0, "top_k": 2},
    "suppress_tokens and top_p": {"suppress_tokens": TOP, "temperature": 1.5, "top_p": 0.9},
    "suppress_tokens and min_p": {"suppress_tokens": TOP, "temperature": 1.5, "min_p": 0.2},
    "one token left, and all four filters": {"suppress_tokens": EXCEPT_44, **FILTERS},
    "everything at the first token, and all four filters": {"generated": [], **EVERYTHING, **FILTERS},
    "everything below min_tokens, and all four filters": {"generated": [8, 33, 12], **EVERYTHING, **FILTERS},
    "everything later, and all four filters": {**EVERYTHING, **FILTERS},
    "everything, greedy in spite of the filters": {**EVERYTHING, **FILTERS, "temperature": 0.0},
}
UNCHANGED: dict[str, Params] = {
    "nothing": {},
    "all off": {
        "repetition_penalty": 1.0,
        "logit_bias": {17: 0.0},
        "min_tokens": 0,
        "stop_token_ids": [2],
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
    },
    "begin_suppress_tokens at the second token": {"generated": [7], "begin_suppress_tokens": [17, 2]},
    "begin_suppress_tokens later": {"begin_suppress_tokens": [17, 2]},
    "bad_words of two tokens, begun elsewhere": {"bad_words": [[33, 17], [40, 17]]},
    "bad_words of three tokens, half begun": {"bad_words": [[7, 12, 17], [33, 7, 17]]},
    "bad_words of three tokens, of which the text has the last": {"bad_words": [[33, 17, 12], [8, 33, 12]]},
    "bad_words longer than the text": {"prompt": [1], "generated": [7], "bad_words": [[9, 1, 7, 17], [7, 1, 7, 5]]},
    "bad_words, only a stop token": {"bad_words": [[2]], "stop_token_ids": [2, LAST]},
    "min_tokens at the limit": {"generated": [7, 33, 12], "min_tokens": 3, "stop_token_ids": [2, LAST]},
    "min_tokens after the limit": {"min_tokens": 3, "stop_token_ids": [2, LAST]},
    "min_tokens without stop_token_ids": {"generated": [7], "min_tokens": 3},
    "stop_token_ids alone": {"stop_token_ids": [17, 2]},
    "top_k above the vocabulary": {"temperature": 1.0, "top_k": VOCAB + 10},
    "greedy in spite of the filters": {"temperature": 0.0, "top_k": 2, "top_p": 0.1, "min_p": 0.9},
}


def tiny_model() -> LlamaForCausalLM:
    """Returns a random model, for its methods and its logits; it has no generation settings of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig()
    return model


def as_generation_config(params: Params) -> GenerationConfig:
    """Returns the same settings in the words of `transformers`."""
    is_sampled = params.get("temperature", 0.0) > 0
    settings: dict[str, Any] = {"do_sample": is_sampled}
    if is_sampled:
        filters = {name: params[name] for name in ("temperature", "top_k", "top_p", "min_p") if name in params}
        settings |= {"top_k": 0, **filters}  # where nothing is said, `generate` takes a top_k of 50
    names = {
        "repetition_penalty": "repetition_penalty",
        "suppress_tokens": "suppress_tokens",
        "begin_suppress_tokens": "begin_suppress_tokens",
        "bad_words": "bad_words_ids",
        "min_tokens": "min_new_tokens",
        "stop_token_ids": "eos_token_id",
    }
    settings |= {theirs: params[ours] for ours, theirs in names.items() if ours in params}
    if "logit_bias" in params:
        settings["sequence_bias"] = [[[token], bias] for token, bias in params["logit_bias"].items()]
    return GenerationConfig(**settings)


def processors_of(model: LlamaForCausalLM, params: Params, prompt_length: int) -> LogitsProcessorList:
    """Returns the processors as `generate` makes them, from the same three methods."""
    config, _ = model._prepare_generation_config(as_generation_config(params))
    model._prepare_special_tokens(config, device="cpu", batch_size=1)
    model_kwargs = {"attention_mask": torch.ones(1, prompt_length, dtype=torch.long)}
    return model._get_logits_processor(config, prompt_length, device="cpu", model_kwargs=model_kwargs)


def draw_logits(seed: Sequence[int]) -> torch.Tensor:
    """Returns logits [1, V] float32 with ties among the likeliest, among the next and among the rest."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal(VOCAB)).astype(np.float32)
    logits[rng.choice(VOCAB, 3, replace=False)] = logits[rng.integers(VOCAB)]
    highest = logits.max()
    logits[NEXT] = highest + np.float32(0.75)
    logits[TOP] = highest + np.float32(1.5)
    logits[ZERO] = 0.0
    return torch.from_numpy(logits)[None]


def is_clear(warper: Any, before: torch.Tensor, after: torch.Tensor) -> bool:
    """Returns whether what top-p or min-p keeps is beyond doubt: no tie is split, no token is near the threshold."""
    probabilities = before[0].double().softmax(-1)
    if isinstance(warper, TopPLogitsWarper):
        mass = probabilities.sort().values.cumsum(-1)
        is_far = ((mass - (1 - warper.top_p)).abs() > MARGIN).all()
        is_kept = after[0].isfinite()
        return bool(is_far) and not torch.isin(before[0][is_kept], before[0][~is_kept]).any()
    if isinstance(warper, MinPLogitsWarper):
        below = probabilities[before[0] < before.max()] / probabilities.max()
        return bool(((below - warper.min_p).abs() > MARGIN * warper.min_p).all())
    return True


def apply(model: LlamaForCausalLM, case: Params, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns the scores [1, V] before and after the warpers, or None where rounding could decide what is kept."""
    text = torch.tensor([case["prompt"] + case["generated"]])
    processors = processors_of(model, case["params"], len(case["prompt"]))
    first = next((i for i, one in enumerate(processors) if isinstance(one, WARPERS)), len(processors))
    assert all(isinstance(one, WARPERS) for one in processors[first:]), processors
    processed = final = LogitsProcessorList(processors[:first])(text, logits)
    for warper in processors[first:]:
        before, final = final, warper(text, final)
        if not is_clear(warper, before, final):
            return None
    return processed, final


def make_case(model: LlamaForCausalLM, name: str, settings: Params) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns a case and its arrays [V], with the first logits for which rounding decides nothing."""
    params = dict(settings)
    prompt, generated = params.pop("prompt", PROMPT), params.pop("generated", GENERATED)
    case = {"name": name, "prompt": prompt, "generated": generated, "params": params}
    for attempt in itertools.count():
        logits = draw_logits([attempt, *name.encode()])
        if (result := apply(model, case, logits)) is not None:
            break
    processed, final = result
    assert (name in CHANGED) != torch.equal(final, logits), name
    greedy = processed.argmax(-1)
    lower = processed[processed < processed.max()]
    assert processed.max() - lower.max() > MARGIN, name
    assert greedy.item() == (processed[0] == processed.max()).nonzero()[0].item(), name
    arrays = {"logits": logits, "processed": processed, "final": final, "greedy": greedy.int()}
    return case, {key: value[0].numpy() for key, value in arrays.items()}


def assert_generate_agrees(model: LlamaForCausalLM) -> None:
    """Fails unless `generate` itself gets the same scores from its logits at each of 8 steps."""
    for params in (EVERYTHING, {**EVERYTHING, **FILTERS}):
        config = as_generation_config(params)
        config.update(max_new_tokens=8, output_logits=True, output_scores=True, return_dict_in_generate=True)
        prompt = torch.tensor([PROMPT])
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        assert len(output.scores) > params["min_tokens"], output.sequences
        for step, (logits, scores) in enumerate(zip(output.logits, output.scores, strict=True)):
            text = output.sequences[:, : len(PROMPT) + step]
            ours = processors_of(model, params, len(PROMPT))(text, logits)
            assert torch.equal(ours, scores) and scores.isinf().any(), (step, ours, scores)


def write_generation_config_keys(model: LlamaForCausalLM) -> None:
    config, _ = model._prepare_generation_config(None)
    defaults = config.to_dict()
    defaults["transformers_version"] = None  # `to_dict` notes the running version, which is no setting
    file = GOLDEN / "generation_config_keys.json"
    file.write_text(json.dumps(defaults, indent=1, sort_keys=True) + "\n")
    print(f"{file.name}: {len(defaults)} keys")


def main() -> None:
    torch.set_grad_enabled(False)
    warnings.simplefilter("error")
    model = tiny_model()
    assert_generate_agrees(model)
    made = [make_case(model, name, settings) for name, settings in {**CHANGED, **UNCHANGED}.items()]
    lines = ",\n ".join(json.dumps(case) for case, _ in made)
    (GOLDEN / "sampling.json").write_text(f"[\n {lines}\n]\n")
    arrays = {key: np.stack([arrays[key] for _, arrays in made]) for key in made[0][1]}
    np.savez_compressed(GOLDEN / "sampling.npz", **arrays)
    write_generation_config_keys(model)
    record_versions(["sampling"], {})
    size = sum((GOLDEN / name).stat().st_size for name in ("sampling.json", "sampling.npz"))
    print(f"sampling: {len(made)} cases, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
