"""The documentation keeps its promises: links resolve, commands parse, code runs, tables show what the code has."""

import argparse
import functools
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import context_picture, model_page
from lserve_jax.config.attention import PRESETS, AttentionConfig, from_preset
from lserve_jax.evaluation.variants import parse_variants

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "bench" / "README.md",
        ROOT / "tests" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}
README, ARCHITECTURE, ATTENTION = (PAGES[name] for name in ("README.md", "docs/architecture.md", "docs/attention.md"))


# --- links ------------------------------------------------------------------------------------------------------------


def links(text: str) -> list[tuple[str, str]]:
    """The links and pictures of a page to files and headings: (path, anchor), either empty."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(text))
    return [tuple(target.partition("#")[::2]) for target in targets if "://" not in target]


def without_code(text: str) -> str:
    """A page without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str):
    wrong = []
    for path, anchor in links(PAGES[page]):
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not target.exists():
            wrong.append(f"{path}: no such file")
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            wrong.append(f"{path}#{anchor}: no such heading; there are {sorted(anchors(target.read_text()))}")
    assert not wrong, "\n".join(wrong)


def test_every_page_can_be_reached_from_the_readme():
    reached, todo = set(), ["README.md"]
    while todo:
        page = todo.pop()
        reached.add(page)
        targets = (((ROOT / page).parent / path).resolve() for path, _ in links(PAGES[page]) if path)
        names = {target.relative_to(ROOT).as_posix() for target in targets}
        todo += [name for name in names & PAGES.keys() if name not in reached]
    assert reached == PAGES.keys()


# --- commands ---------------------------------------------------------------------------------------------------------

# A shell in which nothing is run: `python` writes its arguments down, other commands are not found.
SHELL = """
PATH=
command_not_found_handle() { :; }
python() { printf '%s\\037' "$@" >&3; printf '\\036' >&3; }
"""


def scripts(text: str) -> list[str]:
    """The shell scripts of a page: fenced and indented blocks, and commands in a code span."""
    fenced = re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    indented = re.findall(r"(?:^    .*\n)+", rest, re.M)
    spans = re.findall(r"`(python -m [^`]+)`", re.sub(r"^    .*\n", "", rest, flags=re.M))
    blocks = [*fenced, *indented, *(span.replace("\n", " ") for span in spans)]
    return [block for block in blocks if "python -m " in block and "…" not in block]


@functools.cache
def commands(page: str) -> tuple[tuple[str, ...], ...]:
    """The arguments of `python` in every command of a page, as the shell expands them."""
    found: list[tuple[str, ...]] = []
    for script in scripts(PAGES[page]):
        found += _run_without_running(script)
    return tuple(dict.fromkeys(found))


def _run_without_running(script: str) -> list[tuple[str, ...]]:
    read, write = os.pipe()
    with os.fdopen(read) as records:
        command = ["bash", "-c", f"exec 3>&{write}\n{SHELL}\n{script}"]
        # In a folder where no relative path leads anywhere; what is not found is no matter.
        subprocess.run(command, cwd="/proc/self", pass_fds=(write,), capture_output=True, check=False)
        os.close(write)
        return [tuple(record.split("\037")[:-1]) for record in records.read().split("\036")[:-1]]


class Parsed(Exception):  # noqa: N818 - no error
    """A command line has been parsed; nothing was run."""


def main_of(module: str) -> Any:
    """The `main` of a command, which is a module or a package with a `__main__`."""
    found = importlib.util.find_spec(module)
    assert found is not None, f"there is no module {module}"
    return importlib.import_module(f"{module}.__main__" if found.submodule_search_locations else module).main


