"""Writes sentencepiece_ids.json: a small SentencePiece vocabulary as GGUF metadata, and the library's own ids of texts.

    pip install "sentencepiece==0.2.3"
    python tests/golden/make_sentencepiece_golden.py

The model is trained on text.txt, with the settings of Llama 2's.
"""

import importlib.metadata
import io
import json
import re
from pathlib import Path

import sentencepiece

FOLDER = Path(__file__).parent
TEXTS = [
    "",
    "the lighthouse keeper",
    " leading",
    "  two leading  and   inside ",
    "In 1887 he counted 142 steps.",
    "tab\tand\nnewline\n\n",
    "naïve 日本語 😀",
    "aaaaaaaaaaaa eeeee oooooo",
    "lantern, clockwork; harbour-office!",
    "▁ is the mark itself",
    "<0x41> looks like a byte",
]


def train() -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((FOLDER / "text.txt").read_text().splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def kind(model: sentencepiece.SentencePieceProcessor, index: int) -> int:
    """The token type that a GGUF file gives this piece."""
    if model.is_unknown(index):
        return 2
    if model.is_control(index):
        return 3
    if model.id_to_piece(index) == "<tool>":
        return 4
    return 6 if model.is_byte(index) else 1


def main() -> None:
    model = train()
    ids = range(model.get_piece_size())
    golden = {
        "versions": {"sentencepiece": importlib.metadata.version("sentencepiece")},
        "metadata": {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
            "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
            "tokenizer.ggml.token_type": [kind(model, i) for i in ids],
            "tokenizer.ggml.bos_token_id": model.bos_id(),
            "tokenizer.ggml.eos_token_id": model.eos_id(),
            "tokenizer.ggml.unknown_token_id": model.unk_id(),
        },
        "texts": [
            {"text": text, "ids": model.encode(text), "decoded": model.decode(model.encode(text))} for text in TEXTS
        ],
    }
    text = json.dumps(golden, indent=1)
    text = re.sub(
        r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\n\s*", " ", match[0]), text
    )  # a list of plain values on one line
    (FOLDER / "sentencepiece_ids.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
