"""`python -m lserve_jax.calibrate`: what it writes, that a seed repeats it, resumption, and refusals in one line."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from lserve_jax import calibrate, classify, load_gates
from lserve_jax.calibrate import SMOOTHING_PROMPTS, main
from lserve_jax.calibration import training, windows
from lserve_jax.calibration.folder import require_target, write_pattern
from lserve_jax.calibration.masked import masked_step, retrieval_heads
from lserve_jax.calibration.picture import head_map
from lserve_jax.calibration.reader import Reader
from lserve_jax.calibration.replay import Replayer
from lserve_jax.calibration.scores import MEASURES, combine, to_gates
from lserve_jax.calibration.shares import describe, expected_losses
from lserve_jax.engine.setup import prepare
from lserve_jax.text.tokenizer import Tokenizer
from tests.lserve_jax.calibration import planted
from tests.lserve_jax.runtime.tiny_steps import TINY

pytestmark = pytest.mark.slow

MODEL = str(TINY / "llama3")  # 2 layers of 2 KV heads, a byte or so a token
# One shape for all runs, so that each program is compiled once.
SIZES = ("--length", "1280", "--chunk", "256", "--sink", "16", "--seed", "3")
NAMED = ("--local", "64", "--dense-layers", "")
"""The settings that are searched for if they are not named."""
TRAINING = (*("--method", "train", "--steps", "4", "--min-length", "700", "--max-length", "900"), "--passkeys", "1")
QUICK = ("--held-out", "0", "--no-picture", "--quiet")


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command in this process."""

    def call(*arguments: str | Path, model: str = MODEL, named: tuple[str, ...] = NAMED) -> Result:
        capfd.readouterr()
        try:
            status = main(["--model", model, *SIZES, *named, *map(str, arguments)])
        except SystemExit as end:  # argparse
            status = end.code
        assert isinstance(status, int)
        captured = capfd.readouterr()
        return Result(status, captured.out, captured.err)

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_scoring_writes_a_pattern_that_the_loader_reads(run: Callable[..., Result], tmp_path: Path):
    out = tmp_path / "new" / "pattern"
    result = run("--out", out, "--prompts", "3", "--held-out", "3")
    assert result.status == 0, result.err
    assert sorted(files(out)) == [
        "config.json",
        "full_attention_heads.tsv",
        "heads.png",
        "scores.npz",
        "smoothing.safetensors",
    ]
    gates = load_gates(out, 2, 2)
    with np.load(out / "scores.npz") as saved:
        kinds = sorted({name.split("/")[0] for name in saved})
        scores = {kind: {name: saved[f"{kind}/{name}"] for name in MEASURES} for kind in kinds}
    np.testing.assert_allclose(gates, to_gates(combine(scores, "best_place")), atol=1e-6)
    setup = prepare(MODEL, attention="lserve", head_pattern=out)
    assert setup.config.heads == classify(gates, 0.5)
    settings = json.loads((out / "config.json").read_text())
    assert settings | {"model_name": MODEL, "sink_size": 16, "recent_size": 64, "seed": 3} == settings
    assert (settings["method"], settings["num_prompts"], settings["length"]) == ("best_place", 3, 1280)
    assert [row["streaming"] for row in settings["expected_loss"]] == [0, 1, 2, 3, 4]
    table = result.out.splitlines()
    assert table[1].split() == ["streaming", "heads", "retrieval", "copying", "text", "mean", "change"]
    assert [line.split()[0] for line in table[2:7]] == ["dense", "25%", "50%", "75%", "90%"]
    assert table[7] == f"wrote {out}: use it with --head-pattern {out}"
    for stage, prompts in (("scores", 3), ("smoothing", 4), ("losses", 5 * 3)):
        assert f"{stage}: 100%" in result.err and f" {prompts}/{prompts} " in result.err