def parse(module: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What a command makes of its arguments: `main` up to the end of its parser."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        raise Parsed(parse_args(self, *args, **options))

    main = main_of(module)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    if not inspect.signature(main).parameters:
        assert not arguments, f"{module} takes no arguments"
        return argparse.Namespace()
    with pytest.raises(Parsed) as parsed:
        main(list(arguments))
    return parsed.value.args[0]


def all_commands() -> list[tuple[str, ...]]:
    """Every command of every page once."""
    return list(dict.fromkeys(command for page in PAGES for command in commands(page)))


def test_the_pages_show_every_command():
    shown = {command[1] for command in all_commands() if command[0] == "-m"}
    folder = ROOT / "lserve_jax"
    programs = {
        f"lserve_jax.{path.stem}" for path in folder.glob("*.py") if '__name__ == "__main__"' in path.read_text()
    } | {f"lserve_jax.{path.parent.name}" for path in folder.glob("*/__main__.py")}
    assert programs <= shown
    assert {"bench.cpu", "bench.e2e", "bench.gpu", "bench.kernels", "bench.serve"} <= shown


@pytest.mark.parametrize("command", all_commands(), ids=" ".join)
def test_every_command_parses(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    assert command[0] == "-m"
    if "--help" in command:
        return  # run below
    if len(command) == 2:  # a command that is only named
        assert importlib.util.find_spec(command[1])
        return
    parsed = parse(command[1], command[2:], monkeypatch)
    if command[1] == "lserve_jax.evaluate" and parsed.variants:
        parse_variants(parsed.variants)


def flags(module: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The flags that a command's help lists."""

    def stop(self: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        raise Parsed(self.format_help())

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as parsed:
        main_of(module)([])
    return set(re.findall(r"--\w[\w-]*", parsed.value.args[0]))


def test_every_flag_that_the_text_names_is_one(monkeypatch: pytest.MonkeyPatch):
    names = (
        "lserve_jax.generate",
        "lserve_jax.calibrate",
        "lserve_jax.evaluate",
        "lserve_jax.serve",
        "bench.cpu",
        "bench.serve",
        "bench.kernels",
        "bench.gpu",
        "tests.fuzz",
        "tests.soak",
    )
    known = {name: flags(name, monkeypatch) for name in names}
    wrong = []
    for page, text in PAGES.items():
        for command, options in re.findall(
            r"`(?:(\w+) )?(--\w[^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        ):
            allowed = known.get(f"lserve_jax.{command}") or set.union(*known.values())
            wrong += [f"{page}: {flag}" for flag in re.findall(r"--\w[\w-]*", options) if flag not in allowed]
    assert not wrong, "\n".join(wrong)


def test_every_flag_of_the_server_is_on_its_page_or_a_setting_of_the_page_that_it_names(
    monkeypatch: pytest.MonkeyPatch,
):
    section = PAGES["docs/serving.md"].split("\n### Flags\n")[1].split("\n## ")[0]
    assert ("attention.md", "settings") in links(section)
    named = set(re.findall(r"--\w[\w-]*", section))
    settings = {f"--{name.replace('_', '-')}" for name in settings_explained()}
    found = {flag.replace("--no-", "--") for flag in flags("lserve_jax.serve", monkeypatch)}
    assert found - named - settings == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [command for command in all_commands() if {"--help", "--dry-run"} & set(command)],
    ids=" ".join,
)
def test_quick_commands_run(command: tuple[str, ...]):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


# --- code -------------------------------------------------------------------------------------------------------------


def python_blocks(page: str) -> str:
    """The Python blocks of a page, which are one script."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", PAGES[page], re.S | re.M))


def test_the_pages_with_code_are_those_that_run():
    assert {page for page in PAGES if python_blocks(page)} == {"README.md", "docs/usage.md", "docs/research.md"}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/usage.md", "docs/research.md"])
def test_the_code_of_a_page_runs(page: str, embedded_gguf: Path, tmp_path: Path):
    script = tmp_path / "page.py"
    script.write_text(python_blocks(page), encoding="utf-8")
    # A user's process, in which nothing is promoted strictly and warnings are no errors.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


# --- what is made by scripts ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_of_the_embedded_model_is_what_its_script_writes(embedded_gguf: Path):
    assert PAGES[f"docs/models/{model_page.MODEL}.md"] == model_page.page(), "run python -m bench.model_page"


def test_the_picture_of_the_readme_shows_dense_and_lserve():
    assert "(docs/context.png)" in README
    found = {(curve.system, curve.part): dict(curve.points) for curve in context_picture.curves()}
    assert {"dense", "lserve"} <= {system for system, _ in found}
    assert all(len(points) > 1 for points in found.values())


# --- numbers ----------------------------------------------------------------------------------------------------------

RESULTS = ROOT / "bench" / "results"
SYSTEMS = {
    "`lserve`": "lserve",
    "`lserve`, int8 weights (default)": "lserve",
    "`lserve`, bfloat16 weights": "lserve_bf16",
    "`lserve`, int8 pages": "lserve_int8",
    "`lserve`, budget 1024": "lserve",
    "`lserve`, budget 4096": "lserve:token_budget=4096",
    "our `dense`": "dense",
    "`dense`": "dense",
    "transformers": "transformers bf16",
    "transformers, bfloat16, SDPA": "transformers bf16",
    "transformers, bfloat16": "transformers bf16",
    "llama.cpp F16": "llama.cpp F16",
    "llama.cpp F16, flash attention": "llama.cpp F16 flash",
    "llama.cpp Q8_0, flash attention": "llama.cpp Q8_0 flash",
    "llama.cpp Q4_1 (weights of a third of the bytes)": "llama.cpp Q4_1",
}
FIELDS = {
    "prefill, tokens/s": ("prefill_tok_per_s", 1.0, 0),
    "decode, ms per token": ("ms_per_token", 1.0, 1),
    "peak memory, GiB": ("peak_bytes", 2.0**30, 2),
}
SETTINGS = {
    "dense": "dense",
    "lserve, int8": "lserve:token_budget=25%+kv_dtype=int8",
    "lserve, int4": "lserve:token_budget=25%+kv_dtype=int4",
    "lserve, int8, half of the context": "lserve:token_budget=50%+kv_dtype=int8",
    "lserve, int8, everything read": "lserve:token_budget=100%+kv_dtype=int8",
}


def rows_after(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, its own heads first."""
    section = PAGES[page].split(f"\n{heading}\n")[1]
    table = re.search(r"(?:^\|.*\|\n)+", section, re.M)
    assert table is not None
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.group().splitlines()]
    return [rows[0], *rows[2:]]


@pytest.mark.parametrize(
    ("page", "heading", "folder", "part"),
    [
        ("README.md", "## Speed on a CPU", "cpu_weights", "single"),
        ("docs/performance.md", "## One sequence on a CPU", "cpu_weights", "single"),
        ("docs/performance.md", "### With AMX, from an earlier version", "cpu", "single"),
        ("docs/performance.md", "## Long contexts", "cpu_long", "long"),
    ],
)
def test_speeds_are_those_of_the_committed_results(page: str, heading: str, folder: str, part: str):
    lines = (RESULTS / folder / "medians.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["part"] == part]
    found = {(row["system"], row["length"], row["field"]): row["median"] for row in rows}
    heads, *shown = rows_after(page, heading)
    name = ""
    columns = []
    for head in heads[1:]:
        *named, length = head.rsplit(": ", 1)
        name = named[0] if named else name
        columns.append((FIELDS[name], int(length.removesuffix("K")) * (1024 if "K" in length else 1)))
    for label, *numbers in shown:
        for ((field, unit, digits), length), number in zip(columns, numbers, strict=True):
            value = found.get((SYSTEMS[label], length, field))
            assert number == ("–" if value is None else f"{value / unit:.{digits}f}"), (label, field, length)


def score(cell: dict[str, Any]) -> dict[str, Any]:
    """What a table shows of a cell as right."""
    return cell["token_accuracy" if cell["task"] == "copy" else "score"]


def interval(one: dict[str, Any] | None, unit: float, digits: int) -> str:
    """A difference with its interval, as tables show it."""
    if one is None:
        return "–"
    mean, low, high = (f"{unit * one[name]:+.{digits}f}".replace("-", "−") for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def accuracies() -> dict[tuple[str, int, str], dict[str, Any]]:
    """The committed results by task, length and variant."""
    found = json.loads((RESULTS / "accuracy" / "summary.json").read_text(encoding="utf-8"))["cells"]
    return {(cell["task"], cell["length"], cell["variant"]): cell for cell in found}


def test_accuracies_are_those_of_the_committed_results():
    found = accuracies()
    _, *shown = rows_after("docs/accuracy.md", "## Sparse against dense")
    assert len(shown) == sum("score" in cell for cell in found.values())
    for task, length, setting, *numbers in shown:
        cell = found[task.split()[0], int(length.replace(",", "")), SETTINGS[setting]]
        assert numbers == [
            str(cell["n"]),
            f"{100 * score(cell)['mean']:.1f}%",
            interval(score(cell)["difference"], 100, 1),
            f"{cell['nll']['mean']:.3f}",
            interval(cell["nll"]["difference"], 1, 3),
            f"{cell['kl']['mean']:.3f}" if "kl" in cell else "–",
            f"{cell['pages_read_ratio']:.0%}",
        ], (task, length, setting)


def test_perplexities_are_those_of_the_committed_results():
    found = accuracies()
    _, *shown = rows_after("docs/accuracy.md", "### Prose")
    assert len(shown) == sum("tail_nll" in cell for cell in found.values())
    for setting, *numbers in shown:
        cell = found["perplexity", 2048, SETTINGS[setting]]
        expected = [str(cell["n"])]
        for name in ("nll", "tail_nll"):
            difference = cell[name].get("difference")
            more = difference and {part: math.expm1(difference[part]) for part in ("mean", "low", "high")}
            shares = interval(more, 100, 1)
            expected += [f"{math.exp(cell[name]['mean']):.2f}", re.sub(r"^(\S+)", r"\1%", shares) if more else "–"]
        assert numbers == [*expected, f"{cell['kl']['mean']:.3f}" if "kl" in cell else "–"], setting


def test_the_accuracies_of_the_readme_are_those_of_the_committed_results():
    found = accuracies()
    _, *shown = rows_after("README.md", "## Accuracy")
    for task, *numbers in shown:
        (name,) = re.findall(r"`(\w+)`", task)
        dense, sparse = (found[name, 2048, SETTINGS[setting]] for setting in ("dense", "lserve, int8"))
        shares = [f"{100 * score(cell)['mean']:.1f}%" for cell in (dense, sparse)]
        assert numbers == [*shares, interval(score(sparse)["difference"], 100, 1)]


# --- tables -----------------------------------------------------------------------------------------------------------


def cells(config: AttentionConfig) -> list[str]:
    """A preset as the table of presets shows it."""
    return [
        "all" if config.token_budget is None else str(config.token_budget),
        str(config.page_size),
        str(config.sub_page_size),
        str(config.selector_interval),
        str(config.static_sparsity),
        ", ".join(map(str, config.dense_layers)) or "none",
        config.kv_dtype,
    ]


def test_the_preset_table_shows_every_preset_as_it_is():
    table = ATTENTION.split("## Presets")[1].split("\n## ")[0]
    rows = {
        row[0].strip("`"): row[2:] for row in re.findall(r"^\| (`\w+`) " + r"\| ([^|]+) " * 8 + r"\|$", table, re.M)
    }
    assert rows.keys() == PRESETS.keys()
    assert {name: list(row) for name, row in rows.items()} == {name: cells(from_preset(name)) for name in PRESETS}


def settings_explained() -> set[str]:
    """The attention settings that have a heading on their page."""
    headings = re.findall(r"^### (.+)$", ATTENTION, re.M)
    return {name for heading in headings for name in re.findall(r"`(\w+)`", heading)}


def test_every_attention_setting_is_explained():
    assert settings_explained() == set(AttentionConfig.__dataclass_fields__) - {"preset"}


def test_the_page_sizes_that_follow_from_the_budget_are_as_the_table_says():
    table = ATTENTION.split("### `page_size`")[1].split("\n### ")[0]
    rows = re.findall(r"^\| (below )?(\d+)[^|]* \| (\d+) \| (\d+) \|$", table, re.M)
    assert len(rows) == 4
    for below, budget, page, sub_page in rows:
        config = from_preset("lserve", token_budget=int(budget) - bool(below))
        assert (config.page_size, config.sub_page_size) == (int(page), int(sub_page)), budget


def test_the_map_names_the_packages_and_all_that_is_in_them():
    tree = [line for line in ARCHITECTURE.split("## Map")[1].split("\n## ")[0].splitlines() if line.startswith("    ")]
    named = set(re.findall(r"\b([a-z_]+(?:\.py|/))(?![a-z])", "\n".join(tree)))
    existing = set()
    for package in ("pallas_kernels", "lserve_jax"):
        rooms = [path for path in (ROOT / package).iterdir() if path.suffix == ".py" or any(path.glob("*.py"))]
        existing |= {path.name + "/" * path.is_dir() for path in rooms if path.stem != "__init__"}
    files_of_an_op = {"api.py", "reference.py", "xla.py", "mosaic_gpu.py"}
    assert named - files_of_an_op - {"pallas_kernels/", "lserve_jax/", "setup.py"} == existing


def test_every_test_that_the_table_of_faults_names_exists():
    folder = ROOT / "tests"
    named = re.findall(r"`((?:lserve_jax|pallas_kernels)/[\w/]+\.py)(?:::(\w+))?`", PAGES["tests/README.md"])
    assert len(named) > 12
    for file, function in named:
        assert f"def {function}" in (folder / file).read_text(), f"{file}::{function}"
