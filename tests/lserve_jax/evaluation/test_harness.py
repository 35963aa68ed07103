"""The adapter under the real lm-evaluation-harness, on tasks written here: nothing is fetched."""

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax
from tokenizers import Tokenizer as Backend

from lserve_jax import LLM, InputError, SamplingParams, harness
from lserve_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
MODEL = str(ROOT / "tests" / "golden" / "tiny" / "llama3")
SETTINGS: dict[str, Any] = {"attention": "dense", "max_model_len": 64, "prefill_chunk": 64, "max_num_seqs": 2}

DOCS = [
    {"question": "hello", "choices": [" world", " there", "?"], "gold": 1, "text": "hello there, how are you"},
    {"question": "one two", "choices": [" 3", " three", " it is three"], "gold": 2, "text": "one two three"},
    {"question": "a", "choices": ["b", "c", "d"], "gold": 0, "text": "abcdefghijklmnopqrstuvwxyz " * 5},
]
TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "tiny_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "tiny_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing may be fetched, and what the libraries keep goes where the test's files go."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks as the harness reads them: YAML (of which JSON is a part) beside their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = folder / "documents.jsonl"
    documents.write_text("".join(json.dumps(document) + "\n" for document in DOCS))
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}))
    return folder


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(MODEL, **SETTINGS)


@pytest.fixture
def lm(llm: LLM) -> Any:
    return harness.register()(llm)


def run(lm: Any, tasks: Path, *names: str, **options: Any) -> Mapping[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    evaluate: Any = lm_eval.simple_evaluate
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return evaluate(model=lm, tasks=list(names), task_manager=manager, bootstrap_iters=0, **options)


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]  # type: ignore[arg-type]


