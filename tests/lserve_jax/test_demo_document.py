import json
from importlib import resources
from pathlib import Path

from lserve_jax.text.tokenizer import Tokenizer
from lserve_jax.weights.load import open_checkpoint

DATA = resources.files("lserve_jax") / "data"
DEMO = json.loads((DATA / "demo.json").read_text(encoding="utf-8"))
DOCUMENT = (DATA / DEMO["document"]).read_text(encoding="utf-8")


def test_the_document_has_about_4000_tokens_and_the_fact_in_its_middle(embedded_gguf: Path):
    source = open_checkpoint(str(embedded_gguf)).tokenizer_source
    assert source is not None
    tokenizer = Tokenizer.from_gguf(source)  # type: ignore[arg-type]
    length = len(tokenizer.encode(DOCUMENT))
    assert 3_700 <= length <= 4_200
    before = len(tokenizer.encode(DOCUMENT[: DOCUMENT.index(DEMO["answer"])]))
    assert 0.4 <= before / length <= 0.6


def test_the_answer_stands_only_in_the_document():
    assert DEMO["answer"] in DOCUMENT
    assert DEMO["answer"] not in DEMO["question"]
    paragraphs = [paragraph for paragraph in DOCUMENT.split("\n\n") if DEMO["answer"] in paragraph]
    assert len(paragraphs) == 1


def test_the_document_is_prose_and_repeats_no_paragraph():
    paragraphs = DOCUMENT.strip().split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs) > 30
    words = DOCUMENT.lower().split()
    runs = [tuple(words[i : i + 8]) for i in range(len(words) - 7)]
    assert len(set(runs)) > 0.99 * len(runs)
