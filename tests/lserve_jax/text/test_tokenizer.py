import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from lserve_jax.config.errors import InputError
from lserve_jax.text import literals
from lserve_jax.text.tokenizer import Tokenizer

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "tokenizer_ids.json").read_text())
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIALS = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


@cache
def metadata(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


@pytest.fixture
def embedded(embedded_gguf: Path) -> Tokenizer:
    return Tokenizer.from_gguf(metadata(embedded_gguf), source=embedded_gguf.name)


def tiny_backend() -> tokenizers.Tokenizer:
    """Letters, digits and punctuation one by one, spaces as marks; `<|end|>` takes the blanks behind it."""
    letters = [chr(code) for code in range(33, 127)] + ["▁", "\n", "é"]
    vocab = {letter: index for index, letter in enumerate([*letters, "<unk>", "<s>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, rstrip=text == "<|end|>") for text in SPECIALS]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def tiny(chat_template: str | None = CHATML) -> Tokenizer:
    special = {"bos_token": "<s>", "eos_token": "<|end|>"}
    return Tokenizer(
        tiny_backend(), special_tokens=special, eos_token_ids=[5], chat_template=chat_template, source="tiny"
    )


def write_folder(folder: Path, **files: object) -> Path:
    """A folder of files by their names without suffix; a value that is no string is written as JSON."""
    suffixes = {"chat_template": ".jinja"}
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / (name + suffixes.get(name, ".json"))).write_text(text)
    return folder


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


# The embedded model


@pytest.mark.parity
@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda case: ascii(case["text"])[:30])
def test_the_embedded_tokenizer_gives_llama_cpps_ids(embedded: Tokenizer, case: dict[str, Any]):
    assert embedded.encode(case["text"]) == case["ids"]
    assert embedded.decode(case["ids"], skip_special_tokens=False) == case["text"]


@pytest.mark.parity
@pytest.mark.parametrize("case", GOLDEN["chats"], ids=range(len(GOLDEN["chats"])))
def test_the_embedded_chat_template_gives_llama_cpps_ids(embedded: Tokenizer, case: dict[str, Any]):
    assert embedded.apply_chat_template(case["messages"]) == case["ids"]


def test_the_embedded_tokenizer_knows_its_ends(embedded: Tokenizer):
    assert embedded.eos_token_ids == (2,)
    assert embedded.bos_token_id == 1
    assert embedded.vocab_size == 49152
    assert embedded.chat_template is not None


def test_the_embedded_tokenizer_survives_saving(embedded: Tokenizer, tmp_path: Path):
    embedded.save(tmp_path / "new")
    again = Tokenizer.from_folder(tmp_path / "new")
    for case in GOLDEN["texts"]:
        assert again.encode(case["text"]) == case["ids"]
    for case in GOLDEN["chats"]:
        assert again.apply_chat_template(case["messages"]) == case["ids"]
    assert again.eos_token_ids == embedded.eos_token_ids
    assert again.bos_token_id == embedded.bos_token_id
    assert again.vocab_size == embedded.vocab_size


@settings(max_examples=30)
@given(text=st.text(st.characters(max_codepoint=0x2FFFF, exclude_categories=["Cc", "Cs"]), max_size=40))
def test_every_text_comes_back_from_its_ids(embedded_gguf: Path, text: str):
    tokenizer = _embedded_once(embedded_gguf)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@cache
def _embedded_once(path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(metadata(path))


# Special tokens in prompts and in messages


def test_a_prompt_means_special_tokens_and_starts_with_the_beginning_token():
    tokenizer = tiny()
    bos, end = tokenizer.bos_token_id, tokenizer.encode("<|end|>", add_special_tokens=False)
    assert tokenizer.encode("a<|end|>") == [bos, *tokenizer.encode("a", add_special_tokens=False), *end]
    assert len(end) == 1
    assert tokenizer.decode(tokenizer.encode("hi there<|end|>")) == "hi there"
    assert tokenizer.decode(tokenizer.encode("a<|end|>"), skip_special_tokens=False) == "<s> a<|end|>"


def test_an_ordinary_conversation_is_encoded_as_it_is_rendered():
    tokenizer = tiny()
    messages = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "hi\nyou > <"}]
    rendered = "<s><|system|>\nbe brief<|end|>\n<|user|>\nhi\nyou > <<|end|>\n<|assistant|>\n"
    assert tokenizer.apply_chat_template(messages) == tokenizer.encode(rendered, add_special_tokens=False)
    rendered = rendered.removesuffix("<|assistant|>\n")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert ids == tokenizer.encode(rendered, add_special_tokens=False)


def test_the_template_alone_writes_the_beginning_token():
    bos = tiny().encode("")[0]
    assert bos == tiny().bos_token_id
    assert tiny().apply_chat_template(user("hi")).count(bos) == 1
    assert tiny(CHATML.replace("{{ bos_token }}", "")).apply_chat_template(user("hi")).count(bos) == 0


def test_a_text_that_repeats_the_beginning_token_is_warned_of_once_and_encoded_as_it_is(
    caplog: pytest.LogCaptureFixture,
):
    tokenizer, bos = tiny(), tiny().bos_token_id
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        tokenizer.encode("hi <s>")
        tokenizer.encode("<s>hi", add_special_tokens=False)
        tokenizer.encode("")
        tokenizer.apply_chat_template(user("hi"))
        assert not caplog.records
        for _ in range(2):
            assert tokenizer.encode("<s>hi")[:3] == [bos, bos, tokenizer.encode("hi")[1]]
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "tiny: the prompt begins with <s>, which is added to every prompt, so that it"
    )


