"""`transformers` on torch, with SDPA, as a worker (see `protocol`)."""

import time
from typing import Any

import protocol


class Transformers:
    """A model that prefills a prompt in one call, repeats its cache for the batch, and decodes step by step."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]

        self.torch = torch
        torch.set_num_threads(settings["threads"])
        self.facts = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }
        if "model" not in settings:
            return
        is_gguf = settings["model"].endswith(".gguf")
        folder, _, file = settings["model"].rpartition("/") if is_gguf else (settings["model"], "", None)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa"
        ).eval()
        if "export_to" in settings:  # a GGUF file made a folder; its weights are quantised no more
            self.model.hf_quantizer = self.model.config.quantization_config = None
            self.model.save_pretrained(settings["export_to"])
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
            tokenizer.save_pretrained(settings["export_to"])

    def measure(self, prompt: list[int], batch: int, steps: int) -> dict[str, Any]:
        """Returns the times of one prefill, and of greedy steps of ``batch`` sequences."""
        torch = self.torch
        with torch.inference_mode():
            begin = time.perf_counter()
            out = self.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens = [int(token)]
            prefill_s = time.perf_counter() - begin
            cache = out.past_key_values
            if batch > 1:
                cache.batch_repeat_interleave(batch)
                token = token.repeat(batch, 1)
            begin = time.perf_counter()
            for _ in range(steps):
                out = self.model(token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(int(token[0, 0]))
            decode_s = time.perf_counter() - begin
        return protocol.times(prompt, prefill_s, decode_s, steps, tokens)


if __name__ == "__main__":
    protocol.serve(Transformers)
