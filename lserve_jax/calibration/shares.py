"""Measures what answers lose as more heads stream, on prompts that were not used to find the gates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lserve_jax.calibration.masked import answer_loss, answer_states, retrieval_heads
from lserve_jax.calibration.progress import Done
from lserve_jax.calibration.prompts import Prompt
from lserve_jax.calibration.reader import Reader
from lserve_jax.calibration.scores import OnProgress
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.models.llama import Params

SHARES = (0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True, kw_only=True)
class ShareLoss:
    """Mean negative log-likelihood of answers in nats per token, by kind of prompt, if a share of the heads streams."""

    share: float
    streaming: int
    nll: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean over kinds."""
        return sum(self.nll.values()) / len(self.nll)


def expected_losses(
    params: Params,
    config: InferenceConfig,
    prompts: Sequence[Prompt],
    gates: NDArray[np.floating],
    *,
    local: int,
    chunk: int,
    shares: Sequence[float] = SHARES,
    done: Done | None = None,
    on_progress: OnProgress | None = None,
) -> list[ShareLoss]:
    """Returns the losses of dense attention and of each share of streaming heads, which have the lowest gates [L, K].

    Heads stream from the first token of a prompt on, with a window of ``local`` tokens. ``done`` has losses by prompt,
    heads and window; other arguments are those of `score_heads`.
    """
    reader, rows = Reader(params, config, prompts, chunk=chunk), []
    done = {} if done is None else done
    for share in (0.0, *shares):
        is_retrieval = retrieval_heads(gates, share)
        losses: dict[str, list[float]] = {}
        for number, prompt in enumerate(prompts, start=1):
            key = f"loss {prompt.digest} {np.packbits(is_retrieval).tobytes().hex()} {local}"
            if key not in done:
                hidden = answer_states(reader, prompt, is_retrieval, local)
                done[key] = np.asarray(answer_loss(params, hidden, reader.answer(prompt), config=config))
            losses.setdefault(prompt.kind, []).append(float(done[key]))
            if on_progress is not None:
                on_progress("losses", len(rows) * len(prompts) + number, num_readings(prompts, shares))
        nll = {kind: float(np.mean(values)) for kind, values in losses.items()}
        rows.append(ShareLoss(share=share, streaming=int(np.sum(~is_retrieval)), nll=nll))
    return rows


def num_readings(prompts: Sequence[Prompt], shares: Sequence[float] = SHARES) -> int:
    """Returns how many prompts `expected_losses` reads."""
    return (1 + len(shares)) * len(prompts)


def describe(rows: Sequence[ShareLoss]) -> str:
    """Returns a table for people, whose first row is dense attention."""
    dense, kinds = rows[0], list(rows[0].nll)
    lines = [["streaming", "heads", *kinds, "mean", "change"]]
    for row in rows:
        values = [*(row.nll[kind] for kind in kinds), row.mean]
        change = "" if row is dense else f"{row.mean - dense.mean:+.4f}"
        name = "dense" if row is dense else f"{row.share:.0%}"
        lines.append([name, str(row.streaming), *(f"{value:.4f}" for value in values), change])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(["negative log-likelihood of answers to other prompts of the same kinds, nats per token:", *table])