def test_a_seed_repeats_every_file_and_another_gives_other_scores(run: Callable[..., Result], tmp_path: Path):
    for name, seed in (("first", "3"), ("again", "3"), ("other", "4")):
        assert run("--out", tmp_path / name, "--prompts", "2", "--held-out", "0", "--quiet", "--seed", seed).err == ""
    first, again, other = (files(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert first["scores.npz"] != other["scores.npz"]


def test_dense_layers_are_a_setting_of_the_pattern(run: Callable[..., Result], tmp_path: Path):
    pattern = tmp_path / "p"
    assert run("--out", pattern, "--score", "random", "--dense-layers", "1", *QUICK).status == 0
    for preset, layers in (("lserve", (1,)), ("dense", ())):
        assert prepare(MODEL, attention=preset, head_pattern=pattern).config.attention.dense_layers == layers


SEARCH = ("--prompts", "2", "--held-out", "1", "--no-picture", "--quiet")


@pytest.fixture
def four_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer prompts to search with: two of facts, one of each other kind."""
    monkeypatch.setattr(calibrate, "SEARCH_PROMPTS", 4)


@pytest.mark.usefixtures("four_prompts")
def test_window_and_dense_layers_are_found_and_read_back(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(windows, "_costs", lambda reader, prompt, heads, candidates: np.array([0.03, 0.012, 0.01]))
    monkeypatch.setattr(Replayer, "divergences", lambda self, prompt, rows: np.where(rows[:, 1], 0.01, 0.1))
    assert run("--out", tmp_path / "p", *SEARCH, "--quota", "layer", named=()).status == 0  # both layers select
    settings = json.loads((tmp_path / "p" / "config.json").read_text())
    assert settings["attention"] == {"sink": 16, "local": 256, "prefill_local": 256, "dense_layers": [1]}
    kinds = ("retrieval", "copying", "text")
    assert settings["windows"] == {
        "static_sparsity": 0.5,
        "costs": [
            {"local": local, "divergence": dict.fromkeys(kinds, cost)}
            for local, cost in ((128, 0.03), (256, 0.012), (512, 0.01))
        ],
    }
    found = settings["page_selection"]
    assert (found["token_budget"], found["page_size"]) == (320, 16)
    rows = [(row["dense_layers"], row["divergence"]["text"], row["is_kept"]) for row in found["costs"]]
    assert rows == [([], 0.1, True), ([1], pytest.approx(0.01), True), ([1, 0], pytest.approx(0.01), False)]
    policy = prepare(MODEL, attention="lserve", head_pattern=tmp_path / "p").config.attention
    assert (policy.local, policy.prefill_local, policy.dense_layers) == (256, 256, (1,))


@pytest.mark.usefixtures("four_prompts")
def test_settings_that_are_named_are_not_searched_for(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr(calibrate, "window_costs", fail)
    monkeypatch.setattr(calibrate, "selection_costs", fail)
    for name, layers in (("none", ""), ("one", "1")):
        named = ("--local", "100", "--dense-layers", layers)
        assert run("--out", tmp_path / name, "--score", "random", *QUICK, named=named).status == 0
        settings = json.loads((tmp_path / name / "config.json").read_text())
        dense = {"dense_layers": [1]} if layers else {}
        assert settings["attention"] == {"sink": 16, "local": 100, "prefill_local": 100, **dense}
        assert not settings.keys() & {"windows", "page_selection"}
    with pytest.raises(AssertionError, match="searched"):
        run("--out", tmp_path / "window", "--score", "random", *QUICK, named=("--dense-layers", ""))
    with pytest.raises(AssertionError, match="searched"):
        run("--out", tmp_path / "layers", "--score", "random", *QUICK, named=("--local", "100"))


@pytest.mark.usefixtures("four_prompts")
def test_an_interrupted_search_goes_on_and_ends_with_the_same_pattern(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with counted(monkeypatch, Replayer, "divergences") as calls:
        assert run("--out", whole, *SEARCH, named=()).status == 0
    with interrupted(monkeypatch, Reader, "read_through", call=SMOOTHING_PROMPTS + 4 * 2 + 3):  # of the third prompt
        assert run("--out", broken, *SEARCH, named=()).status == 130
    prepare(MODEL, attention="lserve", head_pattern=broken)  # with the window of the ranking
    with (
        counted(monkeypatch, Reader, "read_through") as readings,
        interrupted(monkeypatch, Replayer, "divergences", call=4),
    ):
        assert run("--out", broken, *SEARCH, named=()).status == 130
    assert len(readings) == 4 * 2
    with counted(monkeypatch, Replayer, "divergences") as others:
        assert run("--out", broken, *SEARCH, named=()).status == 0
    assert len(others) == len(calls) - 3
    assert files(broken) == files(whole)


def test_a_random_pattern_is_its_seeds_and_of_no_prompt(run: Callable[..., Result], tmp_path: Path):
    for name, seed in (("first", "3"), ("again", "3"), ("other", "5")):
        assert run("--out", tmp_path / name, "--score", "random", "--seed", seed, *QUICK).status == 0
    first, again, other = (files(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again and sorted(first) == ["config.json", "full_attention_heads.tsv", "smoothing.safetensors"]
    assert first["full_attention_heads.tsv"] != other["full_attention_heads.tsv"]
    assert sorted(load_gates(tmp_path / "first", 2, 2).ravel()) == [0.25, 0.5, 0.75, 1.0]


def test_a_slope_is_measured_where_it_is_asked_for(run: Callable[..., Result], tmp_path: Path):
    assert run("--out", tmp_path / "p", "--prompts", "1", "--score", "divergence", *QUICK).status == 0
    with np.load(tmp_path / "p" / "scores.npz") as saved:
        assert {name.split("/")[1] for name in saved} == {*MEASURES, "divergence"}
    assert json.loads((tmp_path / "p" / "config.json").read_text())["method"] == "divergence"


def test_a_quota_gives_each_layer_as_many_streaming_heads(run: Callable[..., Result], tmp_path: Path):
    assert run("--out", tmp_path / "p", "--prompts", "1", "--quota", "layer", *QUICK).status == 0
    assert classify(load_gates(tmp_path / "p", 2, 2), 0.5).num_retrieval == (1, 1)


def test_an_interrupted_training_goes_on_and_ends_with_the_same_pattern(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run("--out", whole, *TRAINING, *QUICK).status == 0
    assert sorted(files(whole)) == ["config.json", "full_attention_heads.tsv", "smoothing.safetensors"]
    settings = json.loads((whole / "config.json").read_text())
    assert (settings["method"], settings["num_steps"], settings["lr"]) == ("DuoAttention", 4, 0.02)
    step, calls = training.train_step, []

    def stopped(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", stopped)
        assert run("--out", broken, *TRAINING, *QUICK).status == 130
    assert sorted(files(broken)) == ["progress.npz"]
    refused = run("--out", broken, *TRAINING, *QUICK, "--learning-rate", "0.1")
    check_refusal(refused, "progress.npz: was begun with lr=0.02 (now 0.1)")
    check_refusal(run("--out", broken, *QUICK), "method=DuoAttention (now best_place)")
    assert run("--out", broken, *TRAINING, *QUICK).status == 0
    assert files(broken) == files(whole)
    check_refusal(
        run("--out", broken, *TRAINING, *QUICK), "the folder is not empty and has no progress.npz to go on from"
    )


TABLE = ("--prompts", "3", "--held-out", "2", "--no-picture", "--quiet")


@pytest.mark.parametrize(("score", "call"), [("best_place", 6), ("random", 1)])
def test_a_pattern_can_be_used_before_its_table_of_losses_is_done(
    score: str, call: int, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = (*TABLE, "--score", score)
    assert run("--out", whole, *command).status == 0
    with interrupted(monkeypatch, Reader, "read_through", call=SMOOTHING_PROMPTS + call):
        result = run("--out", broken, *command)
    assert (result.status, result.out) == (130, "")
    assert result.err == "stopped: the same command goes on from here\n"
    np.testing.assert_array_equal(load_gates(broken, 2, 2), load_gates(whole, 2, 2))
    prepare(MODEL, attention="lserve", head_pattern=broken)
    left = files(broken)
    assert left.keys() - files(whole).keys() == {"progress.npz"}
    assert json.loads(left["config.json"])["expected_loss"] == []
    with counted(monkeypatch, Reader, "read_through") as readings, counted(monkeypatch, Reader, "read") as prompts:
        assert run("--out", broken, *command).status == 0
    assert (len(readings), len(prompts)) == (5 * 2 - (call - 1), 0)
    assert files(broken) == files(whole)
    check_refusal(run("--out", broken, *command), "the folder is not empty and has no progress.npz to go on from")


def test_interrupted_scores_go_on_with_the_next_prompt(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run("--out", whole, *TABLE).status == 0
    with interrupted(monkeypatch, Reader, "read", call=3):
        assert run("--out", broken, *TABLE).status == 130
    assert files(broken).keys() == {"progress.npz"}
    check_refusal(run("--out", broken, *TABLE, "--seed", "4"), "progress.npz: was begun with seed=3 (now 4)")
    with counted(monkeypatch, Reader, "read") as prompts:
        assert run("--out", broken, *TABLE).status == 0
    assert len(prompts) == 1
    assert files(broken) == files(whole)


def test_what_was_measured_on_other_prompts_is_measured_again(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As with another tokenizer: the settings are the same, but not the prompts."""
    with interrupted(monkeypatch, Reader, "read_through", call=SMOOTHING_PROMPTS + 6):
        assert run("--out", tmp_path / "p", *TABLE).status == 130
    with monkeypatch.context() as patch, counted(monkeypatch, Reader, "read") as prompts:
        patch.setattr(Tokenizer, "decide_chat_format", lambda self, advice: False)
        assert run("--out", tmp_path / "p", *TABLE).status == 0
        assert run("--out", tmp_path / "fresh", *TABLE).status == 0
    assert len(prompts) == 2 + 3  # plain text has no template: its prompt is the same
    assert files(tmp_path / "p") == files(tmp_path / "fresh")


def test_heads_are_scored_with_the_weights_in_the_form_that_is_named(run: Callable[..., Result], tmp_path: Path):
    command = (*TABLE, "--held-out", "0")
    for name, form in (("plain", ()), ("auto", ("--weight-dtype", "auto")), ("int8", ("--weight-dtype", "int8"))):
        assert run("--out", tmp_path / name, *command, *form).status == 0
    settings = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "int8")}
    assert (settings["plain"]["weight_dtype"], settings["int8"]["weight_dtype"]) == ("float32", "int8")
    found = {name: np.load(tmp_path / name / "scores.npz") for name in ("plain", "auto", "int8")}
    for name in found["plain"]:
        np.testing.assert_array_equal(found["auto"][name], found["plain"][name])  # the file has numbers
        np.testing.assert_allclose(found["int8"][name], found["plain"][name], rtol=0.1, atol=0.02)
        assert (found["int8"][name] != found["plain"][name]).any() or not found["plain"][name].any()


