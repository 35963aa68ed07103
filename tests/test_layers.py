"""The architecture as a test: imports go only downwards, and what must not know of jax does not."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "lserve_jax")
OPS = ("kv_write", "block_select", "prefill_attention", "page_select", "decode_attention", "quantized_matmul")
COMMANDS = ("generate", "convert", "demo", "calibrate", "evaluate", "harness")

# Bottom first. A module may import from the rows under its own; "name.*" is a room: its modules may import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("pallas_kernels.core.*",),
    (
        "pallas_kernels.decode_attention.program",
        "pallas_kernels.page_select.selection",
        "pallas_kernels.prefill_attention.blocks",
        "pallas_kernels.prefill_attention.codes",
        "pallas_kernels.prefill_attention.own",
        "pallas_kernels.quantized_matmul.digits",
        "pallas_kernels.quantized_matmul.program",
    ),
    ("pallas_kernels.prefill_attention.program",),
    # An implementation knows neither another one nor another op.
    (
        *(f"pallas_kernels.{op}.{name}" for op in OPS for name in ("reference", "xla")),
        *(f"pallas_kernels.{op}.mosaic_gpu" for op in OPS if op != "block_select"),
    ),
    tuple(f"pallas_kernels.{op}.api" for op in OPS),
    tuple(f"pallas_kernels.{op}" for op in OPS),
    ("pallas_kernels",),
    # One row per room. The top level holds what a user types or imports.
    ("lserve_jax.config.*",),
    ("lserve_jax.models.*",),
    ("lserve_jax.weights.*", "lserve_jax.runtime.*"),
    ("lserve_jax.text.*",),
    ("lserve_jax.engine.*", "lserve_jax.calibration.*"),
    ("lserve_jax.llm",),
    ("lserve_jax",),
    ("lserve_jax.evaluation.*", "lserve_jax.cli.*"),
    ("lserve_jax.serve.*",),
    tuple(f"lserve_jax.{name}" for name in (*COMMANDS, "engine_setup")),
)

# These decide on the host and are tested without a device: neither they nor what they import may import jax.
WITHOUT_JAX = (
    "lserve_jax.config.model",
    "lserve_jax.config.hf",
    "lserve_jax.config.json_file",
    "lserve_jax.config.reader",
    "lserve_jax.config.rope",
    "lserve_jax.config.attention",
    "lserve_jax.config.heads",
    "lserve_jax.config.pages",
    "lserve_jax.config.checks",
    "lserve_jax.config.digest",
    "lserve_jax.config.settings",
    "lserve_jax.config.sizes",
    "lserve_jax.config.inference",
    "lserve_jax.engine.request",
    "lserve_jax.engine.allocator",
    "lserve_jax.engine.scheduler",
    "lserve_jax.engine.plans",
    "lserve_jax.engine.pools",
    "lserve_jax.engine.prefix_cache",
    "lserve_jax.engine.room",
    "lserve_jax.engine.reads",
    "lserve_jax.engine.host",
)
JAX_LIBRARIES = {"jax", "jaxlib", "flax", "orbax", "optax"}

NEVER_IMPORTED = {
    "tests": "the product knows nothing of its tests",
    "bench": "the product knows nothing of its benches",
    "pytest": "test code stays in tests/",
    "hypothesis": "test code stays in tests/",
    "unittest": "test code stays in tests/",
    "pickle": "a checkpoint must not run code",
    "marshal": "a checkpoint must not run code",
    "shelve": "a checkpoint must not run code",
    "torch": "the product needs no torch",
    "transformers": "the product needs no transformers",
}


@cache
def modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name; a package stands for its `__init__`."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> tuple[tuple[str, int], ...]:
    """(dotted name, line) of everything that a module imports, inside functions and for type checking too."""
    return tuple(_imports(ast.parse(modules()[module].read_text(encoding="utf-8")), set(modules())))


def _imports(tree: ast.AST, known: set[str]) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: a relative import hides what it imports"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if name in known else node.module), node.lineno


def place(module: str) -> tuple[int, str] | None:
    """(row, entry) of a module in LAYERS; None where it stands nowhere."""
    for row, entries in enumerate(LAYERS):
        for entry in entries:
            room = entry.removesuffix(".*")
            if module == room or (entry.endswith(".*") and module.startswith(room + ".")):
                return row, entry
    return None


def row_of(entry: str) -> int:
    """The row of an entry of LAYERS."""
    return next(row for row, entries in enumerate(LAYERS) if entry in entries)


def is_downward(importer: str, imported: str) -> bool:
    """Whether LAYERS allows the import; both modules must stand there."""
    upper, lower = place(importer), place(imported)
    assert upper is not None and lower is not None, f"LAYERS has no place for {importer} or {imported}"
    return lower[0] < upper[0] or lower[1] == upper[1]


def internal(module: str) -> list[tuple[str, int]]:
    """The imports of a module that are modules of the two packages themselves."""
    return [(name, line) for name, line in imports(module) if name.split(".")[0] in PACKAGES]


def test_both_packages_have_modules():
    assert {name.split(".")[0] for name in modules()} == set(PACKAGES)


def test_every_module_has_a_place_in_the_table():
    homeless = [module for module in modules() if place(module) is None]
    assert not homeless, f"give these a row of LAYERS (and of the map in docs/architecture.md): {homeless}"


def test_every_entry_of_the_table_is_there():
    entries = [entry for row in LAYERS for entry in row]
    absent = [entry for entry in entries if not any(place(module) == (row_of(entry), entry) for module in modules())]
    assert not absent, f"LAYERS names what does not exist: {absent}"


def test_imports_go_only_downwards():
    upward = [
        f"{modules()[module].relative_to(ROOT)}:{line} imports {name}"
        for module in modules()
        for name, line in internal(module)
        if not is_downward(module, name)
    ]
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("pallas_kernels.core.dispatch", "lserve_jax.config"),
        ("pallas_kernels.kv_write.xla", "pallas_kernels.kv_write.reference"),
        ("pallas_kernels.kv_write.api", "pallas_kernels.page_select.api"),
        ("lserve_jax.config.model", "lserve_jax.models.llama"),
        ("lserve_jax.models.llama", "lserve_jax.runtime.attend"),
        ("lserve_jax.weights.load", "lserve_jax.runtime.cache"),
        ("lserve_jax.runtime.steps", "lserve_jax.engine.engine"),
        ("lserve_jax.llm", "lserve_jax.generate"),
    ],
)
def test_the_table_refuses_an_upward_or_sideways_import(importer: str, imported: str):
    assert not is_downward(importer, imported)
    assert importer == imported or place(importer) != place(imported)


def test_imports_inside_a_room_have_no_cycle():
    graph = {module: {name for name, _ in internal(module) if name in modules()} - {module} for module in modules()}
    while ready := {module for module, needs in graph.items() if not needs}:
        graph = {module: needs - ready for module, needs in graph.items() if module not in ready}
    assert not graph, f"import cycle among {sorted(graph)}"


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_the_host_side_imports_no_jax(module: str):
    reached, todo = set(), [module]
    while todo:
        current = todo.pop()
        reached.add(current)
        found = {name.split(".")[0] for name, _ in imports(current)} & JAX_LIBRARIES
        assert not found, f"{module} reaches {sorted(found)} through {current}"
        todo += [name for name, _ in internal(current) if name in modules() and name not in reached]


def test_the_packages_import_nothing_that_is_banned():
    found = [
        f"{modules()[module].relative_to(ROOT)}:{line} imports {name}: {NEVER_IMPORTED[name.split('.')[0]]}"
        for module in modules()
        for name, line in imports(module)
        if name.split(".")[0] in NEVER_IMPORTED
    ]
    assert not found, "\n".join(found)


def test_the_packages_hold_no_test_code():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} defines {node.name}"
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.lower().startswith("test")
    ]
    found += [str(path.relative_to(ROOT)) for path in modules().values() if re.match(r"(test_|conftest)", path.name)]
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_starting_the_command_imports_nothing_that_it_may_not_need():
    """A third of the imports of a start would be orbax, and Pallas for GPUs."""
    program = "import sys, lserve_jax.generate; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "flax" in imported
    assert not imported & {"orbax.checkpoint", "jax.experimental.pallas", "optax", "matplotlib", "huggingface_hub"}


@pytest.mark.slow
def test_importing_every_module_initialises_no_device():
    program = "\n".join(
        [
            "import importlib",
            *(f"importlib.import_module({module!r})" for module in modules()),
            "from jax._src import xla_bridge",
            "assert not xla_bridge.backends_are_initialized(), 'an import initialised a jax backend'",
            "import jax; jax.devices()",
            "assert xla_bridge.backends_are_initialized(), 'this check has gone blind'",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
