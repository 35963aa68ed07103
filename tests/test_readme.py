"""What the README says of presets and modules is what the code has."""

import re
from pathlib import Path

from lserve_jax.config.attention import PRESETS, AttentionConfig, from_preset

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def cells(config: AttentionConfig) -> list[str]:
    """A preset as the README's table shows it."""
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
    table = README.split("## Attention presets")[1].split("\n## ")[0]
    rows = {
        row[0].strip("`"): row[2:] for row in re.findall(r"^\| (`\w+`) " + r"\| ([^|]+) " * 8 + r"\|$", table, re.M)
    }
    assert rows.keys() == PRESETS.keys()
    assert {name: list(row) for name, row in rows.items()} == {name: cells(from_preset(name)) for name in PRESETS}


def test_the_map_names_the_packages_and_all_that_is_in_them():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = [line for line in text.split("## Map")[1].split("\n## ")[0].splitlines() if line.startswith("    ")]
    named = set(re.findall(r"\b([a-z_]+(?:\.py|/))(?![a-z])", "\n".join(tree)))
    existing = set()
    for package in ("pallas_kernels", "lserve_jax"):
        rooms = [path for path in (ROOT / package).iterdir() if path.suffix == ".py" or any(path.glob("*.py"))]
        existing |= {path.name + "/" * path.is_dir() for path in rooms if path.stem != "__init__"}
    files_of_an_op = {"api.py", "reference.py", "xla.py", "mosaic_gpu.py"}
    assert named - files_of_an_op - {"pallas_kernels/", "lserve_jax/", "setup.py"} == existing


def test_the_links_lead_to_files():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets
    assert all((ROOT / target).exists() for target in targets)


def test_every_test_that_the_table_of_faults_names_exists():
    folder = ROOT / "tests"
    named = re.findall(r"`((?:lserve_jax|pallas_kernels)/[\w/]+\.py)(?:::(\w+))?`", (folder / "README.md").read_text())
    assert len(named) > 12
    for file, function in named:
        assert f"def {function}" in (folder / file).read_text(), f"{file}::{function}"