def test_a_calibration_is_not_continued_with_weights_of_another_form(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with interrupted(monkeypatch, Reader, "read", call=2):
        assert run("--out", tmp_path / "p", *TABLE).status == 130
    result = run("--out", tmp_path / "p", *TABLE, "--weight-dtype", "int8")
    check_refusal(result, "progress.npz: was begun with weight_dtype=float32 (now int8)")


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, *, call: int) -> Iterator[None]:
    """Ctrl-C at the n-th call of a method."""
    method = getattr(owner, name)
    with counted(monkeypatch, owner, name) as calls, monkeypatch.context() as patch:
        counting = getattr(owner, name)

        def stopped(*arguments: Any, **options: Any) -> Any:
            if len(calls) == call - 1:
                raise KeyboardInterrupt
            return counting(*arguments, **options)

        patch.setattr(owner, name, stopped)
        yield
    assert getattr(owner, name) is method


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> Iterator[list[int]]:
    """A list that grows with each call of a method."""
    method, calls = getattr(owner, name), []

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return method(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counting)
        yield calls


def check_refusal(result: Result, message: str) -> None:
    assert result.status == 2
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert message in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--prompts 0", "--prompts 0 must be at least 1"),
        ("--held-out -1", "--held-out -1 must be at least 0"),
        ("--seed -1 --score random", "--seed -1 must be at least 0"),
        ("--length 80", "--length 80 must be more than --sink 16 and --local 64 together"),
        ("--length 500", "length=500 is too short for a"),
        ("--sink -1", "sink=-1 must be a whole number from 0"),
        ("--local 0", "local=0 must be a whole number from 1"),
        ("--dense-layers 1,x", "--dense-layers '1,x' must be layer numbers with commas between"),
        ("--dense-layers 2", "dense_layers=[2] do not exist: the model has layers 0 … 1"),
        ("--chunk 0", "prefill_chunk=0 must be a whole number from 1"),
        ("--score luck", "--score 'luck' must be one of "),
        ("--method guess", "--method 'guess' must be one of score, train"),
        ("--quota head", "--quota 'head' must be one of "),
        ("--prompts many", "--prompts 'many' must be a whole number"),
        ("--method train --steps 0", "steps=0 must be at least 1"),
        ("--method train --learning-rate 0", "learning_rate=0.0 must be more than 0"),
        ("--method train --passkeys 11", "num_passkeys=11 must be from 1 to 10"),
        ("--method train --min-length 500", "min_length=500 has no room for 10 passkeys"),
        ("--method train --min-length 900 --max-length 800", "min_length=900 must be at most max_length=800"),
        ("--model nothing-here", "nothing-here: no such file or folder"),
        ("--method train --weight-dtype int8", "--method train follows gradients, which pass through weights that are"),
        ("--score loss --weight-dtype int4", "--score loss follows gradients, which pass through weights that are"),
        ("--score divergence --weight-dtype int8", "these are int8; --weight-dtype float32 makes numbers of them"),
        ("--weight-dtype int3", "--weight-dtype 'int3' must be one of auto, bfloat16"),
        ("--length 2000000000", "--length 2000000000 does not fit into memory"),
    ],
)
def test_values_that_cannot_be_are_refused_in_one_line(
    run: Callable[..., Result], tmp_path: Path, arguments: str, message: str
):
    result = run("--out", tmp_path / "p", "--no-picture", *arguments.split())
    check_refusal(result, message)
    assert not (tmp_path / "p").exists()


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file: exists and is not a folder$"):
        require_target(tmp_path / "file")
    with pytest.raises(
        ValueError, match=r": the folder is not empty and has no progress.npz to go on from; name a new one$"
    ):
        require_target(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new" / "folder"):
        require_target(folder)


def test_no_matplotlib_is_said_before_the_work(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("--out", tmp_path / "p")
    check_refusal(result, "a picture of the heads needs matplotlib: pip install 'lserve_jax[eval]', or --no-picture")


def test_the_map_is_a_picture_and_always_the_same(rng: np.random.Generator):
    gates = rng.random((30, 3))
    picture = head_map(gates, "a model")
    assert picture.startswith(b"\x89PNG")
    assert head_map(gates, "a model") == picture
    assert head_map(1 - gates, "a model") != picture


def test_a_pattern_appears_whole_or_without_its_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: Any, **options: Any) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("json.dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        write_pattern(tmp_path / "p", np.ones((2, 2)), {})
    assert not (tmp_path / "p" / "full_attention_heads.tsv").exists()


def test_the_loss_rises_when_planted_heads_stream_and_only_then():
    gates = np.full((planted.LAYERS, planted.HEADS), 0.1)
    for head in planted.PLANTED:
        gates[head] = 1.0
    prompts = [planted.prompt(seed) for seed in range(2)]
    shares, programs = (0.25, 10 / 12, 11 / 12, 1.0), len(compiled_masked_steps())
    rows = expected_losses(
        planted.params(), planted.CONFIG, prompts, gates, local=planted.LOCAL, chunk=64, shares=shares
    )
    assert len(compiled_masked_steps()) == programs + 1  # classes are data
    assert [row.streaming for row in rows] == [0, 3, 10, 11, 12]
    losses = [row.nll["lookup"] for row in rows]
    np.testing.assert_allclose(losses[1:3], losses[0], atol=1e-3)
    assert losses[3] > losses[0] + 0.3 and losses[4] > losses[3] + 0.3
    assert [line.split()[-1] for line in describe(rows).splitlines()[3:5]] == ["+0.0000", "+0.0000"]


def compiled_masked_steps() -> range:
    step: Any = masked_step
    return range(step._cache_size())


def test_losses_are_those_of_the_engine_with_such_heads(rng: np.random.Generator):
    """The same prompt through `prefill_step`, weights permuted and heads classified as for serving."""
    import jax.numpy as jnp

    from lserve_jax import InferenceConfig, from_preset, open_checkpoint
    from lserve_jax.calibration.prompts import Prompt
    from tests.lserve_jax.runtime.tiny_steps import Stepper

    checkpoint = open_checkpoint(MODEL)
    tokens = rng.integers(0, 128, 150)
    prompt = Prompt(kind="x", tokens=tuple(tokens.tolist()), num_answer=40, sources=(0,) * 150, asks=(0,) * 40)
    gates = np.array([[0.9, 0.2], [0.4, 0.6]])
    window: dict[str, Any] = {"sink": 5, "local": 30, "prefill_local": 30, "page_size": 16}
    dense = InferenceConfig(model=checkpoint.config, attention=from_preset("dense", **window), dtype="float32")
    params = checkpoint.load_params("float32")
    (row,) = expected_losses(params, dense, [prompt], gates, local=30, chunk=48, shares=(0.5,))[1:]
    policy = from_preset("streaming", **window)
    config = InferenceConfig(model=checkpoint.config, attention=policy, heads=classify(gates, 0.5), dtype="float32")
    stepper = Stepper(config, max_pages=12)
    logits, _ = stepper.prefill(stepper.cache(), tokens.astype(np.int32), 64)
    assert (retrieval_heads(gates, 0.5) == [[True, False], [False, True]]).all()
    logs = np.asarray(logits[109:149] - np.asarray(jnp.logaddexp.reduce(logits[109:149], axis=-1))[:, None])
    expected = -np.mean(logs[np.arange(40), tokens[110:]])
    assert row.nll["x"] == pytest.approx(expected, abs=2e-5)