def test_a_rendered_chat_that_is_given_as_text_is_warned_of(caplog: pytest.LogCaptureFixture):
    tokenizer = tiny()
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        tokenizer.encode(tokenizer.render_chat(user("hi")))
    assert "a chat is best given as messages" in caplog.text


def test_a_tokenizer_that_adds_nothing_or_only_an_end_warns_of_nothing(caplog: pytest.LogCaptureFixture):
    for ends in (None, processors.TemplateProcessing(single="$A <s>", special_tokens=[("<s>", 98)])):
        backend = tiny_backend()
        backend.post_processor = ends
        tokenizer = Tokenizer(backend, special_tokens={}, eos_token_ids=[], chat_template=None, source="x")
        with caplog.at_level(logging.WARNING, "lserve_jax"):
            tokenizer.encode("<s><s>a")
    assert not caplog.records


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("form", ["{}", "a {} b", "{}{}", "  {}  ", "x{}"])
def test_a_special_token_in_a_message_is_text(special: str, form: str):
    tokenizer = tiny()
    control = [tokenizer.encode(text, add_special_tokens=False)[0] for text in SPECIALS]
    text = form.replace("{}", special)
    ids = tokenizer.apply_chat_template(user(text))
    assert [index for index in ids if index in control] == [
        index for index in tokenizer.apply_chat_template(user("plain")) if index in control
    ]
    # Spelled letter by letter, as the same text would be if the tokenizer had no special tokens.
    assert text.strip() in tokenizer.decode([index for index in ids if index not in control])


def test_two_parts_cannot_make_a_special_token_together():
    tokenizer = tiny("{% for m in messages %}{{ m.content }}{{ m.more }}{% endfor %}")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "<|e", "more": "nd|>"}])
    assert ids == tokenizer.apply_chat_template([{"role": "user", "content": "<|end|>", "more": ""}])
    assert len(ids) == len("▁<|end|>")


def test_a_role_may_be_part_of_a_special_token_that_the_template_writes():
    # As in CHATML above, where <|user|> is made of the role.
    tokenizer = tiny()
    control = tokenizer.encode("<|user|>", add_special_tokens=False)[0]
    assert control in tokenizer.apply_chat_template(user("hi"))


@settings(max_examples=40)
@given(parts=st.lists(st.sampled_from([*SPECIALS, "<|", "|>", "<", ">", "s", "end", "a", " ", "\n"]), max_size=8))
def test_no_message_writes_a_control_token(parts: list[str]):
    tokenizer, text = TINY, "".join(parts)
    control = {tokenizer.encode(special, add_special_tokens=False)[0] for special in SPECIALS}
    ids = tokenizer.apply_chat_template([*user(text), {"role": "assistant", "content": text}])
    plain = tokenizer.apply_chat_template([*user("a"), {"role": "assistant", "content": "a"}])
    assert [index for index in ids if index in control] == [index for index in plain if index in control]


TINY = tiny()


