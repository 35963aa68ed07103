"""What is fuzzed: each kind makes a damaged input from a valid one and gives it to the product.

A kind is a function of (random numbers, an empty folder). It returns normally if the product takes the input. It raises
`InputError` if the product refuses the input. Any other exception is a finding.
"""

import json
import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lserve_jax import AttentionConfig, SamplingParams, from_preset, load_gates, open_checkpoint, read_hf
from lserve_jax.config.errors import InputError
from lserve_jax.config.generation import not_honoured, recommended_params
from lserve_jax.config.heads import CONFIG_FILE, GATES_FILE, load_settings
from lserve_jax.engine.inputs import each_prompt, require_ids
from lserve_jax.engine.setup import prepare
from lserve_jax.runtime.adjustments import Adjustments, History
from lserve_jax.runtime.sampling import SamplingState
from lserve_jax.text.stream import TextStream
from lserve_jax.text.tokenizer import Tokenizer
from lserve_jax.weights.gguf import GGUFFile
from tests.fuzz.mutation import ODD_TEXTS, as_json, mutated_bytes, mutated_json, mutated_text, odd_value
from tests.fuzz.serving import http
from tests.lserve_jax.checkpoints import random_tensors, tiny_config, write_folder, write_gguf

type Kind = Callable[[random.Random, Path], None]

TINY = Path(__file__).parents[1] / "golden" / "tiny"
MODELS = tuple(sorted(path.name for path in TINY.iterdir() if (path / "config.json").is_file()))
VOCABULARY = 128


@cache
def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def _bytes(path: Path) -> bytes:
    return path.read_bytes()


def config_json(rng: random.Random, folder: Path) -> None:
    """A model's configuration, alone and up to the memory plan."""
    config = mutated_json(_json(TINY / rng.choice(MODELS) / "config.json"), rng)
    if rng.random() < 0.5:
        (folder / "config.json").write_bytes(as_json(config, rng))
        prepare(str(folder), max_model_len=64)
        return
    if not isinstance(config, dict):
        return
    generation = mutated_json({"eos_token_id": [1, 2], "do_sample": True}, rng)
    read_hf(config, source="c", generation_config=generation if isinstance(generation, dict) else None)


def generation_config(rng: random.Random, folder: Path) -> None:
    """A model's recommended sampling settings."""
    keys = _json(TINY.parent / "generation_config_keys.json")
    value = {key: odd_value(rng) for key in rng.sample(sorted(keys), rng.randrange(1, 6))}
    value |= {"do_sample": rng.random() < 0.7}
    not_honoured(value, 4096)
    recommended_params(value, source=str(folder))


@cache
def _safetensors() -> bytes:
    folder = TINY / "llama3"
    return _bytes(folder / "model.safetensors")


def safetensors(rng: random.Random, folder: Path) -> None:
    """A file of weights, its header above all."""
    model = TINY / "llama3"
    data = _safetensors()
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        header = as_json(mutated_json(json.loads(data[8 : 8 + size]), rng), rng)
        data = len(header).to_bytes(8, "little") + header + data[8 + size :]
    else:
        data = mutated_bytes(data, rng, size + 8)
    (folder / "config.json").write_bytes(_bytes(model / "config.json"))
    (folder / "model.safetensors").write_bytes(data)
    open_checkpoint(str(folder)).load_params("float32")


