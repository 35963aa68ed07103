"""LongBench (arXiv 2308.14508): questions, summaries, few-shot and code over long documents, from its published files.

    task = open_task("hotpotqa", folder, tokenizer)   # InputError in one line: unknown name, missing or malformed file
    len(task)                                         # samples in the file
    task.use_chat_format                              # False: render this task's prompts raw, without chat format
    task.make(Request(length=…, index=i, …))          # i below len(task); seed and haystack have no effect
    task.metric(answer, sample.references)            # 0 … 1; post-processing and the best reference included

It is a `Task` (evaluation/sample.py). ``length`` is the most tokens of a rendered prompt: a longer prompt loses its
middle, as published; a shorter one stays unchanged. `NAMES` lists the tasks; those that end in ``_e`` are LongBench-E,
whose scores are means by ``sample.info["bucket"]``.
"""

import functools
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lserve_jax.config.errors import InputError, shown
from lserve_jax.evaluation.metrics import METRICS
from lserve_jax.evaluation.sample import Request, Sample
from lserve_jax.text.tokenizer import Tokenizer

_HUB_ID = "THUDM/LongBench"
_ARCHIVE = "data.zip"  # all tasks, as data/<name>.jsonl; the only source, as `datasets` runs no scripts since 4.0


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What the benchmark defines for a task: a row of data/longbench.json.

    Attributes:
      prompt: template with {context} and {input}.
      max_tokens: most tokens of an answer.
      metric: key of `METRICS`.
      use_chat_format: whether an instruct model gets the prompt as a user's message; False for few-shot and code.
      first_line_only: whether an answer counts up to its first line end, since models continue with another example.
      is_in_e: whether LongBench-E also has the task.
    """

    prompt: str
    max_tokens: int
    metric: str
    use_chat_format: bool
    first_line_only: bool
    is_in_e: bool


def _read_datasets() -> dict[str, Dataset]:
    text = (resources.files("lserve_jax") / "data" / "longbench.json").read_text(encoding="utf-8")
    rows = {name: Dataset(**row) for name, row in json.loads(text)["tasks"].items()}
    return rows | {f"{name}_e": row for name, row in rows.items() if row.is_in_e}


_DATASETS: Mapping[str, Dataset] = _read_datasets()
NAMES: tuple[str, ...] = tuple(_DATASETS)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A line of a published file.

    Attributes:
      input: the question, the last example or the beginning of the code; may be empty.
      context: the long text.
      answers: right answers, any of which counts.
      length: words of the whole sample (characters of a Chinese one), as published.
      classes: all classes, if answers are classes.
      id: the sample's id; may be empty.
    """

    input: str
    context: str
    answers: tuple[str, ...]
    length: int
    classes: tuple[str, ...]
    id: str

    @property
    def bucket(self) -> str:
        """The mean of LongBench-E to which the sample belongs."""
        return "0-4k" if self.length < 4000 else "4-8k" if self.length < 8000 else "8k+"


@dataclass(frozen=True, kw_only=True)
class LongBenchTask:
    """A task of LongBench with its samples.

    Attributes:
      name: one of `NAMES`.
      dataset: what the benchmark defines.
      records: the samples.
      tokenizer: the model's, to cut prompts.
      score: answer and reference → 0 … 1.
    """

    name: str
    dataset: Dataset
    records: Sequence[Record]
    tokenizer: Tokenizer
    score: Callable[[str, str], float]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def use_chat_format(self) -> bool:
        """Whether an instruct model gets the prompts as user's messages; if not, they are rendered raw."""
        return self.dataset.use_chat_format

    def metric(self, answer: str, references: tuple[str, ...]) -> float:
        """Returns the score, 0 … 1, by the best reference."""
        if self.dataset.first_line_only:
            answer = answer.lstrip("\n").split("\n")[0]
        return max(self.score(answer, reference) for reference in references)

    def make(self, request: Request) -> Sample:
        """Returns sample ``request.index``, whose rendered prompt has at most ``request.length`` tokens.

        Raises:
          InputError: if the length has no room for anything, or the file has fewer samples.
        """
        if not 0 <= request.index < len(self.records):
            raise InputError(f"{self.name} has {len(self.records)} samples, there is no number {request.index}")
        record = self.records[request.index]
        return Sample(
            text=self._fit(self.dataset.prompt.format(context=record.context, input=record.input), request),
            references=record.answers,
            max_tokens=self.dataset.max_tokens,
            info={"id": record.id, "words": record.length, "bucket": record.bucket},
        )

    def _fit(self, text: str, request: Request) -> str:
        """Returns the text, without its middle if its prompt would otherwise be too long.

        As published, the tokens of the text's two ends are decoded and joined. Encoded again, they may become other and
        more tokens; then the ends are shortened.
        """
        num_tokens = len(request.render(text, ""))
        if num_tokens <= request.length:
            return text
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        keep = len(ids)
        while num_tokens > request.length:
            keep -= num_tokens - request.length
            half = keep // 2
            if half < 1:
                raise InputError(f"{self.name}: a prompt of {request.length} tokens has no room for anything")
            ends = (self.tokenizer.decode(part, skip_special_tokens=False) for part in (ids[:half], ids[-half:]))
            text = "".join(ends)
            num_tokens = len(request.render(text, ""))
        return text


