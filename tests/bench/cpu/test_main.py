"""The command line of the bench on a CPU, and one run with real workers."""

from pathlib import Path

import pytest

from bench.cpu.__main__ import main, parse
from tests.bench.cpu.fakes import TINY, lines_of


def test_arguments_read_lengths_in_thousands_and_settings_with_lists():
    args = parse(["--out", "x", "--lengths", "128,2k", "--ours", "dense,lserve:dense_layers=0,1+sink=64, streaming"])
    assert args.lengths == [128, 2048]
    assert args.long_lengths == [8192, 32768, 131072]
    assert args.ours == ["dense", "lserve:dense_layers=0,1+sink=64", "streaming"]
    with pytest.raises(SystemExit):
        parse(["--out", "x", "--parts", "single,fast"])


@pytest.mark.slow
def test_a_tiny_model_is_measured_in_processes_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["--out", str(tmp_path / "out"), "--model", TINY, "--work", str(tmp_path / "work"), "--threads", "1"]
    command += ["--parts", "single", "--ours", "dense", "--peers", "transformers bf16"]
    assert main([*command, "--lengths", "80", "--rounds", "2", "--steps", "8"]) == 0
    lines = lines_of(tmp_path / "out")
    assert [line["round"] for line in lines] == [0, 1]
    for line in lines:
        assert line["prefill_tok_per_s"] > 0
        assert line["ms_per_token"] > 0
        assert line["programs"] == ["decode", "prefill_256", "sample"]
        assert len(line["tokens"]) == 8
        assert 0 < line["facts"]["base_bytes"] < line["peak_bytes"]
        assert [n for n, _ in line["prefill_curve"]] == [80]
    assert lines[0]["tokens"] == lines[1]["tokens"]
    assert [line["system"] for line in lines_of(tmp_path / "out", "missing")] == ["transformers bf16"]
    assert "all that was asked for is there" in capsys.readouterr().out
    assert (tmp_path / "out" / "targets.txt").exists()


def test_a_setting_that_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--out", str(tmp_path), "--model", TINY, "--ours", "lserve:sink=-1", "--peers", ""]) == 2
    assert capsys.readouterr().err.count("\n") == 1
