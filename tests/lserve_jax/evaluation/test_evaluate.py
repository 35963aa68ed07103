"""`python -m lserve_jax.evaluate`: the whole command on a tiny model, interrupted and taken up again, and refused."""

import contextlib
import dataclasses
import json
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lserve_jax.evaluate import main
from lserve_jax.evaluation import ablations
from lserve_jax.evaluation.store import Store
from lserve_jax.evaluation.variants import parse_variant
from lserve_jax.weights.safetensors import SafetensorsFolder
from lserve_jax.weights.tensors import Inventory
from tests.lserve_jax import checkpoints

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
TOKENIZER = ROOT / "tests" / "golden" / "tiny" / "llama3"  # about a character a token
SPARSE = "lserve:page_size=16+sub_page_size=4+sink=16+local=64+prefill_local=64+token_budget=25%"
TASKS = ("--tasks", "niah_single_1,perplexity,drift", "--lengths", "700", "--samples", "3")
SIZES = ("--batch", "2", "--tail", "16", "--drift-tokens", "24", "--corpus", str(ROOT / "LICENSE"))
VARIANTS = ("--variants", f"dense,{SPARSE}")
COMMAND = (*TASKS, *SIZES, *VARIANTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a context of 1100 tokens and a head pattern."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = checkpoints.tiny_config(vocab_size=128, max_position_embeddings=1100, **sizes)
    tensors = {name: 0.3 * tensor for name, tensor in checkpoints.random_tensors(config).items()}
    folder = checkpoints.write_folder(tmp_path_factory.mktemp("tiny"), config, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    np.savetxt(folder / "full_attention_heads.tsv", np.array([[0, 1]]), delimiter="\t")
    return folder


@dataclasses.dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def run(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command in this process; results go to tmp_path/out unless --out says otherwise."""

    def call(*arguments: str) -> Result:
        capfd.readouterr()
        own = ("--model", str(model), "--head-pattern", str(model), "--out", str(tmp_path / "out"))
        try:
            status = main([*own, *arguments])
        except SystemExit as end:
            status = end.code
        assert isinstance(status, int)
        captured = capfd.readouterr()
        return Result(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    command = ["--model", str(model), "--head-pattern", str(model), "--out", str(folder), "--quiet", *COMMAND]
    assert main(command) == 0
    return folder


@pytest.fixture
def without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model fails."""
    monkeypatch.setattr("lserve_jax.weights.load.Checkpoint.load_params", None)


def lines(folder: Path) -> list[str]:
    """The results without their times."""
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    return [line.partition(', "seconds"')[0] for line in text.splitlines()]


# --- what comes of it ------------------------------------------------------------------------------------------------


def test_a_run_leaves_settings_rows_prompts_summary_and_pictures(whole: Path):
    settings, *rows = [json.loads(line) for line in (whole / "results.jsonl").read_text().splitlines()]
    assert settings["settings"].items() >= {"seed": 0, "reference": "dense", "tail": 16, "raw": False}.items()
    assert len(rows) == 3 * 3 * 2
    prompts = [json.loads(line) for line in (whole / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(prompts) == 3 * 3
    for row in rows:
        (prompt,) = [p for p in prompts if all(p[name] == row[name] for name in ("task", "length", "index"))]
        if row["task"] == "niah_single_1":
            assert 0.98 * row["length"] <= row["prompt_tokens"] <= row["length"]
            assert prompt["references"][0] in prompt["text"]
            assert row["score"] == float(prompt["references"][0] in row["answer"])
        assert row["streaming_share"] == (0.5 if row["variant"] == SPARSE else 0)
        assert row["pages_read_ratio"] == 1 if row["variant"] == "dense" else row["pages_read_ratio"] < 0.6
    assert {row["attention"]["token_budget"] for row in rows} == {None, 176}
    assert {(row["weight_dtype"], row["weights"]) for row in rows} == {("auto", "float32")}
    summary = json.loads((whole / "summary.json").read_text())
    assert len(summary["cells"]) == 3 * 2
    names = {"results.jsonl", "prompts.jsonl", "summary.json", "reference", "niah_single_1.png", "scores.png"}
    pytest.importorskip("matplotlib")
    assert {path.name for path in whole.iterdir()} == names | {"perplexity.png", "drift.png"}


def test_rows_of_decoded_targets_have_their_divergence_from_the_reference(whole: Path):
    _, *rows = [json.loads(line) for line in (whole / "results.jsonl").read_text().splitlines()]
    for row in rows:
        is_compared = row["variant"] == SPARSE and row["task"] != "drift"
        assert {name for name in ("kl", "same_token") if name in row} == (
            {"kl", "same_token"} if is_compared else set()
        )
        assert not is_compared or (0 < row["kl"] < 10 and 0 <= row["same_token"] <= 1)
    kept = {path.name for path in (whole / "reference").iterdir()}
    assert kept == {f"{task}-700-{index}.npz" for task in ("niah_single_1", "perplexity") for index in range(3)}
    cells = json.loads((whole / "summary.json").read_text())["cells"]
    assert [cell["kl"]["n"] for cell in cells if "kl" in cell] == [3, 3]


def test_a_folder_of_an_earlier_version_goes_on_without_divergences_and_says_so(
    run: Callable[..., Result], whole: Path, tmp_path: Path
):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("results.jsonl", "prompts.jsonl"):
        lines = (whole / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (out / name).write_text("".join(line for line in lines if f'"variant": "{SPARSE}"' not in line))
    command = ("--tasks", "niah_single_1,drift", *TASKS[2:], *SIZES, *VARIANTS)
    result = run(*command)
    assert result.status == 0
    (warning,) = (line for line in result.err.splitlines() if "kl" in line)
    assert f"no kl and same_token for 3 of 6 prompts: {out} lacks the reference's distributions" in warning
    assert warning.endswith("name a new --out")
    _, *rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    sparse = [row for row in rows if row["variant"] == SPARSE]
    assert len(sparse) == 6
    assert not [row for row in rows if "kl" in row or "same_token" in row]
    again = run(*command)
    assert (again.status, "kl" in again.err) == (0, False), "nothing is left to do"


def test_a_reference_file_that_was_cut_is_one_line(run: Callable[..., Result], whole: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / "reference" / "niah_single_1-700-1.npz"
    path.write_bytes(path.read_bytes()[:-40])
    label = "quest:dense_layers=0+token_budget=96"
    command = ("--tasks", "niah_single_1", *TASKS[2:], *SIZES, "--variants", f"dense,{label}", "--quiet")
    result = run(*command)
    assert (result.status, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert f"variant {label!r} on niah_single_1 at length 700: {path}: damaged" in line
    assert line.endswith("delete it to go on without this prompt's kl, or name another --out")
    path.unlink()
    result = run(*command[:-1])
    assert result.status == 0
    assert "no kl and same_token for 1 of 3 prompts" in result.err
    _, *rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert ["kl" in row for row in rows if row["variant"] == label] == [True, False, True]


def test_what_is_done_is_shown_again_without_loading(run: Callable[..., Result], whole: Path, without_loading: None):
    before = (whole / "results.jsonl").read_bytes()
    shown = run("--out", str(whole), *COMMAND)
    assert shown.status == 0
    assert [table.split()[0] for table in shown.out.split("\n\n")] == ["task"] * 3
    assert f"drift     700  {SPARSE}  3 " in shown.out
    assert "summary.json" in shown.err
    found = run("--out", str(whole), *COMMAND, "--json", "--quiet")
    assert found.err == ""
    cells = [json.loads(line) for line in found.out.splitlines()]
    assert {cell["variant"] for cell in cells} == {"dense", SPARSE}
    assert (whole / "results.jsonl").read_bytes() == before


def test_a_run_shows_progress_on_stderr_and_only_tables_on_stdout(run: Callable[..., Result]):
    result = run("--tasks", "niah_single_1", "--lengths", "700", "--samples", "2", *SIZES, "--variants", "dense")
    assert result.status == 0
    assert result.out.splitlines()[1].split()[:4] == ["niah_single_1", "700", "dense", "2"]
    assert len(result.out.splitlines()) == 2
    for part in ("prompts: 100%", "weights: 100%", "compile", "dense (1/1): 100%"):
        assert part in result.err


def test_a_model_is_opened_and_read_once_for_all_variants(
    run: Callable[..., Result], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read: list[Any] = []

    class Counted(SafetensorsFolder):
        def inventory(self) -> Inventory:
            read.append(self)
            return super().inventory()

    monkeypatch.setattr("lserve_jax.weights.load.SafetensorsFolder", Counted)
    own = (*TASKS[:-1], "1", *SIZES, "--quiet")  # the reference's heads, then others, then the reference's again
    assert run(*own, "--variants", f"dense,{SPARSE},quest:dense_layers=0+token_budget=96").status == 0
    assert len(read) == 1
    label = f'"variant": "{SPARSE}"'
    mine, theirs = ([line for line in lines(folder) if label in line] for folder in (tmp_path / "out", whole))
    assert set(mine) <= set(theirs)
    assert len(mine) == 3


def test_a_variant_whose_budget_is_lifted_reads_all_pages(run: Callable[..., Result], tmp_path: Path):
    lifted = f"{SPARSE.removesuffix('+token_budget=25%')}+token_budget=all"
    sizes = ("--max-num-seqs", "2", "--corpus", str(ROOT / "LICENSE"), "--variants", f"{lifted},{SPARSE}")
    assert run("--tasks", "niah_single_1", "--lengths", "700", "--samples", "1", *sizes, "--quiet").status == 0
    _, *rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    budgets = {row["variant"]: row["attention"]["token_budget"] for row in rows}
    assert budgets == {lifted: None, SPARSE: 176}
    assert [row["pages_read_ratio"] < 0.6 for row in rows if row["variant"] == SPARSE] == [True]


def test_variants_may_differ_in_the_form_of_their_weights(run: Callable[..., Result], tmp_path: Path):
    command = ("--tasks", "perplexity", "--lengths", "700", "--samples", "1", *SIZES, "--quiet")
    variants = ("--variants", f"dense,dense:weight_dtype=int8,{SPARSE}+weight_dtype=int4,{SPARSE}")
    assert run(*command, *variants).status == 0
    _, *rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    found = {row["variant"]: (row["weight_dtype"], row["weights"]) for row in rows}
    assert found == {
        "dense": ("auto", "float32"),
        "dense:weight_dtype=int8": ("int8", "int8"),
        f"{SPARSE}+weight_dtype=int4": ("int4", "int8, int4 in groups of 32, int4 in groups of 8"),
        SPARSE: ("auto", "float32"),
    }
    nll = {row["variant"]: row["nll"] for row in rows}
    assert 0 < abs(nll["dense:weight_dtype=int8"] - nll["dense"]) < 0.1 * nll["dense"]
    assert len({row["measured_on"]["checkpoint"] for row in rows}) == 1
    # Variants that name no form have that of the run, which the folder's results must have too.
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert run(*command, *variants, "--weight-dtype", "auto").status == 0
    result = run(*command, *variants, "--weight-dtype", "int8")
    assert (result.status, result.out) == (2, "")
    assert "variant 'dense' was measured with weight_dtype=auto and now has int8: name a new --out" in result.err
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before
    settings = ablations.settings(
        dataclasses.replace(parse_variant("dense"), weight_dtype="bfloat16"), ["weight_dtype"], num_layers=1
    )
    assert [setting.variant.label for setting in settings] == [
        "dense:weight_dtype=auto",
        "dense",
        "dense:weight_dtype=int8",
        "dense:weight_dtype=int4",
    ]
    assert json.loads(json.dumps(settings[2].as_json()))["variant"]["weight_dtype"] == "int8"


def test_a_stopped_run_says_how_to_go_on_and_comes_to_the_same(
    run: Callable[..., Result], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    append, rows = Store.append, []

    def interrupted(self: Store, row: Mapping[str, Any]) -> None:
        append(self, row)
        rows.append(row)
        if len(rows) == 4:
            signal.raise_signal(signal.SIGINT)

    path = tmp_path / "out" / "results.jsonl"
    with monkeypatch.context() as patch, interrupts():
        patch.setattr(Store, "append", interrupted)
        stopped = run(*COMMAND, "--quiet")
    assert (stopped.status, stopped.out) == (130, "")
    assert stopped.err == f"stopped: what was done is in {tmp_path / 'out'}, and the same command goes on from there\n"
    assert lines(tmp_path / "out") == lines(whole)[: 1 + len(rows)]
    path.write_bytes(path.read_bytes()[:-9])  # as if it had been killed while it was writing
    resumed = run(*COMMAND)
    assert resumed.status == 0
    assert f"{path}: the last line is cut off" in resumed.err
    assert lines(tmp_path / "out") == lines(whole)
    assert (tmp_path / "out" / "prompts.jsonl").read_bytes() == (whole / "prompts.jsonl").read_bytes()


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """SIGINT is a KeyboardInterrupt, as in a program at a terminal: in the background it would be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_ablation_has_tables_and_a_picture_for_each_axis(
    run: Callable[..., Result], whole: Path, tmp_path: Path, without_loading: None
):
    settings = ablations.settings(parse_variant(SPARSE), ["reduction", "forced_sink"], num_layers=2)
    changed = {setting.variant.label for setting in settings} - {SPARSE}
    assert len(changed) == 2
    rows = (whole / "results.jsonl").read_text(encoding="utf-8")
    base = [line for line in rows.splitlines(keepends=True) if f'"variant": "{SPARSE}"' in line]
    out = tmp_path / "out"
    out.mkdir()
    # As if the changed variants had been measured too.
    variants = {setting.variant.label: setting.variant for setting in settings}
    measured = [
        json.dumps({**row, "variant": label, "attention": dataclasses.asdict(variants[label].config(row["length"]))})
        for label in sorted(changed)
        for row in map(json.loads, base)
    ]
    (out / "results.jsonl").write_text(rows + "".join(f"{line}\n" for line in measured), encoding="utf-8")
    result = run(*TASKS, *SIZES, "--ablation", "reduction,forced_sink", "--base", SPARSE)
    assert result.status == 0
    axes = {}
    for axis in ("reduction", "forced_sink"):
        _, dense, *rows = result.out.partition(f"{axis}\n")[2].partition("\n\n")[0].splitlines()
        assert dense.split()[2] == "dense"
        axes[axis] = [row.split()[2] for row in rows]
    assert axes == {
        "reduction": ["group_reduction=max", "group_reduction=mean"],
        "forced_sink": ["is_sink_forced=true", "is_sink_forced=false"],
    }
    pytest.importorskip("matplotlib")
    pictures = {path.name for path in out.glob("*.png")}
    assert pictures == {"ablation_reduction.png", "ablation_forced_sink.png"}


def test_published_files_are_a_task_with_the_samples_they_have(run: Callable[..., Result], tmp_path: Path):
    record = {"input": "Who?", "context": "word " * 400, "answers": ["Ada"], "length": 400, "all_classes": None}
    (tmp_path / "qasper.jsonl").write_text("".join(json.dumps(record | {"_id": str(i)}) + "\n" for i in range(2)))
    options = ("--longbench", str(tmp_path), "--lengths", "800", "--samples", "5", *SIZES, "--variants", "dense")
    result = run("--tasks", "longbench:qasper", *options)
    assert result.status == 0
    assert "longbench:qasper at length 800 has 2 samples, 5 asked for" in result.err
    assert result.out.splitlines()[1].split()[:4] == ["longbench:qasper", "800", "dense", "2"]


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--tasks", "niah"), ("--tasks: 'niah' must be one of niah_single_1", "perplexity, drift or longbench:NAME")),
        (("--tasks", "niah_single_1,,vt"), ("--tasks: ''",)),
        (("--tasks", "longbench:nothing"), ("'longbench:nothing'", "qasper")),
        (("--tasks", "longbench:qasper", "--longbench", "nowhere"), ("qasper.jsonl", "nowhere")),
        (("--lengths", "700,x"), ("--lengths '700,x' must be whole numbers",)),
        (("--lengths", "0"), ("--lengths '0'",)),
        (("--lengths", "700,4096"), ("--lengths: 4096 is beyond the 1100 tokens",)),
        (("--lengths", "1090"), ("niah_single_1 at length 1090 takes", "context is 1100")),
        (("--lengths", "90"), ("niah_single_1", "at least", "90")),
        (("--tasks", "perplexity", "--lengths", "16"), ("perplexity at length 16", "16 of its tail")),
        (("--samples", "0"), ("--samples must be at least 1, got 0",)),
        (("--max-num-seqs", "0"), ("--max-num-seqs must be at least 1, got 0",)),
        (("--tail", "x"), ("--tail 'x' must be a whole number",)),
        (("--drift-tokens", "-1"), ("--drift-tokens must be at least 1, got -1",)),
        (("--seed", "-1"), ("--seed must be at least 0, got -1",)),
        (("--samples", "many"), ("--samples", "'many'")),
        (("--variants", "dense,vllm"), ("variant 'vllm'", "must be one of lserve, dense")),
        (("--variants", "dense,lserve:window=3"), ("unknown field 'window'",)),
        (("--variants", "dense,lserve:token_budget=16"), ("'lserve:token_budget=16'", "at least 32")),
        (("--variants", "dense,lserve:dense_layers=7"), ("dense_layers=[7] do not exist",)),
        (("--variants", "dense,lserve:head_pattern=nowhere"), ("nowhere", "full_attention_heads.tsv")),
        (("--ablation", "colour"), ("ablation 'colour' must be one of page, budget",)),
        (("--variants", "dense,dense:weight_dtype=int3"), ("weight_dtype=int3 must be one of auto, bfloat16",)),
        (("--weight-dtype", "int3"), ("--weight-dtype", "int3")),
        (("--corpus", "nowhere.txt", "--tasks", "drift"), ("nowhere.txt", "no such file")),
        (("--haystack", "nowhere"), ("haystack nowhere", "no such folder")),
        (("--model", "nowhere"), ("nowhere", "no such file or folder")),
        (("--batch", "2", "--recall-interval", "0"), ("recall_interval=0 must be a whole number from 1",)),
        (("--implementation", "mosaic_gpu"), ("Hopper",)),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_loaded_or_written(
    run: Callable[..., Result],
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
    without_loading: None,
    tmp_path: Path,
):
    result = run(*COMMAND, "--quiet", *arguments)
    assert result.status == 2
    assert result.out == ""
    (line,) = result.err.splitlines()
    for part in parts:
        assert part in line
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_settings_or_a_broken_one_is_refused_and_left_alone(
    run: Callable[..., Result], whole: Path, tmp_path: Path, without_loading: None
):
    folder = tmp_path / "out"
    folder.mkdir()
    content = (whole / "results.jsonl").read_bytes()
    (folder / "results.jsonl").write_bytes(content)
    for arguments, part in (
        (("--seed", "1"), "seed=0, this run has 1"),
        (("--variants", f"{SPARSE},dense"), 'reference="dense"'),
    ):
        result = run(*COMMAND, "--quiet", *arguments)
        assert (result.status, result.out) == (2, "")
        assert part in result.err and len(result.err.splitlines()) == 1
    broken = content.replace(b'{"task"', b'{task"', 1)
    (folder / "results.jsonl").write_bytes(broken)
    result = run(*COMMAND, "--quiet")
    assert result.status == 2
    assert "results.jsonl: line 2 is no JSON object" in result.err
    assert (folder / "results.jsonl").read_bytes() == broken
    assert [path.name for path in folder.iterdir()] == ["results.jsonl"]


def copied(model: Path, to: Path) -> Path:
    """A copy of the model that a test may change."""
    shutil.copytree(model, to)
    return to


def test_a_run_is_not_continued_with_another_training_step_or_pattern_of_the_same_name(
    run: Callable[..., Result], whole: Path, model: Path, tmp_path: Path, without_loading: None
):
    command = ("--out", str(whole), *COMMAND, "--quiet")
    before = (whole / "results.jsonl").read_bytes()
    trained = copied(model, tmp_path / "trained")
    tensors = load_file(trained / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, trained / "model.safetensors")
    result = run(*command, "--model", str(trained))
    assert (result.status, result.out) == (2, "")
    assert "was measured on another checkpoint" in result.err and len(result.err.splitlines()) == 1
    found_anew = copied(model, tmp_path / "found_anew")
    np.savetxt(found_anew / "full_attention_heads.tsv", np.array([[1, 0]]), delimiter="\t")
    result = run(*command, "--head-pattern", str(found_anew))
    assert (result.status, result.out) == (2, "")
    assert "was measured on another head pattern" in result.err and len(result.err.splitlines()) == 1
    assert (whole / "results.jsonl").read_bytes() == before


def test_a_variants_own_pattern_is_compared_too(
    run: Callable[..., Result], model: Path, tmp_path: Path, without_loading: None, whole: Path
):
    own = copied(model, tmp_path / "own")
    label = f"{SPARSE}+head_pattern={own}"
    out = tmp_path / "out"
    out.mkdir()
    text = (whole / "results.jsonl").read_text(encoding="utf-8")
    (out / "results.jsonl").write_text(text.replace(f'"variant": "{SPARSE}"', f'"variant": "{label}"'))
    command = (*TASKS, *SIZES, "--variants", f"dense,{label}", "--quiet")
    assert run(*command).status == 0
    np.savetxt(own / "full_attention_heads.tsv", np.array([[1, 0]]), delimiter="\t")
    result = run(*command)
    assert (result.status, result.out) == (2, "")
    assert "was measured with another head pattern: other heads streamed" in result.err


def test_a_model_and_pattern_that_moved_are_the_same(
    run: Callable[..., Result], whole: Path, model: Path, tmp_path: Path, without_loading: None
):
    moved = copied(model, tmp_path / "moved")
    command = ("--out", str(whole), *COMMAND, "--quiet")
    assert run(*command, "--model", str(moved), "--head-pattern", str(moved)).err == ""


def test_all_of_a_text_shorter_than_a_window_is_refused(run: Callable[..., Result], tmp_path: Path):
    (tmp_path / "short.txt").write_text("only a few words")
    result = run(*COMMAND, "--quiet", "--corpus", str(tmp_path / "short.txt"))
    assert result.status == 2
    assert "perplexity at length 700 has no samples: its text is too short" in result.err