def open_task(name: str, folder: str | Path | None, tokenizer: Tokenizer) -> LongBenchTask:
    """Returns a task with its samples, all of which can be scored.

    Args:
      name: one of `NAMES`.
      folder: where ``<name>.jsonl`` is; None fetches the published files from the hub, once.
      tokenizer: the model's.

    Raises:
      InputError: see `load`.
    """
    records = load(name, folder)
    dataset = _DATASETS[name]
    score = METRICS[dataset.metric]
    if dataset.metric == "classification":
        score = functools.partial(score, classes=records[0].classes)
    return LongBenchTask(name=name, dataset=dataset, records=records, tokenizer=tokenizer, score=score)


def load(name: str, folder: str | Path | None) -> list[Record]:
    """Returns the samples of a task.

    Raises:
      InputError: if the name is unknown, the file is missing, or a line is malformed; in one line that names the file
        and the line.
    """
    if name not in _DATASETS:
        raise InputError(f"unknown LongBench task {name!r}; known are {', '.join(NAMES)}")
    file = _find(name, folder)
    metric = _DATASETS[name].metric
    records = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):  # only at \n: texts contain other line ends
        if not line.strip():
            continue
        try:
            record = _parse(line, metric)
            if records and record.classes != records[0].classes:
                raise InputError("all_classes differ from those of the lines before")
        except InputError as error:
            raise InputError(f"{file}, line {number}: {error}") from None
        records.append(record)
    if not records:
        raise InputError(f"{file} has no samples")
    return records


def _parse(line: bytes, metric: str) -> Record:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"not a line of JSON in UTF-8 ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"must be a JSON object, got {type(row).__name__}")
    classes = row.get("all_classes") if metric == "classification" else []
    wanted: list[tuple[str, Any, bool, str]] = [
        ("input", row.get("input"), isinstance(row.get("input"), str), "a string"),
        ("context", row.get("context"), isinstance(row.get("context"), str), "a string"),
        ("answers", row.get("answers"), _are_texts(row.get("answers")), "a list of at least one string"),
        ("length", row.get("length"), type(row.get("length")) is int, "a whole number"),
        ("all_classes", classes, metric != "classification" or _are_texts(classes), "a list of at least one string"),
    ]
    problems = [
        f"{key} must be {what}, got {shown(value, 40)}" if key in row else f"{key} ({what}) is missing"
        for key, value, is_met, what in wanted
        if not is_met
    ]
    if problems:
        raise InputError("; ".join(problems))
    if metric.startswith("retrieval"):
        for answer in row["answers"]:
            METRICS[metric]("", answer)  # raises if the answer names no paragraph
    return Record(
        input=row["input"],
        context=row["context"],
        answers=tuple(row["answers"]),
        length=row["length"],
        classes=tuple(classes or ()),
        id=str(row.get("_id", "")),
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _find(name: str, folder: str | Path | None) -> Path | zipfile.Path:
    """Returns the task's file."""
    if folder is None:
        file = zipfile.Path(_download(name), f"data/{name}.jsonl")
        where = f"{_ARCHIVE} of {_HUB_ID}"
    else:
        file = Path(folder) / f"{name}.jsonl"
        where = str(folder)
    if not file.is_file():
        raise InputError(f"LongBench task {name}: {where} has no file {name}.jsonl")
    return file


def _download(name: str) -> str:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise InputError(
            f"LongBench task {name}: name the folder with {name}.jsonl, or, to fetch it from the hub, install "
            "the extra: pip install 'lserve_jax[eval]'"
        ) from None
    try:
        return hf_hub_download(_HUB_ID, _ARCHIVE, repo_type="dataset")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"LongBench task {name}: name the folder with {name}.jsonl; the hub did not give it ({reason})"
        ) from None