def test_threads_that_encode_their_first_conversations_together_get_the_same(monkeypatch: pytest.MonkeyPatch):
    def slow_dumps(value: Any) -> str:
        time.sleep(0.02)  # the others get here meanwhile, if they can
        return json.dumps(value)

    monkeypatch.setattr(literals, "json", SimpleNamespace(loads=json.loads, dumps=slow_dumps))
    tokenizer, start = tiny(), threading.Barrier(8)

    def encode(_: int) -> list[int]:
        start.wait(60)
        return tokenizer.apply_chat_template(user("a<|end|>b"))

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(encode, range(8)))
    assert found == [tiny().apply_chat_template(user("a<|end|>b"))] * 8


def test_literal_special_tokens_work_whatever_the_model_behind():
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("a", -1.0), ("<", -1.0), ("s", -1.0), (">", -1.0)]
    unigram = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0))
    words = tokenizers.Tokenizer(
        models.WordLevel({text: index for index, (text, _) in enumerate(vocab)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    for backend in (unigram, words):
        backend.add_special_tokens(["<s>"])
        template = "{{ bos_token }}{{ messages[0].content }}"
        tokenizer = Tokenizer(
            backend, special_tokens={"bos_token": "<s>"}, eos_token_ids=[], chat_template=template, source="x"
        )
        assert tokenizer.apply_chat_template(user("a<s>")) == [1, 2, 3, 4, 5]


# Folders


def test_a_folder_gives_its_special_tokens_and_template(tmp_path: Path):
    folder = write_folder(
        tmp_path,
        tokenizer=tiny_backend().to_str(),
        tokenizer_config={"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "<|end|>", "pad_token": None},
        generation_config={"eos_token_id": [7, 3]},
        chat_template=CHATML,
    )
    tokenizer = Tokenizer.from_folder(folder)
    end = tokenizer.encode("<|end|>", add_special_tokens=False)
    assert tokenizer.eos_token_ids == (7, 3, *end)
    assert tokenizer.bos_token_id == tiny().bos_token_id
    assert tokenizer.apply_chat_template(user("hi")) == tiny().apply_chat_template(user("hi"))


def test_special_tokens_may_stand_in_their_own_file(tmp_path: Path):
    special = {"bos_token": "<s>", "eos_token": {"content": "<|end|>"}}
    folder = write_folder(tmp_path, tokenizer=tiny_backend().to_str(), special_tokens_map=special)
    tokenizer = Tokenizer.from_folder(str(folder))
    assert tokenizer.bos_token_id == tiny().bos_token_id
    assert tokenizer.eos_token_ids == tuple(tokenizer.encode("<|end|>", add_special_tokens=False))
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    "config",
    [CHATML, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]],
    ids=["text", "list"],
)
def test_a_template_in_the_configuration_is_used_unless_a_file_has_one(tmp_path: Path, config: object):
    own = {"chat_template": config, "bos_token": "<s>"}
    folder = write_folder(tmp_path, tokenizer=tiny_backend().to_str(), tokenizer_config=own)
    assert Tokenizer.from_folder(folder).apply_chat_template(user("hi")) == tiny().apply_chat_template(user("hi"))
    (folder / "chat_template.jinja").write_text("file")
    ids = Tokenizer.from_folder(folder).apply_chat_template(user("hi"))
    assert ids == tiny("file").apply_chat_template(user("hi"))


def test_a_template_of_a_json_file_goes_before_the_configurations_and_after_the_file_of_its_own(tmp_path: Path):
    folder = write_folder(tmp_path, tokenizer=tiny_backend().to_str(), tokenizer_config={"chat_template": "c"})
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert Tokenizer.from_folder(folder).chat_template == "json"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_folder(folder).chat_template == "file"


def test_templates_have_names_in_lists_and_in_a_folder_of_their_own(tmp_path: Path):
    named = [{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "{{ tools | length }}"}]
    folder = write_folder(tmp_path, tokenizer=tiny_backend().to_str(), tokenizer_config={"chat_template": named})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text("s")
    tokenizer = Tokenizer.from_folder(folder)
    assert list(tokenizer.chat_templates) == ["rag", "tool_use", "short"]
    assert tokenizer.chat_template is None
    assert tokenizer.render_chat(user("hi"), chat_template="short") == "s"
    assert tokenizer.render_chat(user("hi"), tools=[{}, {}]) == "2"  # the name that transformers looks for
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}!")
    assert tokenizer.render_chat(user("hi"), chat_template=tmp_path / "own.jinja") == "hi!"
    with pytest.raises(
        InputError, match="chat templates are rag, tool_use, short, and none is the default; choose one"
    ):
        tokenizer.apply_chat_template(user("hi"))
    with pytest.raises(InputError, match=r"'rog' is neither a name \(its chat templates are rag, .*\) nor a file"):
        tokenizer.apply_chat_template(user("hi"), chat_template="rog")
    tokenizer.save(tmp_path / "new")
    assert Tokenizer.from_folder(tmp_path / "new").chat_templates == tokenizer.chat_templates


def test_a_template_file_that_is_no_text_or_no_template_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(InputError, match=rf"^{tmp_path}/bytes: cannot be read: "):
        tiny().apply_chat_template(user("hi"), chat_template=str(tmp_path / "bytes"))
    (tmp_path / "wrong").write_text("{% if %}")
    with pytest.raises(InputError, match="the chat template is not valid Jinja"):
        tiny().apply_chat_template(user("hi"), chat_template=str(tmp_path / "wrong"))


def test_tokens_that_only_the_configuration_adds_are_added(tmp_path: Path):
    backend = tiny_backend()
    size = backend.get_vocab_size()
    decoder = {str(size): {"content": "<|new|>", "special": True}, str(size + 1): {"content": "<tool>"}}
    folder = write_folder(tmp_path, tokenizer=backend.to_str(), tokenizer_config={"added_tokens_decoder": decoder})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<|new|><tool>", add_special_tokens=False) == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == "<tool>"


def test_truncation_and_padding_of_the_file_are_not_taken_over(tmp_path: Path):
    backend = tiny_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer=backend.to_str()))
    assert len(tokenizer.encode("abc", add_special_tokens=False)) == 4
    assert len(tokenizer.encode("abcdefghij", add_special_tokens=False)) == 11


