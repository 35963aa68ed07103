"""Results on disk survive an interruption, and nothing is lost to a mistake."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lserve_jax.evaluation.origin import Origin
from lserve_jax.evaluation.store import Store

SETTINGS = {"model": "tiny", "seed": 0, "tail": None}
PROMPTS = [{"task": "echo", "length": 64, "index": index, "text": f"prompt {index}"} for index in range(3)]


def row(index: int, variant: str = "dense", **values: Any) -> dict[str, Any]:
    return {"task": "echo", "length": 64, "index": index, "variant": variant, **values}


def filled(folder: Path) -> Store:
    store = Store(folder, SETTINGS)
    store.start(PROMPTS)
    for index in range(3):
        store.append(row(index, score=index / 2, answer="ja – 是"))
    store.close()
    return store


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_added_is_read_again(tmp_path: Path):
    rows = filled(tmp_path / "out").rows
    again = Store(tmp_path / "out", SETTINGS)
    assert again.rows == rows
    assert list(again.rows) == [("echo", 64, index, "dense") for index in range(3)]
    assert again.rows["echo", 64, 1, "dense"]["answer"] == "ja – 是"
    assert not again.notes
    first, *_ = (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(first) == {"settings": SETTINGS}


def test_looking_creates_and_changes_nothing(tmp_path: Path):
    Store(tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()
    filled(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    Store(tmp_path / "out", SETTINGS)
    assert snapshot(tmp_path / "out") == before


def test_a_run_goes_on_where_it_was(tmp_path: Path):
    filled(tmp_path)
    store = Store(tmp_path, SETTINGS)
    store.start([*PROMPTS[:1], {"task": "other", "length": 64, "index": 0, "text": "new"}])
    store.append(row(0, "lserve", score=1.0))
    store.close()
    again = Store(tmp_path, SETTINGS)
    assert len(again.rows) == 4
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["prompt 0", "prompt 1", "prompt 2", "new"]


@pytest.mark.parametrize("name", ["results.jsonl", "prompts.jsonl"])
@pytest.mark.parametrize("lost", [1, 7])
def test_a_last_line_that_was_cut_is_dropped_with_a_note(tmp_path: Path, name: str, lost: int):
    filled(tmp_path)
    whole = snapshot(tmp_path)
    (tmp_path / name).write_bytes(whole[name][:-lost])
    store = Store(tmp_path, SETTINGS)
    (note,) = store.notes
    assert name in note and "cut" in note
    assert (tmp_path / name).read_bytes() == whole[name][:-lost]  # only writing drops it
    assert len(store.rows) == (2 if name == "results.jsonl" else 3)
    store.start(PROMPTS)
    for index in range(len(store.rows), 3):
        store.append(row(index, score=index / 2, answer="ja – 是"))
    store.close()
    assert snapshot(tmp_path) == whole


def test_a_run_that_was_cut_before_its_first_row_starts_anew(tmp_path: Path):
    filled(tmp_path)
    whole = snapshot(tmp_path)
    (tmp_path / "results.jsonl").write_bytes(whole["results.jsonl"][:5])
    filled(tmp_path)
    assert snapshot(tmp_path) == whole


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b"{broken", ("line 3 is no JSON object",)),
        (b"[1]", ("line 3 is no JSON object",)),
        (b"", ("line 3 is no JSON object",)),
        (b'{"task": "\xff"}', ("line 3 is no JSON object",)),
        (b'{"task": "echo", "length": "64"}', ("line 3 has no valid 'length'",)),
        (b'{"task": "echo", "length": 64, "index": 1}', ("line 3 has no valid 'variant'",)),
    ],
)
def test_a_malformed_line_is_named_and_nothing_changes(tmp_path: Path, line: bytes, parts: tuple[str, ...]):
    filled(tmp_path)
    lines = (tmp_path / "results.jsonl").read_bytes().split(b"\n")
    (tmp_path / "results.jsonl").write_bytes(b"\n".join([*lines[:2], line, *lines[3:]]))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
        Store(tmp_path, SETTINGS)
    assert "results.jsonl" in str(error.value) and "\n" not in str(error.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SETTINGS, "seed": 1}, "was made with seed=0, this run has 1: name another --out, or take the same seed"),
        ({**SETTINGS, "model": "big"}, 'was made with model="tiny", this run has "big"'),
        ({**SETTINGS, "new": 3}, "was made with new=null, this run has 3"),
        ({"model": "tiny", "seed": 0}, None),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], message: str | None):
    filled(tmp_path)
    before = snapshot(tmp_path)
    if message is None:  # a setting that is off is no setting
        Store(tmp_path, settings)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        Store(tmp_path, settings)
    assert snapshot(tmp_path) == before


ORIGIN: Origin = {"checkpoint": "c1", "tokenizer": "t1", "pattern": None, "source": "s1"}
NAMED = {"model": "m", "tokenizer": None, "head_pattern": None}


def measured(folder: Path, origin: Origin | None = ORIGIN, rows: int = 2) -> None:
    store = Store(folder, NAMED, origin)
    store.start([])
    for index in range(rows):
        store.append(row(index))
    store.close()


def test_a_result_keeps_what_it_was_measured_on(tmp_path: Path):
    measured(tmp_path)
    again = Store(tmp_path, NAMED, ORIGIN)
    assert [kept["measured_on"] for kept in again.rows.values()] == [ORIGIN] * 2
    assert again.notes == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint": "c2"}, "another checkpoint (checkpoint c1, now c2): name another --out, or take the same"),
        ({"tokenizer": "t2"}, "another tokenizer (tokenizer t1, now t2)"),
        ({"pattern": "p1"}, "another head pattern (pattern None, now p1)"),
    ],
)
def test_another_checkpoint_or_pattern_of_the_same_name_is_refused(tmp_path: Path, changes: Origin, words: str):
    measured(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        Store(tmp_path, NAMED, ORIGIN | changes)
    assert "\n" not in str(error.value)
    assert snapshot(tmp_path) == before


def test_the_same_checkpoint_and_pattern_may_be_named_otherwise(tmp_path: Path):
    other = {"model": "./m", "tokenizer": "m", "head_pattern": "p"}
    measured(tmp_path, rows=0)
    with pytest.raises(ValueError, match='was made with model="m"'):  # nothing says yet which model that was
        Store(tmp_path, other, ORIGIN)
    measured(tmp_path)
    assert len(Store(tmp_path, other, ORIGIN).rows) == 2


def test_results_of_other_sources_are_kept_with_a_remark(tmp_path: Path):
    measured(tmp_path)
    (note,) = Store(tmp_path, NAMED, ORIGIN | {"source": "s2"}).notes
    assert "other sources of this package measured some of the results" in note


def test_results_of_earlier_versions_are_read_with_a_remark_and_compared_by_name(tmp_path: Path):
    measured(tmp_path, origin=None)
    store = Store(tmp_path, NAMED, ORIGIN)
    (note,) = store.notes
    assert "2 results do not say which checkpoint and head pattern they were measured on" in note
    with pytest.raises(ValueError, match='was made with model="m", this run has "other"'):
        Store(tmp_path, NAMED | {"model": "other"}, ORIGIN)
    store.start([])
    store.append(row(2))
    store.close()
    with pytest.raises(ValueError, match="another checkpoint"):  # than that of the new result
        Store(tmp_path, NAMED, ORIGIN | {"checkpoint": "c2"})


@pytest.mark.parametrize("name", ["accuracy", "ablation", "drift", "random_patterns"])
def test_committed_results_are_read(name: str):
    folder = Path(__file__).parents[3] / "bench" / "results" / name
    settings = json.loads((folder / "results.jsonl").read_text(encoding="utf-8").splitlines()[0])["settings"]
    assert len(Store(folder, settings).rows) > 0


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "results.jsonl").write_text('{"score": 1}\n')
    with pytest.raises(ValueError, match="line 1 holds no settings"):
        Store(tmp_path, SETTINGS)


def test_another_prompt_under_the_same_name_is_refused_before_anything_is_written(tmp_path: Path):
    filled(tmp_path)
    before = snapshot(tmp_path)
    store = Store(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="echo at length 64, index 1, is another prompt than the one made now"):
        store.start([{**PROMPTS[1], "text": "changed"}])
    assert snapshot(tmp_path) == before


def test_two_runs_cannot_write_to_one_folder(tmp_path: Path):
    filled(tmp_path)
    first, second = Store(tmp_path, SETTINGS), Store(tmp_path, SETTINGS)
    first.start([])
    with pytest.raises(ValueError, match="another run is writing to it"):
        second.start([])
    first.append(row(0, "lserve"))
    first.close()
    with pytest.raises(ValueError, match="has changed since it was read"):
        second.start([])
    assert len(Store(tmp_path, SETTINGS).rows) == 4


def test_a_number_that_is_none_is_not_written(tmp_path: Path):
    store = Store(tmp_path, SETTINGS)
    store.start([])
    with pytest.raises(ValueError, match="JSON"):
        store.append(row(0, score=float("nan")))
    store.close()
    assert Store(tmp_path, SETTINGS).rows == {}
