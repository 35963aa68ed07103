"""Every task makes prompts of the length asked for, with the answer in them exactly as the task defines it."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve_jax.evaluation.haystack import nominal_depth, open_haystack
from lserve_jax.evaluation.rendering import chat_render, raw_render, word_render
from lserve_jax.evaluation.sample import Render, Request, Sample
from lserve_jax.evaluation.tasks import TASKS, get_task
from lserve_jax.text.tokenizer import Tokenizer
from lserve_jax.weights.load import open_checkpoint

NIAH = [name for name in TASKS if name.startswith("niah")]
TOO_LONG_FOR_512 = {"vt", "cwe"}
WITH_DEPTH = ["niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2"]
WITH_DEPTH += ["niah_multikey_3", "vt_direct", "copy"]
NEEDLE = re.compile(r"One of the special magic (\w+)s for (\S+) is: (\S+)\.")
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
FORMS = {"number": r"[1-9]\d{6}", "word": r"[a-z]+-[a-z]+", "uuid": UUID}


@pytest.fixture(scope="module")
def tokenizer(embedded_gguf: Path) -> Tokenizer:
    source = open_checkpoint(str(embedded_gguf)).tokenizer_source
    assert isinstance(source, dict)
    return Tokenizer.from_gguf(source)


@pytest.fixture(scope="module")
def render(tokenizer: Tokenizer) -> Render:
    return chat_render(tokenizer)


def make(name: str, render: Render = word_render, *, length: int = 1500, index: int = 0, seed: int = 0) -> Sample:
    request = Request(length=length, index=index, seed=seed, render=render, haystack=open_haystack())
    return TASKS[name].make(request)


def rendered_length(sample: Sample, render: Render) -> int:
    return len(render(sample.text, sample.answer_prefix))


def assert_full(sample: Sample, render: Render, length: int) -> None:
    assert 0.98 * length <= rendered_length(sample, render) <= length


@pytest.mark.parametrize("name", TASKS)
def test_prompts_have_the_length_asked_for(name: str, render: Render) -> None:
    for length, indices in ((1024, (0, 1, 2)), (2048, (3, 4)), (4096, (5,))):
        for index in indices:
            assert_full(make(name, render, length=length, index=index), render, length)


@pytest.mark.parametrize("name", TASKS)
def test_a_length_without_room_is_refused_and_the_least_one_named(name: str, render: Render) -> None:
    if name not in TOO_LONG_FOR_512:
        assert_full(make(name, render, length=512), render, 512)
    short = 512 if name in TOO_LONG_FOR_512 else 64
    with pytest.raises(
        ValueError, match=rf"^task {name}: a prompt needs at least \d+ tokens, got a length of {short}$"
    ):
        make(name, render, length=short)


@settings(max_examples=40)
@given(
    name=st.sampled_from(list(TASKS)),
    length=st.integers(900, 3000),
    index=st.integers(0, 10**6),
    seed=st.integers(0, 2**40),
)
def test_any_request_is_filled_counted_in_words_too(name: str, length: int, index: int, seed: int) -> None:
    sample = make(name, length=length, index=index, seed=seed)
    assert_full(sample, word_render, length)
    assert sample.references and all(sample.references)
    assert TASKS[name].metric(sample.target or " ".join(sample.references), sample.references) == 1


@pytest.mark.parametrize("name", TASKS)
def test_base_models_get_raw_prompts(name: str, tokenizer: Tokenizer) -> None:
    assert_full(make(name, raw_render(tokenizer), length=1024), raw_render(tokenizer), 1024)


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_is_a_function_of_its_request(name: str) -> None:
    assert make(name, index=3, seed=7) == make(name, index=3, seed=7)
    others = [make(name, index=4, seed=7), make(name, index=3, seed=8), make(name, index=3, seed=7, length=1510)]
    texts = {sample.text for sample in (make(name, index=3, seed=7), *others)}
    assert len(texts) == 4
    assert len({sample.references for sample in (make(name, index=index) for index in range(8))}) >= 6


@pytest.mark.slow
def test_samples_are_the_same_in_every_process() -> None:
    program = (
        "import hashlib; from tests.lserve_jax.evaluation.test_tasks import TASKS, make;"
        "print(hashlib.sha256(repr([make(name) for name in TASKS]).encode()).hexdigest())"
    )
    root = Path(__file__).parents[3]
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(root)}
    other = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=root, capture_output=True, text=True, check=True
    )
    here = hashlib.sha256(repr([make(name) for name in TASKS]).encode()).hexdigest()
    assert other.stdout.strip() == here


@pytest.mark.parametrize("name", NIAH)
def test_needles_are_hidden_once_each_and_asked_for(name: str) -> None:
    keys, values, queries = {
        "niah_multikey_1": (4, 1, 1),
        "niah_multivalue": (1, 4, 1),
        "niah_multiquery": (4, 1, 4),
    }.get(name, (1, 1, 1))
    key_kind = "uuid" if name == "niah_multikey_3" else "word"
    value_kind = "uuid" if name in ("niah_single_3", "niah_multikey_3") else "number"
    for index in range(4):
        sample = make(name, index=index)
        found = NEEDLE.findall(sample.text)
        assert all(kind == value_kind for kind, _, _ in found)
        assert all(re.fullmatch(FORMS[key_kind], key) and re.fullmatch(FORMS[value_kind], v) for _, key, v in found)
        assert len({value for _, _, value in found}) == len(found)
        by_key = Counter(key for _, key, _ in found)
        assert set(by_key.values()) == {values}
        assert len(by_key) >= 40 if name in ("niah_multikey_2", "niah_multikey_3") else len(by_key) == keys
        question = sample.text.rsplit("\n", 1)[1]
        asked = re.findall(FORMS[key_kind], question.replace(value_kind, ""))
        assert len(asked) == queries
        assert set(sample.references) == {value for _, key, value in found if key in asked}
        assert len(sample.references) == values * queries
        for reference in sample.references:
            assert sample.text.count(reference) == 1
        noun = f"{value_kind}s" if len(sample.references) > 1 else value_kind
        verb = "are" if len(sample.references) > 1 else "is"
        query = question.split(" for ")[1].removesuffix(" mentioned in the provided text?")
        assert sample.answer_prefix == f"The special magic {noun} for {query} mentioned in the provided text {verb}"
        assert sample.max_tokens == 128


def test_the_noise_is_rulers() -> None:
    context = make("niah_single_1").text.split("\n")[1:-1]
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    lines = [line for line in context if not NEEDLE.fullmatch(line)]
    assert lines[:-1] == [noise] * (len(lines) - 1)
    assert noise.startswith(lines[-1])


def test_ten_samples_have_ten_depths() -> None:
    assert sorted(nominal_depth(index) for index in range(10)) == [step / 9 for step in range(10)]
    assert {nominal_depth(index) for index in range(4)} == {0, 1 / 3, 2 / 3, 1}
    assert nominal_depth(13) == nominal_depth(3)


@pytest.mark.parametrize("name", WITH_DEPTH)
def test_the_answer_lies_at_its_depth(name: str, render: Render, tokenizer: Tokenizer) -> None:
    for index in range(10) if name == "niah_single_2" else range(4):
        sample = make(name, render, length=2048, index=index)
        assert sample.info == {"depth": nominal_depth(index)}
        text = sample.text.partition("\n")[2] if "magic" in sample.text else sample.text
        context = text.rpartition("\n")[0]
        searched = sample.answer_prefix + (sample.target or "") if name == "copy" else sample.references[0]
        assert context.count(searched) == 1
        before, _, after = context.partition(searched)
        whole = len(tokenizer.encode(before)) + len(tokenizer.encode(after))
        assert len(tokenizer.encode(before)) / whole == pytest.approx(sample.info["depth"], abs=0.06)


def test_tasks_with_several_answers_have_no_depth() -> None:
    assert all("depth" not in make(name).info for name in TASKS if name not in WITH_DEPTH)


def assignments(text: str) -> dict[str, str]:
    """Variables of a text and the values that they have in the end."""
    values: dict[str, str] = {}
    for name, value in re.findall(r"^VAR (\S+) = (.+)$", text, re.MULTILINE):
        assert name not in values
        values[name] = values[value.removeprefix("VAR ")] if value.startswith("VAR ") else value
    return values


@pytest.mark.parametrize("index", range(3))
def test_vt_hides_one_chain_of_four_hops_after_a_worked_example(index: int) -> None:
    sample = make("vt", index=index)
    example, start, question = sample.text.rpartition("Memorize and track the chain(s)")
    assert start
    for text, letters in ((example, 3), (question, 5)):
        values = assignments(text)
        assert len(values) == 5 and len(set(values.values())) == 1
        assert all(re.fullmatch(rf"[A-Z]{{{letters}}}", name) for name in values)
        value = next(iter(values.values()))
        assert f"Find all variables that are assigned the value {value} in the text above." in text
        if text is example:
            assert text.endswith(f"are assigned the value {value}, they are: {' '.join(values)}\n\n")
        else:
            assert sample.references == tuple(values)
            assert sample.target == f" {' '.join(values)}"
            assert f"5 variables are assigned the value {value}, they are:" in sample.answer_prefix
    assert sample.max_tokens == 30


@pytest.mark.parametrize("index", range(3))
def test_vt_direct_assigns_a_value_of_its_own_to_each_variable(index: int) -> None:
    sample = make("vt_direct", index=index)
    values = assignments(sample.text)
    assert len(set(values.values())) == len(values) == 2
    (asked,) = re.findall(r"assigned to the variable (\S+) in", sample.text)
    assert sample.references == (values[asked],)
    assert sample.answer_prefix.endswith(f"VAR {asked} =")


@pytest.mark.parametrize(("length", "common", "others"), [(1500, 6, 1), (4096, 30, 3)])
def test_cwe_lists_ten_words_more_often_than_all_others(length: int, common: int, others: int) -> None:
    sample = make("cwe", length=length)
    example, _, question = sample.text.rpartition("Below is a numbered list")
    entries = re.findall(r"(\d+)\. (\S+)", question)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    assert {word for word, _ in counts.most_common(10)} == set(sample.references)
    assert set(counts.values()) == {common, others}
    assert [counts[word] for word in sample.references] == [common] * 10
    shown = Counter(re.findall(r"\d+\. (\S+)", example.partition("Question:")[0]))
    answer = re.findall(r"\d+\. (\S+)", example.partition("Answer:")[2])
    assert set(answer) == {word for word, _ in shown.most_common(10)}
    assert not set(counts) & set(answer) or length > 4000
    assert sample.max_tokens == 120


def test_cwe_has_words_for_very_long_prompts() -> None:
    sample = make("cwe", length=40_000)
    counts = Counter(re.findall(r"\d+\. (\S+)", sample.text.rpartition("Below is a numbered list")[2]))
    assert len(counts) > 5000
    assert set(counts.values()) == {30, 3}
    pairs = {part for word in counts if "-" in word for part in word.split("-")}
    assert pairs and not pairs & set(sample.references)


@pytest.mark.parametrize("index", range(3))
def test_fwe_counts_follow_the_zeta_distribution(index: int) -> None:
    sample = make("fwe", index=index)
    coded = re.search(r"coded words\. (.*)\nQuestion", sample.text)
    assert coded
    counts = Counter(coded[1].split())
    dots = counts.pop("...")
    ranked = counts.most_common()
    assert tuple(word for word, _ in ranked[:3]) == sample.references
    assert all(re.fullmatch("[a-z]{6}", word) for word in counts)
    assert ranked[2][1] > ranked[3][1]
    total = 4 * ranked[0][1] * math.pi**2 / 6
    for rank, (_, count) in enumerate(ranked, start=2):
        assert count == pytest.approx(total * rank**-2 / (math.pi**2 / 6), abs=5 / rank**2 + 1)
    assert dots == pytest.approx(total * 6 / math.pi**2, abs=12)
    assert sample.max_tokens == 50


def documents_of(sample: Sample) -> list[str]:
    """The documents, whose numbers must be in order."""
    _, *parts = re.split(r"(?:^|\n\n)Document (\d+):\n", sample.text.split("\n\nAnswer the question based")[0])
    assert [int(number) for number in parts[::2]] == list(range(1, len(parts) // 2 + 1))
    return parts[1::2]


@pytest.mark.parametrize("index", range(6))
def test_qa_1_is_answered_by_one_document(index: int) -> None:
    sample = make("qa_1", index=index)
    (answer,) = sample.references
    who = re.search(r"Question: .* ([A-Z]\w+ [A-Z]\w+)\b.*\?$", sample.text)
    assert who
    documents = documents_of(sample)
    assert len(documents) >= 10
    holding = [document for document in documents if re.search(rf"\b{answer}\b", document)]
    assert len(holding) == 1
    assert any(who[1] in sentence for sentence in holding[0].split(".") if answer in sentence)
    assert sum(who[1] in document for document in documents) == 1
    assert sample.max_tokens == 32


@pytest.mark.parametrize("index", range(6))
def test_qa_2_needs_two_documents(index: int) -> None:
    sample = make("qa_2", index=index)
    (answer,) = sample.references
    asked = re.search(r"Question: .*the (architect|founder) of the ([A-Z]\w+ [A-Z]\w+)", sample.text)
    assert asked
    documents = documents_of(sample)
    (about_building,) = [document for document in documents if asked[2] in document]
    (holding,) = [document for document in documents if re.search(rf"\b{answer}\b", document)]
    person = holding.splitlines()[0]
    assert about_building.startswith(f"{asked[2]}\n")
    assert person in about_building and asked[2] not in holding
    assert person not in sample.text.rpartition("Question:")[2]


@pytest.mark.parametrize("index", range(4))
def test_copy_repeats_a_passage_that_stands_once_in_the_text(index: int, render: Render, tokenizer: Tokenizer) -> None:
    sample = make("copy", render, length=2048, index=index)
    assert sample.target is not None
    passage = sample.answer_prefix + sample.target
    assert sample.text.count(passage) == 1
    assert sample.text.endswith(f": {sample.answer_prefix}")
    assert sample.text.count(sample.answer_prefix) == 2
    assert 122 <= len(tokenizer.encode(sample.target, add_special_tokens=False)) <= 128
    assert passage[0].isupper() or passage[0] == '"'


def test_chat_prompts_are_the_template_and_then_the_prefix(tokenizer: Tokenizer) -> None:
    ids = chat_render(tokenizer)("Where is it?", "It is")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Where is it?"}])
    assert ids[: len(asked)] == asked
    assert tokenizer.decode(ids[len(asked) :], skip_special_tokens=False) == "It is"
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("<|im_start|>assistant\nIt is")
    assert raw_render(tokenizer)("Where is it?", "It is") == tokenizer.encode("Where is it? It is")
    assert raw_render(tokenizer)("Where is it?", "") == tokenizer.encode("Where is it?")


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^unknown task 'niah': known are niah_single_1, .*, copy$"):
        get_task("niah")
    assert list(TASKS)[:13] == [*NIAH, "vt", "cwe", "fwe", "qa_1", "qa_2"]


def squad(paragraphs: int = 30) -> dict[str, object]:
    article = [
        {
            "context": f"The tower of town {number} is {number + 7} metres high and was finished early. " * 3,
            "qas": [
                {"question": "What is unknown?", "answers": [], "is_impossible": True},
                {
                    "question": f"How high is the tower of town {number}?",
                    "answers": [{"text": f"{number + 7} metres"}, {"text": f"{number + 7}"}],
                    "is_impossible": False,
                },
            ],
        }
        for number in range(paragraphs)
    ]
    return {"data": [{"title": "Towers", "paragraphs": article[:5]}, {"title": "More", "paragraphs": article[5:]}]}


def hotpot() -> list[dict[str, object]]:
    return [
        {
            "question": f"Question {number}?",
            "answer": f"Answer {number}",
            "context": [[f"Title {number} {part}", ["First sentence. ", "Second."]] for part in range(10)],
        }
        for number in range(20)
    ]


def test_published_questions_replace_the_invented_ones(tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps(squad()), encoding="utf-8")
    (tmp_path / "hotpotqa.json").write_text(json.dumps(hotpot()), encoding="utf-8")
    request = Request(length=800, index=2, seed=0, render=word_render, haystack=open_haystack())
    one = get_task("qa_1", tmp_path).make(request)
    assert one.text.endswith("Question: How high is the tower of town 2?")
    assert one.references == ("9 metres", "9")
    documents = documents_of(one)
    # Those of the article come first of all distractors, each once.
    for number in range(5):
        assert sum(f"town {number} is" in document for document in documents) == 1
    assert_full(one, word_render, 800)
    two = get_task("qa_2", tmp_path).make(request)
    assert two.references == ("Answer 2",)
    assert sum(document.startswith("Title 2 ") for document in documents_of(two)) == 10
    assert "Title 2 0\nFirst sentence. Second." in documents_of(two)
    assert get_task("vt", tmp_path) is TASKS["vt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("{}", "is not dev-v2.0.json of SQuAD: KeyError: 'data'"),
        ('{"data": []}', "must hold questions"),
        ('{"data": [{"paragraphs": [{"context": "c", "qas": [{"is_impossible": false}]}]}]}', "'question'"),
    ],
)
def test_a_questions_file_that_is_not_one_is_refused_in_a_line(
    content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "squad.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        get_task("qa_1", tmp_path)
    assert str(tmp_path / "squad.json") in str(error.value)
    assert "\n" not in str(error.value)