def by_logits(llm: LLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The definition: log-softmax of the logits before each token, and whether each token is the likeliest."""
    logits = log_softmax(np.asarray(llm.logits(context + continuation)), axis=-1)[len(context) - 1 : -1]
    chosen = logits[np.arange(len(continuation)), continuation]
    return float(chosen.sum()), bool((logits.argmax(-1) == continuation).all())


def test_the_harness_runs_all_kinds_of_tasks(lm: Any, llm: LLM, tasks: Path):
    results = run(lm, tasks, *TASKS)
    encode = lm.tok_encode
    for document, sample in zip(DOCS, results["samples"]["tiny_choice"], strict=True):
        expected = [by_logits(llm, encode(document["question"]), encode(choice)) for choice in document["choices"]]
        got = [response[0] for response in sample["resps"]]
        np.testing.assert_allclose([value for value, _ in got], [value for value, _ in expected], rtol=1e-4)
        assert [is_greedy for _, is_greedy in got] == [is_greedy for _, is_greedy in expected]
        assert sample["acc"] == float(np.argmax([value for value, _ in expected]) == document["gold"])
    for document, sample in zip(DOCS, results["samples"]["tiny_answer"], strict=True):
        (output,) = llm.generate(document["question"], SamplingParams(max_tokens=8, stop="\n\n"))
        assert sample["resps"] == [[output.text]]
    total = sum(response for sample in results["samples"]["tiny_text"] for response in sample["resps"][0])
    size = sum(len(document["text"]) for document in DOCS)
    got = results["results"]["tiny_text"]["byte_perplexity,none"]
    assert got == pytest.approx(math.exp(-total / size), rel=1e-6)
    assert results["config"]["attention"]["preset"] == "dense"


def test_a_text_is_scored_in_windows_each_token_once(lm: Any, llm: LLM):
    text = DOCS[2]["text"]
    ids = lm.tok_encode(text)
    assert len(ids) > 2 * llm.setup.sizes.max_model_len
    (got,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    # Windows of 64 tokens, the first of which is context; the last window is as long, and scores what is left.
    whole = [lm.prefix_token_id, *ids]
    expected, scored = 0.0, 1
    while scored < len(whole):
        end = min(scored + 63, len(whole))
        logprobs = llm.prompt_logprobs(whole[max(0, end - 64) : end])
        expected += float(logprobs[scored - end :].sum())
        scored = end
    assert got == pytest.approx(expected, rel=1e-5)


def test_answers_keep_their_order_whatever_order_they_are_computed_in(
    lm: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    pairs = [("x" * length, "y" * (1 + length % 3)) for length in (3, 40, 1, 20, 11, 33, 2, 9, 5)] * 4
    score, calls = llm.score, []
    monkeypatch.setattr(llm, "score", lambda *arguments: calls.append(arguments) or score(*arguments))
    got = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    assert len(calls) > 1
    computed = {pair: by_logits(llm, *map(lm.tok_encode, pair)) for pair in set(pairs)}
    expected = [computed[pair] for pair in pairs]
    np.testing.assert_allclose([value for value, _ in got], [value for value, _ in expected], rtol=1e-4)
    settings = {"until": [], "max_gen_toks": 4}
    texts = lm.generate_until(instances("generate_until", *((a, settings) for a, _ in pairs)), disable_tqdm=True)
    outputs = llm.generate([a for a, _ in pairs], SamplingParams(max_tokens=4))
    assert texts == [output.text for output in outputs]


def test_an_empty_context_is_the_beginning_token(lm: Any, llm: LLM):
    (got,) = lm.loglikelihood(instances("loglikelihood", ("", "hello")), disable_tqdm=True)
    assert lm.prefix_token_id == llm.tokenizer.bos_token_id == 1  # type: ignore[union-attr]
    assert got[0] == pytest.approx(by_logits(llm, [1], lm.tok_encode("hello"))[0], rel=1e-4)


def test_a_greedy_continuation_is_said_to_be_greedy(lm: Any, llm: LLM):
    (output,) = llm.generate([lm.tok_encode("hello there")], SamplingParams(max_tokens=5, ignore_eos=True))
    ((value, is_greedy),) = lm._loglikelihood_tokens([(None, lm.tok_encode("hello there"), list(output.token_ids))])
    assert is_greedy
    assert value < 0


def test_page_selection_is_at_work_where_continuations_are_scored(lm: Any):
    sizes = {"page_size": 4, "sub_page_size": 4, "token_budget": 16, "sink": 4, "dense_layers": ()}
    sparse = LLM(MODEL, **SETTINGS | {"attention": "quest"}, **sizes)
    pairs = instances("loglikelihood", ("abcdefgh" * 5, "xyz" * 4))
    (dense,) = lm.loglikelihood(pairs, disable_tqdm=True)
    (got,) = harness.register()(sparse).loglikelihood(pairs, disable_tqdm=True)
    (output,) = sparse.score([lm.tok_encode("abcdefgh" * 5)], [lm.tok_encode("xyz" * 4)])
    assert got[0] == pytest.approx(sum(output.logprobs))
    assert abs(got[0] - dense[0]) > 1e-3


def test_contexts_that_are_too_long_lose_their_beginning(lm: Any, llm: LLM, caplog: pytest.LogCaptureFixture):
    text = "".join(chr(97 + i % 26) for i in range(100))
    ids = lm.tok_encode(text)
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        (got,) = lm.loglikelihood(instances("loglikelihood", (text, "xyz")), disable_tqdm=True)
        (answer,) = lm.generate_until(instances("generate_until", (text, {"max_gen_toks": 6})), disable_tqdm=True)
    assert got[0] == pytest.approx(by_logits(llm, ids[-61:], lm.tok_encode("xyz"))[0], rel=1e-4)
    assert answer == llm.generate([ids[-58:]], SamplingParams(max_tokens=6))[0].text
    cut = "1 of 1 contexts are too long for max_model_len=64 and lose their beginning (the longest has 100 tokens)"
    assert [record.message for record in caplog.records] == [cut, cut]


@pytest.mark.parametrize(
    ("kind", "arguments", "problem"),
    [
        ("loglikelihood", ("a", "b" * 64), r"a continuation has 64 tokens, but max_model_len is 64: raise it"),
        ("loglikelihood", ("a b", ""), r"a continuation adds no token to its context"),
        ("generate_until", ("a", {"max_gen_toks": 64}), r"an answer of max_gen_toks=64 leaves no room for its context"),
        (
            "generate_until",
            ("a", {"num_beams": 4}),
            r"unknown generation setting num_beams; known are do_sample, frequency_penalty, max_gen",
        ),
        (
            "generate_until",
            ("a", {"temperature": 1.0, "top_p": 2}),
            r"top_p must be a number above 0 and up to 1, got 2",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(lm: Any, kind: str, arguments: tuple[Any, ...], problem: str):
    with pytest.raises(ValueError, match=problem) as caught:
        getattr(lm, kind)(instances(kind, arguments), disable_tqdm=True)
    assert "\n" not in str(caught.value)


def test_generation_settings_become_ours(lm: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch):
    def params_of(settings: dict[str, Any]) -> SamplingParams:
        lm.generate_until(instances("generate_until", ("hello", settings)), disable_tqdm=True)
        return asked.pop()

    asked: list[SamplingParams] = []
    generate = llm.generate

    def recording(prompts: Any, params: Any) -> Any:
        asked.extend(params)
        return generate(prompts, params)

    monkeypatch.setattr(llm, "generate", recording)
    given = {"until": ["\n", "<|im_end|>", ""], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5}
    params = params_of(given | {"max_new_tokens": 9, "num_beams": 1})
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.7, 0.9, 5, 9)
    assert params.stop == ("\n", "<|im_end|>")
    assert given["until"] == ["\n", "<|im_end|>", ""]
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    params = params_of({"until": "x", "max_gen_toks": 5} | penalties)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.2, 0.5, -0.5)
    greedy = params_of({"until": "x", "max_gen_toks": 5, "do_sample": False, "temperature": 0.0})
    assert (greedy.temperature, greedy.stop, greedy.max_tokens) == (0.0, ("x",), 5)
    with pytest.raises(ValueError, match="an answer of max_gen_toks=256 leaves no room"):
        params_of({"until": "x"})


def test_draws_follow_the_harness_seed(lm: Any, tasks: Path):
    def texts(seed: int) -> list[Any]:
        settings = {"do_sample": True, "temperature": 2.0}
        results = run(lm, tasks, "tiny_answer", gen_kwargs=settings, random_seed=seed)
        return [sample["resps"] for sample in results["samples"]["tiny_answer"]]

    assert texts(1) == texts(1) != texts(2)


def test_an_answer_ends_before_its_stop_string(lm: Any, llm: LLM):
    whole = llm.generate("hello there", SamplingParams(max_tokens=12))[0].text
    stop = whole[4]
    settings = {"until": [stop], "max_gen_toks": 12}
    (text,) = lm.generate_until(instances("generate_until", ("hello there", settings)), disable_tqdm=True)
    assert text == whole[: whole.index(stop)]


def test_chats_are_rendered_as_the_checkpoint_has_them(lm: Any, llm: LLM, tasks: Path):
    chat = [{"role": "user", "content": "hello"}]
    text = lm.apply_chat_template(chat)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert lm.tok_encode(text) == llm.render_chat(chat)
    begun = [*chat, {"role": "assistant", "content": "It is "}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False).endswith("assistant\nIt is ")
    assert lm.chat_template(True).startswith("{% for message in messages %}")
    results = run(lm, tasks, "tiny_answer", apply_chat_template=True)
    for document, sample in zip(DOCS, results["samples"]["tiny_answer"], strict=True):
        prompt = llm.render_chat([{"role": "user", "content": document["question"]}])
        assert sample["resps"] == [[llm.generate([prompt], SamplingParams(max_tokens=8))[0].text]]


@pytest.fixture
def with_templates(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes the adapter of a model with these chat templates."""

    def make(**templates: str) -> Any:
        backend = Backend.from_file(f"{MODEL}/tokenizer.json")
        own = Tokenizer(backend, special_tokens={}, eos_token_ids=[], chat_template=templates, source="tiny")
        monkeypatch.setattr(llm, "tokenizer", own)
        return harness.register()(llm)

    return make


REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "{% if messages[0].content == 'bad' %}{{ raise_exception('bad') }}{% endif %}"
    "{{ messages[-1].content[:5] }}"
)
SYSTEM = {"role": "system", "content": "Be brief."}


