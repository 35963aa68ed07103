"""`python -m lserve_jax.calibrate`: finds which KV heads of a model may stream and writes a head pattern.

With it go the window of streaming heads, the layers that must read all pages, and smoothing factors for weights in 8
bits.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lserve_jax.calibration.dense_layers import dense_layers, selection_costs
from lserve_jax.calibration.folder import require_target, write_pattern, write_settings
from lserve_jax.calibration.masked import retrieval_heads
from lserve_jax.calibration.passkeys import Passkeys
from lserve_jax.calibration.picture import head_map, require_matplotlib
from lserve_jax.calibration.progress import Done, Progress
from lserve_jax.calibration.prompts import Prompt, make_prompts
from lserve_jax.calibration.scores import (
    DEFAULT_RANKING,
    MEASURES,
    RANDOM,
    RANKINGS,
    SLOPES,
    OnProgress,
    Scores,
    combine,
    score_heads,
    to_gates,
)
from lserve_jax.calibration.shares import describe, expected_losses
from lserve_jax.calibration.smoothing import find_smoothing
from lserve_jax.calibration.training import TrainingConfig, train
from lserve_jax.calibration.windows import WINDOWS, choose_window, window_costs
from lserve_jax.cli.common import (
    ProgressBars,
    required_tokenizer,
    run_command,
    set_up_logging,
    use_compilation_cache,
)
from lserve_jax.cli.flags import add_fields, add_shared, given, local_path, whole
from lserve_jax.cli.parser import OneLineParser
from lserve_jax.config.attention import AttentionConfig, from_preset
from lserve_jax.config.errors import InputError
from lserve_jax.config.heads import QUOTAS, classify
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.engine.patterns import architecture
from lserve_jax.engine.setup import Setup, prepare
from lserve_jax.models.llama import Params
from lserve_jax.text.tokenizer import Tokenizer
from lserve_jax.weights.load import open_checkpoint
from pallas_kernels.core.quantized_matrix import quantized_matrices

_LONGEST = 32768
SMOOTHING_PROMPTS = 4
"""Prompts that are read for smoothing factors."""
SEARCH_PROMPTS = 18
"""Prompts on which window and dense layers are chosen: the costs of copies differ by a factor of five."""
_SETTINGS = {
    "sink": {"default": AttentionConfig.sink},
    "local": {
        "words": f"the best of {', '.join(map(str, WINDOWS))}, for heads ranked with {AttentionConfig.local}",
        "help": "newest tokens, the current one included, that streaming heads see",
    },
    "dense_layers": {
        "words": "those that are found",
        "help": "layers whose retrieval heads read all pages wherever the pattern is used; '' for none",
    },
}
"""The attention settings that are written into a pattern."""

_FLAGS: dict[str, dict[str, Any]] = {
    "--quota": {
        "choices": QUOTAS,
        "default": "model",
        "help": "rank the heads of the whole model together, or those of each layer (default: %(default)s)",
    },
    "--length": whole(1536, "tokens per synthetic prompt"),
    "--held-out": whole(6, "prompts for the table of losses; 0 for no table"),
    "--seed": whole(0, "seed of all random numbers"),
    "--no-picture": {"action": "store_true", "help": "draw no heads.png, which needs matplotlib"},
}

_SCORE_FLAGS: dict[str, dict[str, Any]] = {
    "--score": {
        "choices": tuple(RANKINGS),
        "default": DEFAULT_RANKING,
        "help": "what heads are ranked by (default: %(default)s)",
    },
    "--prompts": whole(12, "synthetic prompts"),
}

_TRAINING_FLAGS: dict[str, dict[str, Any]] = {
    "--min-length": whole(2048, "tokens of the shortest text"),
    "--max-length": {
        "type": int,
        "metavar": "N",
        "help": f"tokens of the longest text (default: {_LONGEST}, or the model's context if that is shorter)",
    },
    "--passkeys": whole(10, "passkeys hidden in each text"),
}


class _Found(NamedTuple):
    """Gates [L, K], and any scores by kind of prompt."""

    gates: NDArray[np.floating]
    scores: dict[str, Scores] | None


class _Method(NamedTuple):
    """A way to find gates.

    Attributes:
      settings: what is written into the pattern beside the settings that all methods share.
      find: parameters, results of an interrupted run, a function that shows progress → gates.
    """

    settings: dict[str, Any]
    find: Callable[[Params, Done, OnProgress], _Found]


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags."""
    parser = OneLineParser(prog="python -m lserve_jax.calibrate", description=__doc__)
    add_shared(parser, "--model", "--tokenizer")
    parser.add_argument(
        "--out",
        type=local_path,
        required=True,
        metavar="DIR",
        help="folder to write: new, empty, or of an interrupted run, which then goes on",
    )
    methods = "how gates are found; see below (default: %(default)s)"
    parser.add_argument("--method", choices=tuple(_METHODS), default="score", help=methods)
    add_fields(parser, AttentionConfig, tuple(_SETTINGS), own=_SETTINGS)
    scoring = parser.add_argument_group("--method score: what heads would lose on synthetic prompts; minutes")
    training = parser.add_argument_group("--method train: DuoAttention's gates by gradient descent; hours")
    add_fields(training, TrainingConfig)
    for group, flags in ((parser, _FLAGS), (scoring, _SCORE_FLAGS), (training, _TRAINING_FLAGS)):
        for flag, options in flags.items():
            group.add_argument(flag, **options)
    add_shared(parser, "--dtype")
    add_shared(
        parser,
        "--weight-dtype",
        help="form of the weight matrices; gradients need numbers (default: numbers of --dtype)",
    )
    add_shared(parser, "--prefill-chunk/--chunk", "--quiet")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr that says what to change."""
    return run_command(lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    try:
        _calibrate(args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped: the same command goes on from here") from None


def _calibrate(args: argparse.Namespace) -> None:
    set_up_logging(is_quiet=args.quiet)
    _check(args)
    setup = _prepare(args)
    tokenizer = required_tokenizer(setup.checkpoint, args.tokenizer)
    prompts = _make_prompts(args, tokenizer)
    # Find every error of the user before loading weights.
    method = _METHODS[args.method](args, setup, tokenizer)
    settings = _settings(args, setup) | method.settings
    # The checkpoint's digest says which model it is: where it lies, and how it is called, may change.
    progress = Progress(args.out, {name: value for name, value in settings.items() if name != "model_name"})
    setup.warn()
    use_compilation_cache()
    chunk = setup.sizes.prefill_chunk
    with ProgressBars(is_shown=not args.quiet) as bars:
        params = _load(setup, bars.report)
        gates, scores = method.find(params, progress, bars.report)
        smoothing = find_smoothing(
            *(params, setup.config, prompts.smoothing),
            chunk=chunk,
            done=progress,
            on_progress=lambda done: bars.report("smoothing", done, SMOOTHING_PROMPTS),
        )
        picture = None if args.no_picture else _picture(gates, settings)
        progress.save()  # before the pattern: a folder with a pattern alone is finished
        write_pattern(
            *(args.out, gates, settings | {"expected_loss": []}), scores=scores, picture=picture, smoothing=smoothing
        )
        options = {"chunk": chunk, "done": progress, "on_progress": bars.report}
        search = _Search(params, setup.config, prompts.search, gates, options)
        if args.local is None:
            settings |= search.window(settings["attention"])
        if args.dense_layers is None:
            settings |= search.dense_layers(settings["attention"], args.length)
        write_settings(args.out, settings | {"expected_loss": []})
        rows = []
        if prompts.held_out:
            local = settings["attention"]["local"]
            rows = expected_losses(params, setup.config, prompts.held_out, gates, local=local, **options)
    write_settings(args.out, settings | {"expected_loss": [asdict(row) for row in rows]})
    progress.remove()
    if rows:
        print(describe(rows))
    print(f"wrote {args.out}: use it with --head-pattern {args.out}")


class _Prompts(NamedTuple):
    """Prompts by what is done with them; those that rank heads belong to a method."""

    smoothing: list[Prompt]
    search: list[Prompt]
    held_out: list[Prompt]


def _make_prompts(args: argparse.Namespace, tokenizer: Tokenizer) -> _Prompts:
    def make(count: int, use: str) -> list[Prompt]:
        return make_prompts(tokenizer, count=count, length=args.length, seed=f"{use} {args.seed}")

    is_searched = args.local is None or args.dense_layers is None
    return _Prompts(
        smoothing=make(SMOOTHING_PROMPTS, "smoothing"),
        search=make(SEARCH_PROMPTS if is_searched else 0, "search"),
        held_out=make(args.held_out, "held out"),
    )


def _load(setup: Setup, on_progress: OnProgress) -> Params:
    """Returns the parameters, without the factors of an earlier calibration."""
    return setup.checkpoint.load_params(
        *(setup.config.dtype, None, lambda done, total: on_progress("weights", done, total)),
        weight_dtype=setup.forms.weight_dtype,
    )


class _Search(NamedTuple):
    """What the settings of a pattern are searched with. As many heads stream as by default.

    Attributes:
      params: the model's parameters in the checkpoint's order of heads.
      config: the dense model; its ``attention`` has the sink.
      prompts: prompts of all kinds.
      gates: [L, K].
      options: chunk, results of an interrupted run, and a function that shows progress.
    """

    params: Params
    config: InferenceConfig
    prompts: Sequence[Prompt]
    gates: NDArray[np.floating]
    options: dict[str, Any]

    def window(self, attention: Mapping[str, Any]) -> dict[str, Any]:
        """Returns ``attention`` with the window that is found, and what each window costs, as settings of a pattern."""
        share = AttentionConfig.static_sparsity
        is_retrieval = retrieval_heads(self.gates, share)
        costs = window_costs(self.params, self.config, self.prompts, is_retrieval, **self.options)
        local = choose_window(costs)
        return {
            "attention": {**attention, "local": local, "prefill_local": local},
            "windows": {"static_sparsity": share, "costs": [asdict(cost) for cost in costs]},
        }

    def dense_layers(self, attention: Mapping[str, Any], length: int) -> dict[str, Any]:
        """Returns ``attention`` with the dense layers that are found, and what page selection costs.

        A quarter of ``length`` tokens is selected.
        """
        policy = from_preset("lserve", token_budget=length // 4, **attention)
        config = replace(self.config, attention=policy, heads=classify(self.gates, policy.static_sparsity))
        costs = selection_costs(self.params, config, self.prompts, **self.options)
        found = {"dense_layers": list(dense_layers(costs))} if dense_layers(costs) else {}
        pages = {"token_budget": policy.token_budget, "page_size": policy.page_size}
        return {
            "attention": {**attention, **found},
            "page_selection": {**pages, "costs": [asdict(cost) for cost in costs]},
        }


def _picture(gates: NDArray[np.floating], settings: dict[str, Any]) -> bytes:
    return head_map(gates, f"{Path(settings['model_name']).name}, {settings['method']}")


def _check(args: argparse.Namespace) -> None:
    require_target(args.out)
    if args.prompts < 1:
        raise InputError(f"--prompts {args.prompts} must be at least 1")
    for name in ("held_out", "seed"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 0")
    local = _ranking_window(args)
    if args.length <= args.sink + local:
        raise InputError(
            f"--length {args.length} must be more than --sink {args.sink} and --local {local} together: "
            "streaming heads see all of a shorter prompt"
        )
    if not args.no_picture:
        require_matplotlib()


def _prepare(args: argparse.Namespace) -> Setup:
    checkpoint = open_checkpoint(args.model)
    setup = prepare(
        checkpoint,
        attention="dense",
        dtype=args.dtype,
        # Not the device's default: the pattern of a model is the same everywhere.
        weight_dtype=args.weight_dtype or (checkpoint.config.dtype if args.dtype == "auto" else args.dtype),
        max_model_len=args.length,
        max_num_seqs=1,
        prefill_chunk=args.prefill_chunk,
        **given(args, AttentionConfig),
    )
    way = "--method train" if args.method == "train" else f"--score {args.score}"
    if (args.method == "train" or args.score in SLOPES) and quantized_matrices(setup.params):
        raise InputError(
            f"{way} follows gradients, which pass through weights that are numbers: these are "
            f"{setup.plan.weight_words}; --weight-dtype {setup.config.dtype} makes numbers of them"
        )
    if not setup.plan.fits:
        raise InputError(
            f"--length {args.length} does not fit into memory with {args.model}: at most {setup.plan.largest_context}"
        )
    return setup


def _ranking_window(args: argparse.Namespace) -> int:
    """Returns the window with which heads are ranked."""
    return AttentionConfig.local if args.local is None else args.local


def _settings(args: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    local = _ranking_window(args)
    attention: dict[str, Any] = {"sink": args.sink, "local": local, "prefill_local": local}
    if setup.config.attention.dense_layers:
        attention["dense_layers"] = list(setup.config.attention.dense_layers)
    return {
        "model_name": setup.checkpoint.name,
        "checkpoint": setup.checkpoint.digest,
        "architecture": architecture(setup.checkpoint.config),
        "sink_size": args.sink,
        "recent_size": local,
        "attention": attention,
        "quota": args.quota,
        "seed": args.seed,
        "dtype": setup.config.dtype,
        "weight_dtype": setup.forms.weight_dtype,
        "length": args.length,
    }


def _scoring(args: argparse.Namespace, setup: Setup, tokenizer: Tokenizer) -> _Method:
    if args.score == RANDOM:
        model = setup.config.model
        drawn = np.random.default_rng(args.seed).random((model.num_layers, model.num_kv_heads))
        random = _Found(to_gates(drawn, args.quota), None)
        return _Method({"method": RANDOM, "measured": RANKINGS[RANDOM]}, lambda params, done, on_progress: random)
    prompts = make_prompts(tokenizer, count=args.prompts, length=args.length, seed=args.seed)

    def find(params: Params, done: Done, on_progress: OnProgress) -> _Found:
        scores = score_heads(
            *(params, setup.config, prompts),
            names=(*MEASURES, *({args.score} & SLOPES.keys())),
            chunk=setup.sizes.prefill_chunk,
            done=done,
            on_progress=on_progress,
        )
        return _Found(to_gates(combine(scores, args.score), args.quota), scores)

    settings = {"method": args.score, "measured": RANKINGS[args.score], "num_prompts": args.prompts}
    return _Method(settings, find)


def _training(args: argparse.Namespace, setup: Setup, tokenizer: Tokenizer) -> _Method:
    training = TrainingConfig(**given(args, TrainingConfig))
    passkeys = Passkeys(
        tokenizer=tokenizer,
        min_length=args.min_length,
        max_length=args.max_length or max(min(_LONGEST, setup.checkpoint.config.max_context), args.min_length),
        seed=args.seed,
        num_passkeys=args.passkeys,
    )
    settings = {
        "method": "DuoAttention",
        "num_steps": training.steps,
        "lr": training.learning_rate,
        "reg_weight": training.regularisation,
        "context_length_min": passkeys.min_length,
        "context_length_max": passkeys.max_length,
        "num_passkeys": passkeys.num_passkeys,
    }

    def find(params: Params, done: Done, on_progress: OnProgress) -> _Found:
        def on_step(step: int, loss: float, gate: float) -> None:
            on_progress("training", step, training.steps)
            if not args.quiet and step % max(training.steps // 20, 1) == 0:
                tqdm.write(f"step {step}: loss {loss:.3g}, mean gate {gate:.3f}", file=sys.stderr)

        gates = train(params, setup.config, passkeys.make, training, done=done, on_step=on_step)
        return _Found(gates if args.quota == "model" else to_gates(gates, args.quota), None)

    return _Method(settings, find)


_METHODS = {"score": _scoring, "train": _training}


if __name__ == "__main__":
    sys.exit(main())
