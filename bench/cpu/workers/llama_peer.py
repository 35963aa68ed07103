"""llama.cpp through `llama-cpp-python`'s low-level functions, as a worker (see `protocol`)."""

import ctypes
import time
from typing import Any

import protocol

CHUNK = 2048
"""Prompt tokens per call; llama.cpp splits them into batches of 512, its default."""


class LlamaCpp:
    """A model that prefills one sequence, copies its cache to the others of the batch, and decodes step by step."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.api = api = llama_cpp
        api.llama_backend_init()
        self.facts = {
            "llama-cpp-python": api.__version__,
            "instructions": api.llama_print_system_info().decode(),
        }
        if "model" not in settings:
            return
        options = api.llama_model_default_params()
        options.n_gpu_layers = 0
        options.use_extra_bufts = settings["use_extra_bufts"]
        self.model = api.llama_model_load_from_file(settings["model"].encode(), options)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {settings['model']}")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.slots = settings["batch"]
        sizes = api.llama_context_default_params()
        sizes.n_ctx = settings["max_length"] * self.slots
        sizes.n_batch, sizes.n_seq_max = CHUNK, self.slots
        sizes.n_threads = sizes.n_threads_batch = settings["threads"]
        sizes.flash_attn_type = int(settings["has_flash"])
        sizes.no_perf = True
        self.context = api.llama_init_from_model(self.model, sizes)
        if not self.context:
            raise ValueError(f"llama.cpp cannot make a context of {sizes.n_ctx} tokens")
        self.row = api.llama_batch_init(self.slots, 0, 1)

    def measure(self, prompt: list[int], batch: int, steps: int) -> dict[str, Any]:
        """Returns the times of one prefill, and of greedy steps of ``batch`` sequences."""
        api = self.api
        cache = api.llama_get_memory(self.context)
        api.llama_memory_clear(cache, True)
        begin = time.perf_counter()
        for start in range(0, len(prompt), CHUNK):
            chunk = prompt[start : start + CHUNK]
            ids = (ctypes.c_int32 * len(chunk))(*chunk)  # kept: the batch only points to them
            self._decode(api.llama_batch_get_one(ids, len(chunk)))
        tokens = [self._likeliest(-1)]
        prefill_s = time.perf_counter() - begin
        for sequence in range(1, batch):
            api.llama_memory_seq_cp(cache, 0, sequence, -1, -1)
        row, following = self.row, [tokens[0]] * batch
        row.n_tokens = batch
        begin = time.perf_counter()
        for step in range(steps):
            for sequence, token in enumerate(following):
                row.token[sequence], row.pos[sequence] = token, len(prompt) + step
                row.n_seq_id[sequence], row.seq_id[sequence][0] = 1, sequence
                row.logits[sequence] = 1
            self._decode(row)
            following = [self._likeliest(sequence) for sequence in range(batch)]
            tokens.append(following[0])
        decode_s = time.perf_counter() - begin
        return protocol.times(prompt, prefill_s, decode_s, steps, tokens)

    def _decode(self, batch: Any) -> None:
        if status := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode failed with status {status}")

    def _likeliest(self, index: int) -> int:
        import numpy as np

        logits = self.api.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


if __name__ == "__main__":
    protocol.serve(LlamaCpp)