def test_a_template_that_refuses_system_messages_gets_none(
    with_templates: Callable[..., Any], caplog: pytest.LogCaptureFixture
):
    lm, chat = with_templates(default=REFUSING), [{"role": "user", "content": "hello"}]
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        told = lm.apply_chat_template([SYSTEM, *chat])
    assert told == lm.apply_chat_template(chat) == "hello"
    assert "refuses the system message" in caplog.text


def test_a_system_message_stays_if_something_else_is_wrong(
    with_templates: Callable[..., Any], caplog: pytest.LogCaptureFixture
):
    def problem(template: str, text: str, **options: Any) -> str:
        lm = with_templates(default=template)
        with pytest.raises(InputError) as caught:
            lm.apply_chat_template([SYSTEM, {"role": "user", "content": text}], **options)
        return str(caught.value)

    failing = "{% if messages[0].role == 'system' %}{{ nothing.at_all }}{% endif %}"
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        assert "the chat template failed: bad" in problem(REFUSING, "bad")
        assert "'nothing' is undefined" in problem(failing, "hello")
        begun = problem("{{ messages[-1].content[:5] }}", "a long answer", add_generation_prompt=False)
        assert "does not write the last message as it is, so that it cannot be continued" in begun
    assert not caplog.records


def test_one_of_several_templates_is_chosen_by_its_name(with_templates: Callable[..., Any], llm: LLM):
    lm, chat = with_templates(default="d", tool_use="t"), [{"role": "user", "content": "hello"}]
    for asked, source, text in ((True, "d", "d"), ("tool_use", "t", "t"), ("default", "d", "d"), (False, None, "d")):
        assert lm.chat_template(asked) == source
        assert lm.apply_chat_template(chat) == text
    names = set()
    for asked in (True, "tool_use"):
        lm.chat_template(asked)
        names.add(lm.tokenizer_name)
    assert len(names) == 2  # the harness's caches of prompts
    rag = with_templates(rag="r")
    for asked, name in (("tool_use", "tool_use"), (True, "default")):
        with pytest.raises(InputError, match=f"has no chat template '{name}': its templates are rag .--apply_chat_t"):
            rag.chat_template(asked)
    with pytest.raises(InputError, match="has no chat template 'default': its templates are none"):
        with_templates().chat_template(True)


