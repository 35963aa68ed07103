"""The numbers of a run, exactly."""

import pytest

from bench.serve.client import Answer
from bench.serve.load import Request
from bench.serve.summary import Limits, arrival, gaps, is_good, request_line, summary
from bench.serve.workloads import ALONE, BOTH, STREAM
from tests.bench.serve.fakes import request

LIMITS = Limits(ttft_s=1.0, gap_s=0.5)


def test_a_request_is_written_with_the_times_of_its_texts():
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}
    answer = Answer(sent=12.0, text="x", times=[0.25, 0.5], end=0.75, usage=usage, finish_reason="length")
    assert request_line(Request("s", 1, 2, answer), begin=10.0) == {
        "stage": "s",
        "script": 1,
        "turn": 2,
        "sent_s": 2.0,
        "end_s": 0.75,
        "times_s": [0.25, 0.5],
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "cached_tokens": 8,
        "finish_reason": "length",
        "error": None,
    }
    for usage in ({}, {"prompt_tokens_details": None}):
        assert request_line(Request("s", 0, 0, Answer(sent=0.0, usage=usage)), 0.0)["cached_tokens"] is None


def test_a_request_is_good_within_both_limits():
    assert is_good(request(0, [1.0, 1.5]), LIMITS)
    assert not is_good(request(0, [1.01, 1.02]), LIMITS)
    assert not is_good(request(0, [0.5, 1.02]), LIMITS)
    assert not is_good(request(0, [0.5], error="broken"), LIMITS)
    assert not is_good(request(0, []), LIMITS)
    many = [0.01 * n for n in range(202)]
    many = [*many, many[-1] + 0.9]  # one long gap of 202 is beyond the 99th percentile
    assert is_good(request(0, many), LIMITS)


def test_a_summary_counts_what_was_answered():
    lines = [
        request(1.0, [0.5, 1.0, 1.5], cached_tokens=5),
        request(3.0, [1.5, 1.75], turn=1, end_s=2.0),
        request(2.0, [0.25], error="broken", completion_tokens=None, end_s=9.0),
    ]
    found = summary(lines, LIMITS)
    assert (found["requests"], found["errors"]) == (3, 1)
    assert found["seconds"] == 10.0, "from the first that was sent to the last end, that of the failed one"
    assert (found["prompt_tokens"], found["cached_tokens"], found["completion_tokens"]) == (20, 5, 5)
    assert (found["tok_per_s"], found["good_tok_per_s"]) == (0.5, 0.3)
    assert found["good_share"] == pytest.approx(1 / 3, rel=1e-4)
    assert (found["ttft_p50_s"], found["ttft_max_s"]) == (1.0, 1.5)
    assert found["ttft_p99_s"] == pytest.approx(0.5 + 0.99)
    assert (found["first_turn_ttft_p50_s"], found["later_turn_ttft_p50_s"]) == (0.5, 1.5)
    assert (found["gap_p50_s"], found["gap_max_s"]) == (0.5, 0.5)
    assert found["whole_p50_s"] == 1.75
    assert found["is_usage_reported"]


def test_without_usage_texts_are_counted_and_it_is_said():
    found = summary([request(0, [0.5, 1.0], completion_tokens=None, cached_tokens=None)], LIMITS)
    assert found["completion_tokens"] == 2
    assert not found["is_usage_reported"]
    assert found["cached_tokens"] is None


def test_nothing_answered_has_no_times():
    found = summary([request(0, [], error="broken", end_s=1.0)], LIMITS)
    assert found["tok_per_s"] == 0
    assert not [name for name in found if name.startswith(("ttft", "gap", "whole"))]


def arriving(stream_times: list[float], long_first: float = 3.0) -> list[dict[str, object]]:
    return [
        request(0, [4.0], stage=ALONE, prompt_tokens=2000),
        request(10, [0.1, 0.1, 0.4, 0.4], stage=STREAM),
        request(20, stream_times, stage=BOTH),
        request(21, [long_first], stage=BOTH, script=1),
    ]


def test_the_longest_gap_is_that_beside_the_long_prompt():
    # Gaps before the prompt was sent (at 1.0 of the stream) and after its first text (at 4.0) do not count.
    found = arrival(arriving([0.1, 0.9, 1.5, 2.5, 3.9, 4.2, 9.0]), chunk=256)
    assert found["longest_gap_s"] == pytest.approx(1.4)
    assert (found["chunks"], found["chunk_s"]) == (8, 0.5)
    assert found["burst_s"] == pytest.approx(0.3)
    assert not found["has_ended_before"]


def test_a_gap_that_covers_the_whole_prefill_counts():
    found = arrival(arriving([0.1, 0.9, 6.0]), chunk=256)
    assert found["longest_gap_s"] == pytest.approx(5.1)


def test_a_stream_that_ended_before_is_told():
    assert arrival(arriving([0.1, 0.9, 1.5, 2.5]), chunk=256)["has_ended_before"]
    assert arrival(arriving([0.1, 0.9]), chunk=256) == {}
    assert arrival(arriving([])[:3], chunk=256) == {}


def test_gaps_are_between_texts():
    assert gaps(request(0, [0.5, 0.75, 0.75])) == [0.25, 0.0]
    assert gaps(request(0, [0.5])) == gaps(request(0, [])) == []
