"""What the repository promises of itself: declared dependencies, pinned versions, nothing of one machine."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = ("pallas_kernels", "lserve_jax")
# Imported where they are asked for, and named by an extra.
OPTIONAL = {"hub", "triton", "serve", "eval"}

FOLDER_OF_ONE_MACHINE = re.compile(r"/(?:tmp|root|work|farm|home|Users)/")
# One letter or dot of each stands in brackets, so that this file is no finding of its own.
REGISTRY_HOST = re.compile(r"pypi[.]org|python[h]osted|registry[.]npmjs|download[.]pytorch|anaconda[.]org")
SIBLING_FOLDER = re.compile(r"[.]{2}/shared|[.]library/")


def requirements(lines: list[str]) -> list[Requirement]:
    return [Requirement(line) for line in lines]


def text_files() -> list[Path]:
    """The files that belong to the repository, committed or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()]


def findings(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if pattern.search(line)
    ]


def test_no_file_names_a_folder_of_one_machine():
    found = findings(FOLDER_OF_ONE_MACHINE, text_files())
    assert not found, "\n".join(found)


def test_no_file_names_the_host_of_a_package_registry():
    found = findings(REGISTRY_HOST, text_files())
    assert not found, "\n".join(found)


def test_only_tests_look_beside_the_repository():
    found = findings(SIBLING_FOLDER, [path for path in text_files() if path.relative_to(ROOT).parts[0] != "tests"])
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (FOLDER_OF_ONE_MACHINE, "open('" + "/".join(["", "tmp", "x"]) + "')"),
        (REGISTRY_HOST, "--index-url https://" + ".".join(["pypi", "org"])),
        (SIBLING_FOLDER, "/".join(["..", "shared", "design"])),
    ],
)
def test_the_patterns_find_what_they_look_for(pattern: re.Pattern[str], line: str):
    assert pattern.search(line)


def test_every_third_party_import_is_a_declared_dependency():
    declared = {canonicalize_name(requirement.name) for requirement in requirements(PROJECT["dependencies"])}
    for extra in OPTIONAL:
        declared |= {
            canonicalize_name(requirement.name) for requirement in requirements(PROJECT["optional-dependencies"][extra])
        }
    distributions = importlib.metadata.packages_distributions()
    undeclared = []
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - set(PACKAGES):
                if not {canonicalize_name(name) for name in distributions.get(top, [top])} & declared:
                    undeclared.append(f"{path.relative_to(ROOT)}: {top}")
    assert not undeclared, f"add to pyproject.toml and run `make lock`: {sorted(set(undeclared))}"


def test_constraints_pin_every_requirement_inside_its_bounds():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            pins[canonicalize_name(requirement.name)] = pin.version
    wanted = requirements(PROJECT["dependencies"])
    # One lock cannot hold two versions of CUDA: it pins the newer one.
    for extra in PROJECT["optional-dependencies"].keys() - {"cuda12"}:
        wanted += requirements(PROJECT["optional-dependencies"][extra])
    wrong = [
        str(requirement)
        for requirement in wanted
        if pins.get(canonicalize_name(requirement.name), "0") not in requirement.specifier
    ]
    assert not wrong, f"run `make lock`: {wrong}"


def test_the_extras_that_the_pages_name_exist():
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/usage.md")]
    named = {name for page in pages for name in re.findall(r"(?:lserve_jax|'\.)\[([a-z0-9_,]+)\]", page)}
    listed = pages[1].split("## Extras")[1].split("`pip install -c")[0]
    named |= set(re.findall(r"`([a-z0-9]+)`", listed))
    assert named >= {"cuda12", "cuda13", "hub", "eval", "serve"}
    missing = {extra for group in named for extra in group.split(",")} - PROJECT["optional-dependencies"].keys()
    assert not missing
