"""What is measured of a model, and in which order: on a tiny model, with tasks made for the test."""

import dataclasses
import random
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lserve_jax import LLM, SamplingParams
from lserve_jax.engine.outputs import ScoreOutput
from lserve_jax.engine.setup import Setup, prepare
from lserve_jax.evaluation import runner
from lserve_jax.evaluation.answers import Answers
from lserve_jax.evaluation.corpus import Windows, python_reference, read_texts
from lserve_jax.evaluation.drift import Drift
from lserve_jax.evaluation.matching import matching_start
from lserve_jax.evaluation.measurement import Item, Row, by_position, prompt_length
from lserve_jax.evaluation.perplexity import Perplexity
from lserve_jax.evaluation.rendering import chat_render, raw_render
from lserve_jax.evaluation.runner import Plan, make_items, make_loads, missing, run
from lserve_jax.evaluation.sample import Metric, Request, Sample
from lserve_jax.evaluation.store import Store
from lserve_jax.evaluation.variants import parse_variants
from lserve_jax.text.tokenizer import Tokenizer, open_tokenizer

pytestmark = pytest.mark.slow

TINY = str(Path(__file__).parents[2] / "golden" / "tiny" / "llama3")
TEXT = (Path(__file__).parents[3] / "LICENSE").read_text(encoding="utf-8")
CONTEXT = 512
SIZES: dict[str, Any] = {"prefill_chunk": 64, "max_num_seqs": 2}
SPARSE = "lserve:page_size=16+sub_page_size=4+sink=16+local=32+token_budget=25%"


@dataclasses.dataclass(frozen=True)
class Echo:
    """A task whose prompt is as many words as fit, and whose answer is one of them."""

    name: str = "echo"
    max_tokens: int = 12

    def metric(self, answer: str, references: tuple[str, ...]) -> float:
        return float(references[0] in answer)

    def make(self, request: Request) -> Sample:
        rng = random.Random(f"{request.length} {request.index} {request.seed}")
        words = [rng.choice(("oak", "elm", "ash", "fir")) for _ in range(request.length)]
        while len(request.render(" ".join(words), "It is")) > request.length:
            words = words[:-1]
        if not words:
            raise ValueError(f"task {self.name}: no room in {request.length} tokens")
        return Sample(
            text=" ".join(words),
            answer_prefix="It is",
            references=(words[0],),
            target=f" {words[0]}.",
            max_tokens=self.max_tokens,
            info={"depth": request.index / 4},
        )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = open_tokenizer(prepare(TINY).checkpoint.tokenizer_source)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(TINY, attention="dense", max_model_len=256, **SIZES)


def echo(tokenizer: Tokenizer, **fields: Any) -> Answers:
    known = {"name": "echo", "task": Echo(), "render": chat_render(tokenizer), "context": CONTEXT, "seed": 0}
    return Answers(**{"tokenizer": tokenizer, "haystack": iter, **known, **fields})


@dataclasses.dataclass(frozen=True)
class Rows:
    """The reference's rows, without its distributions; of nothing that is measured already if there are none."""

    known: Mapping[Any, Row] = dataclasses.field(default_factory=dict)

    def row(self, item: Item) -> Row | None:
        return self.known.get(item.key)

    def compare(self, item: Item, score: ScoreOutput) -> dict[str, float]:
        assert score.logits is not None
        assert score.logits.shape[0] == len(item.continuation)
        return {}


nobody = Rows()


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_functions_of_length_and_index(tokenizer: Tokenizer):
    first, again, other = (echo(tokenizer).make(100, index) for index in (0, 0, 1))
    assert first.record == again.record != other.record
    assert first.prompt.tolist() == again.prompt.tolist()
    assert 96 <= len(first.prompt) <= 100
    assert tokenizer.decode(first.prompt.tolist()).endswith("assistant\nIt is")
    assert tokenizer.decode(first.continuation) == first.record["target"]
    assert first.room == 12


def test_the_target_goes_on_from_the_prompt_also_without_chat_format(tokenizer: Tokenizer):
    item = echo(tokenizer, render=raw_render(tokenizer)).make(100, 0)
    assert tokenizer.decode([*item.prompt.tolist(), *item.continuation]).endswith(f" It is{item.record['target']}")


def test_a_prompt_gives_way_to_its_answer_at_the_edge_of_the_context(tokenizer: Tokenizer):
    task = echo(tokenizer, task=Echo(max_tokens=5))
    item = task.make(CONTEXT, 0)
    assert item.length == CONTEXT
    assert CONTEXT - 12 <= len(item.prompt) <= CONTEXT - item.room
    with pytest.raises(ValueError, match="echo at length 512 takes 50 tokens more, but the model's context is 512"):
        echo(tokenizer, task=Echo(max_tokens=50)).make(CONTEXT, 0)


