"""One run of `bench.e2e` on this device: its parts, its clock, and what remains when time ends."""

import argparse
import dataclasses
import gc
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import batched
from typing import Any

import jax

from bench.e2e.decode import Decode
from bench.e2e.inputs import random_params
from bench.e2e.journal import Journal
from bench.e2e.models import inference_config
from bench.e2e.points import Measured, Point
from bench.e2e.prefill import Prefill
from bench.e2e.programs import Program, compiled, fresh_compilation_cache, raise_failure
from bench.e2e.values import VALUES_ATTENTION, compared
from bench.measure import copy_bandwidth, timed
from bench.provenance import provenance, sources
from bench.text import length_of, one_line, rounded
from lserve_jax.engine.memory import free_memory
from lserve_jax.models.llama import Params

LONGEST = 2**20
"""`longest` is the longest context that fits, but no longer than this."""


KINDS: dict[str, type[Measured]] = {"decode": Decode, "prefill": Prefill}


class Run:
    """One run on this device: its journal, its clock, and what its parts share."""

    def __init__(self, args: argparse.Namespace, deadline: float) -> None:
        self.args, self._deadline = args, deadline
        self.available = free_memory()
        self._limits = {"copy_gb_per_s": rounded(copy_bandwidth() / 1e9)}
        self.journal = Journal(args.out, provenance() | {"sources": sources()}, is_retrying=args.retry)
        self._programs: dict[str, Program | Exception] = {}
        self._params: Params | None = None
        self.left: list[Point] = []
        self.is_right = True

    @property
    def seconds_left(self) -> float:
        """Seconds until the run should end."""
        return self._deadline - time.monotonic()

    def settings(self, part: str, **fields: Any) -> dict[str, Any]:
        """Returns the fields that identify a result."""
        return {"part": part, "model": self.args.model, "implementation": self.args.implementation, **fields}

    def params(self) -> Params:
        """Returns the random weights, made on first use; no preset changes their shapes."""
        if self._params is None:
            self._params = random_params(inference_config(self.args.model, "dense", self.args.implementation))
        return self._params

    def subject(self, point: Point) -> Measured:
        """Returns what a point measures."""
        config = inference_config(self.args.model, point.preset, self.args.implementation)
        return KINDS[point.part](point, config, chunk=self.args.chunk, steps=self.args.steps)

    def record(self, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """Writes a result that the journal lacks, or why there is none, and its short form to the terminal."""
        if self.journal.has(settings):
            return
        try:
            result = measure()
        except Exception as error:  # noqa: BLE001 - out of memory, say: recorded, and the next one begins
            result = {"error": one_line(error)}
        gc.collect()
        self.journal.add(settings, result | self._limits)
        named = ("part", "preset", "context", "batch", "checkpoint")
        shown = ("error", "measured", "ms_per_token", "over_limit", "prefill_s", "tflop_per_s", "attention_share")
        shown += ("cold_s", "cached_s", "first_difference", "relative_error", "is_within_bf16_error")
        name = " ".join(str(settings[field]) for field in named if field in settings)
        print(f"{name}:", ", ".join(f"{field} {result[field]}" for field in shown if field in result), flush=True)

    def values(self) -> None:
        """Compares a real checkpoint's greedy tokens and logits in bfloat16 here with float32 on the CPU."""
        for preset, overrides in VALUES_ATTENTION.items():
            checkpoint = self.args.values_model
            settings = self.settings("values", preset=preset, checkpoint=checkpoint, **overrides)

            def measure(preset: str = preset, overrides: dict[str, Any] = overrides) -> dict[str, Any]:
                result = compared(self.args.values_model, preset, overrides, self.args.implementation)
                self.is_right = self.is_right and result["is_within_bf16_error"]
                return result

            self.record(settings, measure)

    def compile(self) -> None:
        """Measures the compilation of the first preset's prefill and decode, cold and from the persistent cache."""
        preset, sizes = self.args.presets[0], {"chunk": self.args.chunk, "steps": self.args.steps}
        context = self.context(self.args.contexts[0], preset, 1)

        def measure() -> dict[str, Any]:
            points = [Point(part, preset, context) for part in KINDS]
            jobs = {f"{point}/step": self.subject(point).jobs()["step"] for point in points}
            with fresh_compilation_cache():
                cold, programs = timed(lambda: compiled(jobs))
                jax.clear_caches()
                cached, _ = timed(lambda: compiled(jobs))
            self._programs |= programs
            raise_failure(programs)
            seconds = {f"{name.split()[0]}_s": rounded(program.seconds) for name, program in programs.items()}
            return {"cold_s": rounded(cold), "cached_s": rounded(cached), **seconds, "cores": os.cpu_count()}

        self.record(self.settings("compile", preset=preset, context=context, **sizes), measure)

    def context(self, name: str, preset: str, batch: int) -> int:
        """Returns the tokens that ``8k``, ``1m`` or ``longest`` stand for."""
        if name != "longest":
            return length_of(name)
        shortest = self.subject(Point("prefill", preset, self.args.chunk, batch))
        longest = min(shortest.plan(available_bytes=self.available).largest_context or 0, LONGEST)
        return max(longest // 2**16 * 2**16, self.args.chunk)

    def points(self) -> list[Point]:
        """Returns the points, the most useful first: in the order of the given batches, contexts and presets."""
        found = [
            Point(part, preset, self.context(context, preset, batch), batch)
            for batch in self.args.batch
            for context in self.args.contexts
            for part in KINDS
            for preset in self.args.presets
            if part in self.args.parts and (part == "decode" or batch == self.args.batch[0])
        ]
        return list(dict.fromkeys(point._replace(batch=1) if point.part == "prefill" else point for point in found))

    def point_settings(self, point: Point) -> dict[str, Any]:
        """Returns the fields that identify a point's result."""
        size = {"steps": self.args.steps} if point.part == "decode" else {"chunk": self.args.chunk}
        return self.settings(**point._asdict(), **size)

    def measure(self) -> None:
        """Measures the points that the journal lacks, in waves whose programs compile in parallel."""
        missing = [point for point in self.points() if not self.journal.has(self.point_settings(point))]
        fitting = [point for point in missing if self._fits(point)]
        wave_size, slowest = max(1, (os.cpu_count() or 1) // 4), 0.0
        for wave in batched(fitting, wave_size):
            begin = time.monotonic()
            if self.seconds_left < slowest:
                self.left += wave
                continue
            self._measure_wave(wave)
            slowest = max(slowest, time.monotonic() - begin)

    def _fits(self, point: Point) -> bool:
        """Whether a point fits into memory; records it if not."""
        try:
            self.subject(point).plan(available_bytes=self.available).require_fit()
        except ValueError as error:
            self.record(self.point_settings(point), partial(raise_failure, {"": error}))
            return False
        return True

    def _measure_wave(self, wave: Sequence[Point]) -> None:
        jobs = {f"{point}/{kind}": job for point in wave for kind, job in self.subject(point).jobs().items()}
        missing = {name: job for name, job in jobs.items() if name not in self._programs}
        self._programs |= compiled(missing)
        for point in wave:
            programs = {kind: self._programs.pop(f"{point}/{kind}") for kind in ("step", "attention")}
            if self.seconds_left < 0:
                self.left.append(point)
            else:
                self.record(self.point_settings(point), partial(self._measured, point, programs, len(missing)))

    def _measured(self, point: Point, programs: dict[str, Any], together: int) -> dict[str, Any]:
        raise_failure(programs)
        subject = self.subject(point)
        result = subject.measure(self.params(), programs, min(self.args.whole_seconds, self.seconds_left))
        policy = {"kv_dtype": subject.config.kv_dtype, "attention": dataclasses.asdict(subject.config.attention)}
        return result | policy | {"compiled_side_by_side": together}

    def summary(self) -> str:
        """Returns what remained."""
        if not self.left:
            return "everything asked for stands in the file"
        return "left for another run: " + ", ".join(map(str, self.left))
