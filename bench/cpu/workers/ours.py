"""lserve_jax as a worker (see `protocol`): `LLM`, opened and called as `lserve_jax.generate` does it."""

import time
from dataclasses import replace
from typing import Any

import protocol


class Ours:
    """An `LLM`. Times are wall-clock times that include the host's work and exclude compilation."""

    def __init__(self, settings: dict[str, Any]) -> None:
        begin = time.perf_counter()
        import jax

        from lserve_jax.cli.common import collect_garbage_rarely, use_compilation_cache
        from lserve_jax.config.sampling import SamplingParams
        from lserve_jax.engine.setup import prepare
        from lserve_jax.llm import LLM

        self.sampling_params = SamplingParams
        self.num_compilations = 0
        jax.monitoring.register_event_duration_secs_listener(self._count_compilation)
        self.facts = {"jax": jax.__version__, "devices": len(jax.devices())}
        if "prepare" not in settings:
            return
        imported, base_bytes = time.perf_counter(), protocol.memory()["rss_bytes"]
        setup = prepare(prefix_cache=False, **settings["prepare"])  # prompts repeat, and each must be read
        if not setup.checkpoint.files():
            from bench.cpu.random_weights import with_random_weights

            setup = replace(setup, checkpoint=with_random_weights(setup.checkpoint))
        collect_garbage_rarely()
        use_compilation_cache()
        self.prefilled: list[tuple[int, int, float, float]] = []
        self.llm = LLM.from_setup(setup, on_progress=self._note, expected_tokens=settings["expected_tokens"])
        plan = setup.plan
        self.facts |= {
            "import_s": imported - begin,
            "load_s": time.perf_counter() - imported,
            "base_bytes": base_bytes,
            "plan_bytes": plan.total_bytes,
            "plan_weight_bytes": plan.weight_bytes,
            "plan_cache_bytes": plan.cache_bytes,
            "retrieval_heads": sum(setup.config.num_retrieval),
        }

    def measure(
        self, prompt: list[int], batch: int, steps: int, sampling: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Returns the times of ``batch`` successive prefills, and of the steps that decode them together."""
        llm, compiled_before = self.llm, self.llm.compile_seconds
        self.prefilled.clear()
        params = self.sampling_params(max_tokens=steps + 1, ignore_eos=True, **(sampling or {}))
        begin = time.perf_counter()
        outputs = llm.generate([prompt] * batch, params)
        end = time.perf_counter()
        last_prefill, compiled = self.prefilled[-1][-2:]
        begin += compiled - compiled_before
        decode_compile_s = llm.compile_seconds - compiled
        end -= decode_compile_s
        return {
            "prefill_s": last_prefill - begin,
            "prefilled": len(prompt) * batch,
            "prefill_calls_s": sum(output.metrics.prefill_s for output in outputs),
            "prefill_curve": [] if batch > 1 else self._curve(begin),
            "decode_s": end - last_prefill,
            "decode_calls_s": outputs[0].metrics.decode_s,
            "steps": steps,
            "tokens": list(outputs[0].token_ids[: protocol.SHOWN_TOKENS]),
            "compile_s": llm.compile_seconds,
            "decode_compile_s": decode_compile_s,
            "programs": sorted(llm.engine.programs.names),
            "num_compilations": self.num_compilations,
        }

    def _curve(self, begin: float) -> list[tuple[int, float]]:
        """Returns the seconds until a number of the prompt's tokens was done, at powers of two and at the end."""
        return [(n, at - begin) for n, total, at, _ in self.prefilled if n == total or n & (n - 1) == 0]

    def _note(self, stage: str, done: int, total: int) -> None:
        if stage == "prefill":
            self.prefilled.append((done, total, time.perf_counter(), self.llm.compile_seconds))

    def _count_compilation(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        self.num_compilations += event == "/jax/core/compile/backend_compile_duration"


if __name__ == "__main__":
    protocol.serve(Ours)