def test_a_text_that_begins_with_the_beginning_token_gets_no_second_one(
    lm: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    assert llm.tokenizer is not None
    begin, flags = llm.tokenizer.decode([lm.prefix_token_id], skip_special_tokens=False), []

    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        flags.append(add_special_tokens)
        return [1]

    monkeypatch.setattr(llm.tokenizer, "encode", encode)
    lm.tok_encode("hello")
    lm.tok_encode(f"{begin}hello")
    lm.tok_encode("hello", add_special_tokens=False)
    assert flags == [True, False, False]


def test_results_are_kept_as_they_come_and_not_computed_again(
    lm: Any, llm: LLM, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = run(lm, tasks, *TASKS, use_cache=str(tmp_path / "answers"))

    def fail(*arguments: Any) -> None:
        raise AssertionError("computed again")

    for name in ("score", "generate", "prompt_logprobs"):
        monkeypatch.setattr(llm, name, fail)
    again = run(harness.register()(llm), tasks, *TASKS, use_cache=str(tmp_path / "answers"))
    assert again["results"] == first["results"]


def test_each_call_saves_its_results(lm: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """An evaluation that is stopped keeps what it had: the hook hears of every call's results."""
    kept: list[Any] = []
    monkeypatch.setattr(lm, "cache_hook", type("Hook", (), {"add_partial": lambda self, *row: kept.append(row)})())
    score, calls = llm.score, []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("stopped")
        return score(*arguments)

    monkeypatch.setattr(llm, "score", failing)
    with pytest.raises(RuntimeError, match="stopped"):
        lm.loglikelihood(instances("loglikelihood", *(("a" * n, "d") for n in range(1, 40))), disable_tqdm=True)
    assert kept and len(kept) == len(calls[0][0])
    assert [(kind, key) for kind, key, _ in kept] == [
        ("loglikelihood", ("a" * n, "d")) for n in range(39, 39 - len(kept), -1)
    ]
    asked = ("abc", {"until": ["\n"], "max_gen_toks": 4})
    (text,) = lm.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert kept[-1] == ("generate_until", asked, text)


def test_model_arguments_make_the_model():
    make = harness.register().create_from_arg_obj
    settings = {name: value for name, value in SETTINGS.items() if name != "max_num_seqs"}
    lm = make(
        {"model": MODEL, **settings, "attention": "lserve", "kv_dtype": "int8", "weight_dtype": "int4"},
        {"batch_size": 3, "device": "cuda"},
    )
    assert lm.llm.setup.sizes.max_num_seqs == 3
    assert lm.get_model_info()["kv_dtype"] == "int8"
    assert lm.get_model_info()["weights"] == "int4 in groups of 32, int8, int4 in groups of 16"
    assert lm.tokenizer_name.endswith("__llama3")
    with pytest.raises(ValueError, match=r"unknown attention option pretrained; known are"):
        make({"pretrained": MODEL})


def test_the_command_line_is_the_harness_with_our_model(tasks: Path, tmp_path: Path):
    command = [sys.executable, "-m", "lserve_jax.harness", "--model_args", f"model={MODEL},max_model_len=64"]
    command += ["--tasks", str(tasks / "tiny_choice.yaml"), "--output_path", str(tmp_path), "--limit", "2"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout
    (path,) = tmp_path.rglob("results_*.json")
    results = json.loads(path.read_text())
    assert results["config"]["model"] == "lserve_jax"
    assert results["config"]["attention"]["preset"] == "lserve"
    assert results["n-samples"]["tiny_choice"]["effective"] == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tasks", "x"], ["run", "--model", "lserve_jax", "--tasks", "x"]),
        (["run", "--tasks", "x"], ["run", "--model", "lserve_jax", "--tasks", "x"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        ([], ["--help"]),
    ],
)
def test_runs_name_our_model(arguments: list[str], expected: list[str]):
    assert harness.with_model(arguments) == expected


def test_without_the_harness_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(harness, "register", cache(harness.register.__wrapped__))  # the others' stays registered
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert harness.main(["--tasks", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the harness needs lm_eval: pip install 'lserve_jax[eval]'")
    assert error.count("\n") == 1


def test_what_the_harness_refuses_is_one_line_and_other_errors_of_values_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert harness.main(["--model_args", f"model={MODEL}", "--tasks", "nosuch"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: Tasks not found: nosuch"

    def broken() -> None:
        raise ValueError("a fault")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", broken)
    with pytest.raises(ValueError, match="a fault"):
        harness.main(["ls", "tasks"])
