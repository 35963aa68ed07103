"""LongBench's tasks read from files: prompts as published, cut in the middle, scored by the best reference."""

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lserve_jax.evaluation.longbench import NAMES, LongBenchTask, load, open_task
from lserve_jax.evaluation.rendering import chat_render, raw_render
from lserve_jax.evaluation.sample import Request, Task
from lserve_jax.text.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "golden" / "tiny" / "llama3"
ROW = {
    "input": "Who?",
    "context": "A long text.",
    "answers": ["Ann", "Ann Lee"],
    "length": 5000,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "x1",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Of the kind that has a token for each character."""
    return Tokenizer.from_folder(TINY)


def write(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def request(tokenizer: Tokenizer, length: int, index: int = 0, *, is_chat: bool = True) -> Request:
    render = chat_render(tokenizer) if is_chat else raw_render(tokenizer)
    return Request(length=length, index=index, seed=0, render=render, haystack=lambda rng: iter(()))


def test_a_sample_is_the_published_prompt_filled(tmp_path: Path, tokenizer: Tokenizer):
    task: Task = open_task("hotpotqa", write(tmp_path, "hotpotqa", ROW, ROW | {"context": "{x}"}), tokenizer)
    assert isinstance(task, LongBenchTask)
    assert (task.name, len(task), task.use_chat_format) == ("hotpotqa", 2, True)
    sample = task.make(request(tokenizer, 1000))
    assert sample.text == (
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
        "\n\nThe following are given passages.\nA long text.\n\n"
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
        "\n\nQuestion: Who?\nAnswer:"
    )
    assert (sample.references, sample.max_tokens, sample.target) == (("Ann", "Ann Lee"), 32, None)
    assert sample.info == {"id": "x1", "words": 5000, "bucket": "4-8k"}
    assert "\n{x}\n" in task.make(request(tokenizer, 1000, index=1)).text  # braces of a text are text
    with pytest.raises(ValueError, match=r"hotpotqa has 2 samples, there is no number 2"):
        task.make(request(tokenizer, 1000, index=2))


@pytest.mark.parametrize("is_chat", [True, False])
def test_a_prompt_that_is_too_long_loses_its_middle(tmp_path: Path, tokenizer: Tokenizer, is_chat: bool):
    context = " ".join(f"word{number}" for number in range(400))
    task = open_task("hotpotqa", write(tmp_path, "hotpotqa", ROW | {"context": context}), tokenizer)
    for length in (300, 301):
        asked = request(tokenizer, length, is_chat=is_chat)
        text = task.make(asked).text
        whole = task.make(request(tokenizer, 100_000, is_chat=is_chat)).text
        half = len(tokenizer.encode(text, add_special_tokens=False)) // 2
        ids = tokenizer.encode(whole, add_special_tokens=False)
        assert text == tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])
        assert length - 2 <= len(asked.render(text, "")) <= length
    with pytest.raises(ValueError, match=r"hotpotqa: a prompt of 1 tokens has no room"):
        task.make(request(tokenizer, 1, is_chat=is_chat))


def test_a_cut_that_becomes_more_tokens_is_cut_further(tmp_path: Path, tokenizer: Tokenizer):
    class Growing(Tokenizer):
        """Whatever is decoded has five characters more."""

        def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
            return super().decode(ids, skip_special_tokens) + "....."

    growing = Growing.from_folder(TINY)
    task = open_task("hotpotqa", write(tmp_path, "hotpotqa", ROW), growing)
    asked = request(growing, 200)
    sample = task.make(asked)
    assert sample.text.count(".....") == 2
    assert 198 <= len(asked.render(sample.text, "")) <= 200


def test_text_that_looks_like_a_control_token_stays_text(tmp_path: Path, tokenizer: Tokenizer):
    context = "<|im_end|>" + "x" * 800
    task = open_task("hotpotqa", write(tmp_path, "hotpotqa", ROW | {"context": context}), tokenizer)
    sample = task.make(request(tokenizer, 500))
    assert "<|im_end|>xx" in sample.text


@pytest.mark.parametrize(
    ("name", "row", "answer", "expected"),
    [
        ("hotpotqa", ROW, "ann lee", 1.0),  # the best of both references
        ("hotpotqa", ROW, "x\nann lee", 2 * (2 / 3) / (2 / 3 + 1)),
        ("triviaqa", ROW, "\nAnn Lee\nPassage: another", 1.0),  # few-shot: up to the first line end
        ("trec", ROW | {"answers": ["Food"], "all_classes": ["Food", "Animal"]}, "Food\nAnimal", 1.0),
        ("lcc", ROW | {"answers": ["abcd"]}, "\nabcd\nefgh", 1.0),
        ("passage_count", ROW | {"answers": ["7"]}, "7 or 8", 0.5),
    ],
)
def test_scores(
    tmp_path: Path, tokenizer: Tokenizer, name: str, row: dict[str, Any], answer: str, expected: float
) -> None:
    task = open_task(name, write(tmp_path, name, row), tokenizer)
    assert task.metric(answer, task.records[0].answers) == pytest.approx(expected)
    assert task.use_chat_format == (name not in ("trec", "triviaqa", "lcc"))


def test_all_tasks_of_the_benchmark_are_known():
    assert len(NAMES) == 21 + 13
    assert {"narrativeqa", "repobench-p", "hotpotqa_e", "lcc_e"} < set(NAMES)
    assert {"dureader_e", "vcsum_e"}.isdisjoint(NAMES)


def test_every_task_fills_its_prompt_and_has_its_metric(tmp_path: Path, tokenizer: Tokenizer):
    answer = "Paragraph 3, 段落3"
    row = ROW | {"answers": [answer], "all_classes": [answer], "length": 8000}
    for name in NAMES:
        task = open_task(name, write(tmp_path, name, row), tokenizer)
        sample = task.make(request(tokenizer, 5000))
        assert "A long text." in sample.text
        assert ("Who?" in sample.text) == ("{input}" in task.dataset.prompt)
        assert sample.info["bucket"] == "8k+"
        if task.dataset.metric != "count":
            assert task.metric(answer, sample.references) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"input": ', r"not a line of JSON in UTF-8 \(.*\)"),
        (b'"\xff"', r"not a line of JSON in UTF-8 \(.*\)"),
        (b"[1]", r"must be a JSON object, got list"),
        (json.dumps(ROW | {"answers": "Ann"}).encode(), r"answers must be a list of at least one string, got 'Ann'"),
        (json.dumps(ROW | {"answers": []}).encode(), r"answers must be a list of at least one string, got \[\]"),
        (
            json.dumps({"input": "x", "length": True}).encode(),
            r"context \(a string\) is missing; answers \(.*\) is missi",
        ),
        (json.dumps(ROW | {"length": True}).encode(), r"length must be a whole number, got True"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, problem: str):
    path = tmp_path / "hotpotqa.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"^{path}, line 3: {problem}") as caught:
        load("hotpotqa", tmp_path)
    assert "\n" not in str(caught.value)


def test_what_a_metric_needs_is_found_before_anything_runs(tmp_path: Path):
    with pytest.raises(ValueError, match=r"line 1: all_classes must be a list of at least one string, got None"):
        load("trec", write(tmp_path, "trec", ROW))
    rows = [ROW | {"all_classes": ["Ann"]}, ROW | {"all_classes": ["Bob"]}]
    with pytest.raises(ValueError, match=r"line 2: all_classes differ from those of the lines before"):
        load("trec", write(tmp_path, "trec", *rows))
    with pytest.raises(ValueError, match=r"line 1: the reference 'Ann' does not name its paragraph"):
        load("passage_retrieval_en", write(tmp_path, "passage_retrieval_en", ROW))


def test_lines_end_at_line_feeds_alone(tmp_path: Path):
    context = "one\u2028two\x85three"
    (record,) = load("qasper", write(tmp_path, "qasper", ROW | {"context": context}))
    assert record.context == context


def test_what_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"unknown LongBench task 'hotpot'; known are narrativeqa, "):
        load("hotpot", tmp_path)
    with pytest.raises(ValueError, match=rf"LongBench task qasper: {tmp_path} has no file qasper.jsonl"):
        load("qasper", tmp_path)
    (tmp_path / "qasper.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"qasper.jsonl has no samples"):
        load("qasper", tmp_path)


def test_without_a_folder_the_published_archive_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/hotpotqa_e.jsonl", json.dumps(ROW))
    asked = []

    def download(*args: str, **options: str) -> str:
        asked.append((*args, options))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load("hotpotqa_e", None)[0].id == "x1"
    assert asked == [("THUDM/LongBench", "data.zip", {"repo_type": "dataset"})]
    with pytest.raises(ValueError, match=r"data.zip of THUDM/LongBench has no file qasper.jsonl"):
        load("qasper", None)


def test_without_a_folder_or_the_hub_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def offline(*args: str, **options: str) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\n and no copy")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        ValueError, match=r"name the folder with qasper.jsonl; the hub did not give it \(no network and"
    ):
        load("qasper", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'lserve_jax\[eval\]'"):
        load("qasper", None)
