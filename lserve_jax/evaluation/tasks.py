"""The table of tasks."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from lserve_jax.config.errors import InputError
from lserve_jax.evaluation.copying import Copying
from lserve_jax.evaluation.niah import NIAH
from lserve_jax.evaluation.qa import QuestionAnswering
from lserve_jax.evaluation.qa_invented import one_hop, two_hops
from lserve_jax.evaluation.qa_published import read_hotpot, read_squad
from lserve_jax.evaluation.sample import Task
from lserve_jax.evaluation.vt import DirectAssignment, VariableTracking
from lserve_jax.evaluation.words import CommonWords, FrequentWords

_QA_FILES = {"qa_1": ("squad.json", read_squad), "qa_2": ("hotpotqa.json", read_hotpot)}
"""File names of RULER's download script."""

_ALL: tuple[Task, ...] = (
    *NIAH,
    VariableTracking(name="vt"),
    CommonWords(name="cwe"),
    FrequentWords(name="fwe"),
    QuestionAnswering(name="qa_1", cases=one_hop),
    QuestionAnswering(name="qa_2", cases=two_hops),
    DirectAssignment(name="vt_direct"),
    Copying(name="copy"),
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})
"""RULER's 13 tasks, then tasks that small models can do, in display order."""


def get_task(name: str, qa_folder: Path | None = None) -> Task:
    """Returns a task.

    Args:
      name: one of `TASKS`.
      qa_folder: folder of squad.json and hotpotqa.json (RULER's names for SQuAD's dev-v2.0.json and HotpotQA's
        hotpot_dev_distractor_v1.json); qa_1 and qa_2 then ask their questions instead of invented ones.

    Raises:
      InputError: if there is no such task, or its file cannot be used.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}: known are {', '.join(TASKS)}")
    if qa_folder is None or name not in _QA_FILES:
        return TASKS[name]
    file, read = _QA_FILES[name]
    return QuestionAnswering(name=name, cases=read(qa_folder / file))