def test_lengths_may_count_words(tokenizer: Tokenizer):
    item = echo(tokenizer, has_word_lengths=True).make(50, 0)
    assert len(f"{item.record['text']} It is".split()) == 50
    assert len(item.prompt) > 100
    with pytest.raises(ValueError, match=r"echo at length \d+ takes 12 tokens more, but the model's context is 512"):
        echo(tokenizer, has_word_lengths=True).make(400, 0)


def test_prompt_length_gives_way_by_little():
    assert prompt_length("x", 100, 10, 200) == 100
    assert prompt_length("x", 1000, 10, 1000) == 990
    with pytest.raises(ValueError, match="the longest length that it can have is 900"):
        prompt_length("x", 1000, 100, 1000)


# --- answers ---------------------------------------------------------------------------------------------------------


class Recorder:
    """An LLM that notes what it is asked to generate."""

    def __init__(self, llm: LLM) -> None:
        self.generated: list[list[int]] = []
        self.score = llm.score
        self._generate = llm.generate

    def generate(self, prompts: Sequence[list[int]], params: Any) -> Any:
        self.generated += prompts
        return self._generate(prompts, params)


def greedy_target(tokenizer: Tokenizer, llm: LLM, item: Item, tokens: int) -> Item:
    """The item with what the model itself says as its target."""
    (output,) = llm.generate([item.prompt.tolist()], SamplingParams(max_tokens=tokens, ignore_eos=True))
    assert item.sample is not None
    sample = dataclasses.replace(item.sample, target=tokenizer.decode(output.token_ids), max_tokens=tokens)
    return dataclasses.replace(item, continuation=output.token_ids, sample=sample)


def test_a_target_that_greedy_decoding_takes_is_the_answer_without_generating_it(tokenizer: Tokenizer, llm: LLM):
    task = echo(tokenizer)
    plain = [task.make(100, index) for index in range(4)]
    items = [greedy_target(tokenizer, llm, item, 8) if place % 2 else item for place, item in enumerate(plain)]
    recorder: Any = Recorder(llm)
    rows = task.measure(recorder, items, nobody)
    assert recorder.generated == [plain[0].prompt.tolist(), plain[2].prompt.tolist()]
    for item, row in zip(items, rows, strict=True):
        assert item.sample is not None
        (expected,) = llm.generate([item.prompt.tolist()], SamplingParams(max_tokens=item.sample.max_tokens))
        assert row["answer"] == expected.text
        assert row["score"] == Echo().metric(expected.text, item.sample.references)
    assert [row["token_accuracy"] == 1 for row in rows] == [False, True, False, True]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """The same, measured by how far the answer goes along with the target."""

    name: str = "echo"
    max_tokens: int = 8
    metric: Metric = matching_start

    def make(self, request: Request) -> Sample:
        return Echo(max_tokens=self.max_tokens).make(request)


def test_where_only_the_start_counts_the_first_wrong_choice_ends_the_answer(tokenizer: Tokenizer, llm: LLM):
    task = echo(tokenizer, task=Repeat())
    item = greedy_target(tokenizer, llm, task.make(100, 1), 8)
    assert item.sample is not None
    right = tokenizer.decode(item.continuation)
    wrong = (*item.continuation[:5], (item.continuation[5] + 1) % 100, *item.continuation[6:])
    sample = dataclasses.replace(item.sample, references=(f"{right} and",), target=tokenizer.decode(wrong))
    recorder: Any = Recorder(llm)
    (row,) = task.measure(recorder, [dataclasses.replace(item, continuation=wrong, sample=sample)], nobody)
    assert recorder.generated == []
    assert row["answer"] == tokenizer.decode(item.continuation[:6])
    assert row["token_accuracy"] < 1
    long = dataclasses.replace(item, sample=dataclasses.replace(item.sample, max_tokens=3))
    (row,) = task.measure(recorder, [long], nobody)
    assert row["answer"] == tokenizer.decode(item.continuation[:3])
    assert recorder.generated == []


def test_a_target_beyond_the_tokens_of_an_answer_is_no_answer(tokenizer: Tokenizer, llm: LLM):
    item = greedy_target(tokenizer, llm, echo(tokenizer).make(100, 1), 8)
    assert item.sample is not None
    short = dataclasses.replace(item, sample=dataclasses.replace(item.sample, max_tokens=3))
    (row,) = echo(tokenizer).measure(llm, [short], nobody)
    assert row["token_accuracy"] == 1
    assert row["answer"] == tokenizer.decode(item.continuation[:3])


def test_rows_hold_what_the_model_makes_of_the_target(tokenizer: Tokenizer, llm: LLM):
    item = echo(tokenizer).make(100, 0)
    (row,) = echo(tokenizer).measure(llm, [item], nobody)
    logprobs = llm.prompt_logprobs([*item.prompt.tolist(), *item.continuation])[-len(item.continuation) :]
    assert row["nll"] == pytest.approx(-logprobs.mean(), abs=1e-3)
    assert row["pages_read_ratio"] == 1
    assert row["info"] == {"depth": 0}


