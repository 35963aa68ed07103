"""The reference's distributions in the folder of a run, and what a tiny model's scores are compared with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lserve_jax import LLM
from lserve_jax.engine.outputs import ScoreOutput
from lserve_jax.evaluation.measurement import Item
from lserve_jax.evaluation.reference import StoredReference, has_distributions
from lserve_jax.evaluation.store import Store

pytestmark = pytest.mark.slow

TINY = str(Path(__file__).parents[2] / "golden" / "tiny" / "llama3")
SIZES: dict[str, Any] = {"max_model_len": 256, "prefill_chunk": 64, "max_num_seqs": 2, "dtype": "float32"}
SPARSE: dict[str, Any] = {"page_size": 16, "sub_page_size": 4, "sink": 16, "local": 32, "token_budget": 64}
PROMPT = np.random.default_rng(3).integers(3, 128, 150).astype(np.int32)
CONTINUATION = tuple(np.random.default_rng(4).integers(3, 128, 20).tolist())
ITEM = Item(task="echo", length=150, index=2, prompt=PROMPT, continuation=CONTINUATION, room=20, record={})
FILE = Path("reference") / "echo-150-2.npz"


@pytest.fixture(scope="module")
def dense() -> LLM:
    return LLM(TINY, attention="dense", **SIZES)


def scored(llm: LLM) -> ScoreOutput:
    (score,) = llm.score([PROMPT.tolist()], [CONTINUATION], has_logits=True)
    return score


def reference(folder: Path, *, is_measured: bool = False) -> StoredReference:
    return StoredReference(store=Store(folder, {}), label="dense", is_measured=is_measured)


@pytest.fixture
def measured(dense: LLM, tmp_path: Path) -> Path:
    """The folder of a run with the reference's distributions."""
    assert not has_distributions(tmp_path, ITEM.key)
    assert reference(tmp_path, is_measured=True).compare(ITEM, scored(dense)) == {}
    assert has_distributions(tmp_path, ITEM.key)
    assert [path.name for path in (tmp_path / "reference").iterdir()] == [FILE.name], "no partial file is left"
    return tmp_path


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64))
    return weights / weights.sum(-1, keepdims=True)


def test_the_divergence_is_that_of_whole_distributions(dense: LLM, measured: Path):
    sparse = LLM(TINY, **SIZES, **SPARSE)
    score = scored(sparse)
    found = reference(measured).compare(ITEM, score)
    # The reference's distributions by prefill, all at once: through another path than that of decoding.
    p = probabilities(dense.logits([*PROMPT.tolist(), *CONTINUATION])[len(PROMPT) - 1 : -1])
    assert score.logits is not None
    q = probabilities(score.logits)
    expected = np.sum(p * np.log(p / q), axis=-1)
    assert expected[0] < 1e-6, "the first token comes from prefill, which selects nothing"
    assert found["kl"] == pytest.approx(expected.mean(), rel=1e-3)
    assert found["kl"] > 1e-3
    assert found["same_token"] == np.mean(p.argmax(-1) == q.argmax(-1)) < 1


def test_a_model_that_reads_everything_does_not_diverge(dense: LLM, measured: Path):
    itself = reference(measured).compare(ITEM, scored(dense))
    assert itself["kl"] < 1e-7
    assert itself["same_token"] == 1
    same = LLM(TINY, **SIZES, **SPARSE | {"token_budget": None, "static_sparsity": 0.0, "kv_dtype": "float32"})
    found = reference(measured).compare(ITEM, scored(same))
    assert found["kl"] < 1e-6
    assert found["same_token"] == 1
    rounded = LLM(TINY, attention="dense", kv_dtype="int4", **SIZES)
    assert reference(measured).compare(ITEM, scored(rounded))["kl"] > 1e-5


def test_without_its_file_there_is_no_comparison(dense: LLM, measured: Path):
    (measured / FILE).unlink()
    assert reference(measured).compare(ITEM, scored(dense)) == {}


def test_files_that_are_damaged_or_of_something_else_are_refused_in_one_line(dense: LLM, measured: Path):
    path, score = measured / FILE, scored(dense)
    whole = path.read_bytes()
    arrays = dict(np.load(path))
    for content in (b"", whole[:100], whole[:-1], whole.replace(b"rest", b"test"), b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{FILE.name}: damaged .*delete it .*name another --out") as error:
            reference(measured).compare(ITEM, score)
        assert "\n" not in str(error.value)
    others: list[dict[str, np.ndarray]] = [
        {name: values[:-1] for name, values in arrays.items()},
        {**arrays, "tokens": arrays["tokens"] + 1},
        {**arrays, "rest": arrays["rest"].astype(np.float64)},
    ]
    for other in others:
        np.savez(path, allow_pickle=False, **other)
        with pytest.raises(ValueError, match=rf"{FILE.name}: not of this prompt and model: delete it"):
            reference(measured).compare(ITEM, score)