def shards(rng: random.Random, folder: Path) -> None:
    """The index of weights in several files."""
    config = tiny_config(num_hidden_layers=1)
    write_folder(folder, config, random_tensors(config), shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_bytes(as_json(mutated_json(json.loads(index.read_text()), rng), rng))
    open_checkpoint(str(folder)).load_params("float32")


@cache
def _gguf(kind: str) -> bytes:
    config = tiny_config(num_hidden_layers=1, hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    tokens = ["<unk>", "<s>", "</s>", *(chr(33 + at) for at in range(37))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(at) for at in range(40)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * 37],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        return write_gguf(path, config, random_tensors(config), kind=kind, metadata=metadata).read_bytes()


def gguf(rng: random.Random, folder: Path) -> None:
    """A GGUF file: metadata, tensors, tokenizer."""
    path = folder / "damaged.gguf"
    path.write_bytes(mutated_bytes(_gguf(rng.choice(["F32", "Q8_0", "Q4_0"])), rng, 4500))
    checkpoint = open_checkpoint(str(path))
    Tokenizer.from_gguf(GGUFFile(path).metadata).encode("abc")
    checkpoint.load_params("float32")


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def tokenizer(rng: random.Random, folder: Path) -> None:
    """A tokenizer's files, then a text and a conversation through it."""
    source = TINY / rng.choice(["llama3", "qwen2"])
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            (folder / name).write_bytes(_bytes(source / name))
    name = rng.choice(_TOKENIZER_FILES)
    if (folder / name).is_file():
        (folder / name).write_bytes(as_json(mutated_json(_json(source / name), rng), rng))
    found = Tokenizer.from_folder(folder)
    ids = found.encode(mutated_text("Hello, world!", rng)) if rng.random() < 0.5 else found.encode("ab cd")
    found.decode(ids)
    if found.chat_template is not None:
        found.apply_chat_template([{"role": "user", "content": "hi"}])


_TEMPLATES = (
    """{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}</s>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}""",
    """{{ bos_token }}{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}
{%- if m['role'] == 'user' -%}{{ '[INST] ' + m['content'] + ' [/INST]' }}{%- else -%}
{{ m['content'] ~ eos_token }}{%- endif -%}{%- endfor -%}""",
    """{% macro show(x, n) %}{{ x | string | replace('a', 'b' * n) }}{% endmacro %}
{% for m in messages %}{{ show(m.content, loop.index) }}{{ m | tojson(indent=2) }}{% endfor %}""",
)
_PIECES = (
    "{{ messages | tojson }}",
    "{% set x = 'a' * 1000 %}",
    "{{ x * x }}",
    "{{ '%999999d' | format(1) }}",
    "{% for i in range(100000) %}a{% endfor %}",
    "{{ ''.__class__ }}",
    "{{ messages | sort }}",
    "{{ 2 ** 99999 }}",
    "{% set x = x + x %}",
    "{{ x.split('a') | join('b') }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ self }}",
    "{{ cycler }}",
    "{% if x in x %}",
    "{{ x[::-1] | upper | title | list | length }}",
    "{{ messages | map(attribute='content') | list }}",
    "{% endif %}",
)


def template(rng: random.Random, folder: Path) -> None:
    """A chat template, hostile at times."""
    text = rng.choice(_TEMPLATES)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(_PIECES) + text[at:]
    if rng.random() < 0.5:
        text = mutated_text(text, rng)
    found = _tokenizer_with(folder, text)
    found.apply_chat_template(_messages(rng))


def _tokenizer_with(folder: Path, template: str) -> Tokenizer:
    source = TINY / "llama3"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(_bytes(source / name))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8", errors="replace", newline="")
    return Tokenizer.from_folder(folder)


def _messages(rng: random.Random) -> Any:
    messages: list[Any] = [{"role": rng.choice(["user", "assistant", "system"]), "content": "aba </s> b"}]
    if rng.random() < 0.5:
        messages.append({"role": "user", "content": mutated_text("Hello, <s> world", rng)})
    return mutated_json(messages, rng) if rng.random() < 0.4 else messages


@cache
def _tiny_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TINY / "llama3")


def prompt(rng: random.Random, folder: Path) -> None:
    """Prompts of any kind, conversations, and text streams of any tokens."""
    del folder
    found = _tiny_tokenizer()
    choice = rng.randrange(4)
    if choice == 0:
        values = [odd_value(rng), b"hi", np.arange(3), np.float32(1.5), (1, 2), {1, 2}, iter([1]), np.zeros((2, 2)), ""]
        for one in each_prompt(rng.choice([rng.choice(values), [rng.choice(values)]])):
            require_ids(found.encode(one) if isinstance(one, str) else one, VOCABULARY)
    elif choice == 1:
        text = "".join(rng.choice([*ODD_TEXTS, "word ", "é", "\n"]) for _ in range(rng.randrange(12)))
        found.decode(found.encode(text))
    elif choice == 2:
        found.apply_chat_template(_messages(rng))
    else:
        stops = [text for text in rng.sample(ODD_TEXTS, 3) if text]
        stream = TextStream(found, stop=stops)
        for _ in range(30):
            stream.push(rng.randrange(VOCABULARY))
        stream.finish()


_FIELDS = tuple(SamplingParams.__dataclass_fields__)


_PLAUSIBLE: dict[str, tuple[Any, ...]] = {
    "max_tokens": (1, 20, 10**9),
    "temperature": (0.0, 0.7, 1, 100.0),
    "top_p": (0.1, 1),
    "repetition_penalty": (0.5, 1, 1.3),
    "logit_bias": ({}, {5: 1.5}, [(5, -1), (127, float("-inf"))]),
    "suppress_tokens": ((), [5, 127]),
    "begin_suppress_tokens": ((), [5, 127]),
    "stop_token_ids": ((), [5, 127], list(range(128))),
    "bad_words": ((), [[5], [6, 7]], [[1, 2, 3, 4]]),
    "stop": ((), "a", ["a", "b"]),
    "ignore_eos": (True, False),
    "skip_special_tokens": (True, False),
    "logprobs": (True,),
    "prompt_logprobs": (True,),
}


def sampling(rng: random.Random, folder: Path) -> None:
    """Sampling settings, and attention settings."""
    del folder
    if rng.random() < 0.6:
        values: dict[str, Any] = {name: rng.choice(_PLAUSIBLE.get(name, (0, 1))) for name in rng.sample(_FIELDS, 4)}
        values |= {name: odd_value(rng) for name in rng.sample(_FIELDS, rng.randrange(3))}
        params = SamplingParams(**values)
        params.require_vocabulary(VOCABULARY)
        SamplingState.from_params([params, None])
        Adjustments.of([History(params, (1, 2), [3]), None], VOCABULARY)
        return
    names = sorted(AttentionConfig.__dataclass_fields__.keys() - {"preset"})
    fields: dict[str, Any] = {name: odd_value(rng) for name in rng.sample(names, 2)}
    from_preset(rng.choice(["lserve", "dense", "quest"]), **fields)


def pattern(rng: random.Random, folder: Path) -> None:
    """A head pattern: gates and settings."""
    gates = "\n".join("\t".join(f"{rng.random():.3f}" for _ in range(2)) for _ in range(2)) + "\n"
    (folder / GATES_FILE).write_text(mutated_text(gates, rng), encoding="utf-8", errors="replace", newline="")
    settings = {"sink_size": 64, "recent_size": 64, "attention": {"sink": 64, "local": 64, "prefill_local": 64}}
    (folder / CONFIG_FILE).write_bytes(as_json(mutated_json(settings, rng), rng))
    load_settings(folder)
    load_gates(folder, 2, 2)
    prepare(str(TINY / "llama3"), head_pattern=folder, max_model_len=64)


KINDS: dict[str, Kind] = {
    "config": config_json,
    "generation": generation_config,
    "safetensors": safetensors,
    "shards": shards,
    "gguf": gguf,
    "tokenizer": tokenizer,
    "template": template,
    "prompt": prompt,
    "sampling": sampling,
    "pattern": pattern,
    "http": http,
}


def outcome(kind: str, seed: int, folder: Path) -> str:
    """Returns "taken", or the line with which the product refuses the input of one kind and seed."""
    try:
        KINDS[kind](random.Random(f"{kind} {seed}"), folder)
    except InputError as error:
        line = str(error)
        if not line.strip() or "\n" in line or len(line) > 4100:
            raise AssertionError(f"{kind} {seed}: not one line that can be read: {line!r:.500}") from error
        return line
    return "taken"