def test_saving_keeps_everything(tmp_path: Path):
    special = {"bos_token": "<s>", "eos_token": "<|end|>"}
    first = Tokenizer(
        tiny_backend(), special_tokens=special, eos_token_ids=[9, 2], chat_template=CHATML, source="first"
    )
    first.save(tmp_path / "a" / "b")
    again = Tokenizer.from_folder(tmp_path / "a" / "b")
    assert again.apply_chat_template(user("a<s>")) == first.apply_chat_template(user("a<s>"))
    assert again.encode("a <|end|> b") == first.encode("a <|end|> b")
    assert again.eos_token_ids[:2] == (9, 2)
    again.save(tmp_path / "c")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        once = json.loads((tmp_path / "a" / "b" / name).read_text())
        twice = json.loads((tmp_path / "c" / name).read_text())
        assert once | {"eos_token_ids": 0} == twice | {"eos_token_ids": 0}


def test_a_tokenizer_without_end_tokens_is_saved_and_read(tmp_path: Path):
    first = Tokenizer(tiny_backend(), special_tokens={}, eos_token_ids=[], chat_template=None, source="first")
    first.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == ()


def test_end_tokens_that_are_whole_floats_are_read_as_the_models_configuration_is(tmp_path: Path):
    ends = {"generation_config": {"eos_token_id": 2.0}, "tokenizer_config": {"eos_token_ids": [3.0, 2]}}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer=tiny_backend().to_str(), **ends))
    assert tokenizer.eos_token_ids == (2, 3)
    assert all(type(token) is int for token in tokenizer.eos_token_ids)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "tokenizer.json is missing"),
        ({"tokenizer": "{"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer": "[]"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer": {"model": {"type": "BPE"}}}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer_config": "{"}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer_config": "[" * 100_000}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer_config": []}, "tokenizer_config.json: must hold a JSON object, got list"),
        ({"tokenizer_config": {"eos_token": 3}}, "tokenizer_config.json: eos_token must be a string"),
        ({"tokenizer_config": {"eos_token": "<no>"}}, "eos_token '<no>' is not in tokenizer.json"),
        (
            {"tokenizer_config": {"chat_template": 3}},
            "tokenizer_config.json: chat_template must be a string, or a list",
        ),
        ({"tokenizer_config": {"chat_template": [{"name": "a"}]}}, "chat_template must be a string, or a list"),
        ({"tokenizer_config": {"chat_template": [{"name": "a", "template": "x"}] * 2}}, "with different names"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": 1}}}, "added_tokens_decoder must map ids to objects"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"9999": {"content": "<n>"}}}},
            "'<n>' does not get the id 9999",
        ),
        (
            {"generation_config": {"eos_token_id": "x"}},
            "generation_config.json: eos_token_id must be a token id or a list",
        ),
        ({"generation_config": {"eos_token_id": [1, -2]}}, "eos_token_id must be a token id or a list"),
        ({"generation_config": {"eos_token_id": 2**31}}, "eos_token_id must be a token id or a list"),
        (
            {"tokenizer_config": {"eos_token_ids": [1.5]}},
            "tokenizer_config.json: eos_token_ids must be a token id or a",
        ),
    ],
)
def test_a_bad_folder_gives_one_line_that_names_the_file(tmp_path: Path, files: dict[str, object], message: str):
    if files and "tokenizer" not in files:
        files = {"tokenizer": tiny_backend().to_str(), **files}
    with pytest.raises(ValueError, match="cannot read its tokenizer") as caught:
        Tokenizer.from_folder(write_folder(tmp_path, **files))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_bad_files_are_named_at_once(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    write_folder(tmp_path, tokenizer_config="{", generation_config={"eos_token_id": 1.5})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="cannot read its tokenizer") as caught:
        Tokenizer.from_folder(tmp_path)
    for name in (
        "tokenizer.json is missing (tokenizer.model",
        "tokenizer_config",
        "generation_config",
        "chat_template",
    ):
        assert name in str(caught.value)