def test_a_task_without_targets_is_answered_alone(tokenizer: Tokenizer, llm: LLM):
    items = [dataclasses.replace(echo(tokenizer).make(100, index), continuation=()) for index in (1, 3)]
    rows = echo(tokenizer).measure(llm, items, nobody)
    for row in rows:
        assert (row["nll"], row["token_accuracy"], row["pages_read_ratio"]) == (None, None, 1)
        assert row["answer"]


# --- perplexity and drift --------------------------------------------------------------------------------------------


def test_windows_cover_the_text_once_each_in_an_order_of_the_seed(tokenizer: Tokenizer):
    text = "all the words of a text. " * 60
    windows = Windows(text, tokenizer, 0)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    count = windows.count(50)
    assert count == len(tokens) // 50
    found = [windows.get(50, index).tolist() for index in range(count)]
    assert sorted(found) == sorted(tokens[place * 50 : place * 50 + 50] for place in range(count))
    assert found[:3] != [Windows(text, tokenizer, 1).get(50, index).tolist() for index in range(3)]


def test_texts_are_a_file_or_a_folder_of_files(tmp_path: Path):
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.md").write_text("\ufefffirst", encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert read_texts(tmp_path) == "first\n\n\nsecond"
    assert read_texts(tmp_path / "b.txt") == "second"
    (tmp_path / "d.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"d\.txt is not UTF-8 text \(byte 2\)"):
        read_texts(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        read_texts(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no text"):
        read_texts(tmp_path / "empty")


def test_the_corpus_that_python_brings_along_is_long():
    assert len(python_reference()) > 300_000


def test_perplexity_is_of_all_tokens_in_prefill_and_of_the_last_in_decode(tokenizer: Tokenizer, llm: LLM):
    measurement = Perplexity(windows=Windows(TEXT, tokenizer, 0), context=CONTEXT, tail=20)
    items = [measurement.make(200, index) for index in range(2)]
    rows = measurement.measure(llm, items, nobody)
    for item, row in zip(items, rows, strict=True):
        window = [*item.prompt.tolist(), *item.continuation]
        assert len(window) == 200
        nll = -llm.prompt_logprobs(window)
        assert row["nll"] == pytest.approx(nll.mean(), abs=1e-4)
        assert row["tail_nll"] == pytest.approx(nll[-20:].mean(), abs=1e-3)
        assert row["nll_by_position"] == by_position(nll)
        assert len(row["nll_by_position"]) == 16
    with pytest.raises(ValueError, match="perplexity at length 20 needs more tokens than the 20 of its tail"):
        measurement.make(20, 0)
    with pytest.raises(ValueError, match="perplexity at length 600 takes 0 tokens more, but"):
        measurement.make(600, 0)


def test_drift_leads_variants_along_the_text_of_the_reference(tokenizer: Tokenizer, llm: LLM):
    measurement = Drift(windows=Windows(TEXT, tokenizer, 0), context=CONTEXT, tokens=40)
    items = [measurement.make(150, index) for index in range(2)]
    reference = {item.key: row for item, row in zip(items, measurement.measure(llm, items, nobody), strict=True)}
    assert all(len(row["token_ids"]) == 40 and row["agreement"] == 1 for row in reference.values())
    same = measurement.measure(llm, items, Rows(reference))
    for item, row in zip(items, same, strict=True):
        assert row["agreement_by_position"] == reference[item.key]["agreement_by_position"] == [1.0] * 16
        assert row["nll"] == reference[item.key]["nll"]
        assert "token_ids" not in row
    sparse = LLM(TINY, max_model_len=256, page_size=16, sub_page_size=4, sink=0, local=16, token_budget=32, **SIZES)
    for row in measurement.measure(sparse, items, Rows(reference)):
        assert row["agreement"] < 1
        assert row["pages_read_ratio"] < 0.5


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(tokenizer: Tokenizer) -> Plan:
    windows = Windows(TEXT, tokenizer, 0)
    return Plan(
        measurements=[echo(tokenizer), Drift(windows=windows, context=CONTEXT, tokens=24)],
        lengths=[96, 224],
        samples=3,
        variants=parse_variants(f"dense,{SPARSE}"),
        context=CONTEXT,
    )


@pytest.fixture(scope="module")
def whole(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run to the end."""
    folder = tmp_path_factory.mktemp("whole")
    loaded = execute(plan, folder)
    # Once for each variant, and once for each length where the budget is a share of it.
    assert [setup.config.attention.preset for setup in loaded] == ["dense", "lserve", "lserve"]
    assert [setup.config.attention.token_budget for setup in loaded] == [None, 32, 64]
    assert len(lines(folder)) == 1 + 2 * 2 * 3 * 2
    return folder


def open_setup(variant: Any, config: Any, max_model_len: int) -> Setup:
    return prepare(TINY, max_model_len=max_model_len, **SIZES, **variant.arguments(config))


def execute(plan: Plan, folder: Path) -> list[Setup]:
    """Runs to the end; returns what was loaded."""
    store, loaded = Store(folder, {}), []
    todo = missing(plan, store.rows)
    items = make_items(todo, lambda *_: None)
    loads = make_loads(plan, todo, items, open_setup, lambda *_: None)
    alive: list[weakref.ref[LLM]] = []

    def open_llm(setup: Setup) -> LLM:
        assert not any(llm() for llm in alive), "there may be no room for two models"
        loaded.append(setup)
        llm = LLM.from_setup(setup)
        alive.append(weakref.ref(llm))
        return llm

    store.start(item.line for item in items.values())
    try:
        run(loads, store, reference="dense", max_num_seqs=2, open_llm=open_llm, report=lambda *_: None)
    finally:
        store.close()
    return loaded


def lines(folder: Path) -> list[str]:
    """The results without their times."""
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    return [line.partition(', "seconds"')[0] for line in text.splitlines()]


def test_a_run_that_was_cut_goes_on_to_the_same_results(plan: Plan, whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "results.jsonl"
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:17])
    path.write_bytes(kept[:-30])  # within the first load of the second variant, and within a line
    loaded = execute(plan, tmp_path)
    assert [setup.config.attention.token_budget for setup in loaded] == [32, 64]
    assert lines(tmp_path) == lines(whole)
    assert (tmp_path / "prompts.jsonl").read_bytes() == (whole / "prompts.jsonl").read_bytes()


def test_what_is_done_is_not_loaded_again_and_more_may_be_added(plan: Plan, whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    assert execute(plan, tmp_path) == []
    label = "quest:token_budget=64+sink=0"
    more = dataclasses.replace(plan, samples=1, lengths=plan.lengths[:1], variants=parse_variants(f"dense,{label}"))
    assert [setup.config.attention.preset for setup in execute(more, tmp_path)] == ["quest"]
    assert lines(tmp_path)[:-2] == lines(whole)
    rows = Store(tmp_path, {}).rows
    row = rows["drift", 96, 0, label]
    assert row["attention"]["token_budget"] == 64
    assert row["streaming_share"] == 0
    assert row["agreement"] <= 1
    assert len(rows["drift", 96, 0, "dense"]["token_ids"]) == 24


def test_a_cell_has_as_many_samples_as_there_are(plan: Plan, tokenizer: Tokenizer):
    windows = Windows("a short text of words " * 10, tokenizer, 0)
    few = dataclasses.replace(plan, measurements=[Drift(windows=windows, context=CONTEXT, tokens=24)], samples=9)
    assert len(list(few.prompts())) == windows.count(96)
    with pytest.raises(ValueError, match="drift at length 224 has no samples"):
        few.shortages()
    (line,) = dataclasses.replace(few, lengths=[96]).shortages()
    assert line == f"drift at length 96 has {windows.count(96)} samples, 9 asked for"


def test_numbers_that_are_none_end_the_run(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(self: Any, llm: LLM, items: Sequence[Item], reference: Any) -> list[dict[str, Any]]:
        return [{"nll": float("nan")} for _ in items]

    monkeypatch.setattr(Answers, "measure", broken)
    with pytest.raises(ValueError, match="variant 'dense' gave no number for nll on echo at length 96, index 0"):
        execute(plan, tmp_path)
    assert np.size(lines(tmp_path)) == 1


@pytest.mark.parametrize(("logits_bytes", "expected"), [(2**20, [2, 1]), (1, [1, 1, 1])])
def test_prompts_whose_logits_are_large_are_measured_in_smaller_batches(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logits_bytes: int, expected: list[int]
):
    sizes: list[int] = []

    def counted(self: Any, llm: LLM, items: Sequence[Item], reference: Any) -> list[dict[str, Any]]:
        sizes.append(len(items))
        return [{"nll": 0.5} for _ in items]

    monkeypatch.setattr(Answers, "measure", counted)
    monkeypatch.setattr(runner, "LOGITS_BYTES", logits_bytes)
    small = dataclasses.replace(plan, measurements=plan.measurements[:1], lengths=[96], variants=plan.variants[:1])
    execute(small, tmp_path)
    assert sizes == expected


def test_results_of_settings_that_have_changed_since_are_refused(plan: Plan, whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"sink": 16', '"sink": 32'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"was measured with sink=32 and now has 16: its defaults have changed"):
        execute(plan, tmp_path)
