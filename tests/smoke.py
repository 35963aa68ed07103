"""Runs by itself, in an environment with neither pytest nor the constraints: the installed packages import and compute.

`python smoke.py` imports the installed wheel and refuses the checkout. Exit status 0 or a traceback.
"""

import importlib.metadata
import pkgutil
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import jax

import lserve_jax
import pallas_kernels


def import_everything(package: ModuleType) -> int:
    """How many modules a package has, all of them imported."""
    names = [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    for name in names:
        import_module(name)
    return len(names)


def main() -> None:
    checkout = Path(__file__).resolve().parents[1]
    for package in (lserve_jax, pallas_kernels):
        assert package.__file__ is not None
        location = Path(package.__file__).resolve()
        assert checkout not in location.parents, f"{location} is the checkout, not an installed package"
        count = import_everything(package)
        assert count > 0, f"{package.__name__} is empty"
        print(f"{package.__name__}: {count} modules imported")
    versions = {
        name: importlib.metadata.version(name) for name in ("lserve_jax", "jax", "jaxlib", "flax", "orbax-checkpoint")
    }
    print(", ".join(f"{name} {version}" for name, version in versions.items()), f"on Python {sys.version.split()[0]}")
    total = jax.jit(lambda x: x.sum())(jax.numpy.arange(4))
    assert int(total) == 6
    print("smoke test passed")


if __name__ == "__main__":
    main()