def test_an_unknown_token_that_the_vocabulary_lacks_is_an_error_of_the_file(tmp_path: Path):
    backend = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    backend["model"]["unk_token"] = "<unk>"
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer=backend))
    assert tokenizer.encode("aa") == [0, 0]
    with pytest.raises(ValueError, match=r"the tokenizer cannot encode a text: .*<unk>"):
        tokenizer.encode("b")


# Wrong use


@pytest.mark.parametrize("text", [3, None, b"a", "\ud800", "ok \udfff"])
def test_a_text_must_be_unicode(text: Any):
    with pytest.raises(ValueError, match="a text must be"):
        tiny().encode(text)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages must be a list of at least one"),
        ("hi", "messages must be a list of at least one"),
        ({"role": "user"}, "messages must be a list of at least one"),
        ([3], r"messages\[0\] must be a mapping with 'role' and 'content', got 3"),
        ([{"content": "hi"}], r"messages\[0\]: 'role' is missing"),
        ([{"role": 3, "content": "hi"}], r"messages\[0\]: 'role' must be a string, got 3"),
        ([*user("hi"), {"role": "user"}], r"messages\[1\]: 'content' is missing, got 'role' \(only a message with"),
        ([{"role": "user", "text": "hi"}], r"messages\[0\]: 'content' is missing, got 'role', 'text'"),
        ([{"role": "user", "content": None}], r"messages\[0\]: 'content' is None"),
        ([{"role": "assistant", "tool_calls": []}], r"messages\[0\]: 'content' is missing"),
        ([{"role": "user", "content": 3}], r"messages\[0\]: 'content' must be a text or a list of parts, got int"),
        ([{"role": "user", "content": b"hi"}], r"messages\[0\]: 'content' must be a text .*, got bytes"),
    ],
)
def test_messages_must_be_a_list_of_roles_and_contents(messages: Any, problem: str):
    with pytest.raises(InputError, match=f"^{problem}"):
        tiny().apply_chat_template(messages)


def test_a_message_must_be_unicode():
    with pytest.raises(ValueError, match="lone surrogate"):
        tiny().apply_chat_template(user("\ud800"))


def test_a_model_without_a_template_says_so():
    with pytest.raises(ValueError, match="tiny: the model has no chat template; give the prompt as plain text"):
        tiny(None).apply_chat_template(user("hi"))


def test_ids_beyond_the_vocabulary_decode_to_nothing():
    assert tiny().decode([0, 10**6, 1]) == '!"'


@pytest.mark.parametrize("form", ["text", "chat", "chat with a control token"])
def test_other_threads_run_while_a_long_text_is_encoded(form: str, embedded: Tokenizer):
    """A server's streams would stand still for seconds."""
    text = "The quick brown fox jumps over the lazy dog. " * 8000
    turns, is_over = 0, threading.Event()

    def work() -> None:
        nonlocal turns
        while not is_over.wait(0.001):
            turns += 1

    end = "<|im_end|>" if form.endswith("token") else ""
    embedded.apply_chat_template(user("hi" + end))  # what is made once has been made
    worker = threading.Thread(target=work)
    worker.start()
    try:
        begin = turns
        found = embedded.encode(text) if form == "text" else embedded.apply_chat_template(user(text + end))
        end_turns = turns
    finally:
        is_over.set()
        worker.join()
    assert len(found) > 8000
    assert end_turns - begin >= 20
