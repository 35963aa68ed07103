import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from lserve_jax.config.hf import read_hf
from lserve_jax.weights.forms import Forms
from lserve_jax.weights.layout import Layout
from lserve_jax.weights.rules import Naming, Tensor, parameters
from lserve_jax.weights.tensors import Inventory, Reader, load_tensors
from pallas_kernels import QuantizedMatrix
from tests.lserve_jax.checkpoints import assert_same_tree, manual_params, random_tensors, tiny_config
from tests.lserve_jax.weights.test_rules import Heads

CONFIG = tiny_config()
MODEL = read_hf(CONFIG, source="test")
MOST_JOINED = 3  # query, key and value


@dataclass(frozen=True)
class Numbers:
    """The reader of a file that has no quantised matrices."""

    array: Callable[[Tensor, np.dtype], np.ndarray]

    def packed(self, tensor: Tensor) -> QuantizedMatrix:
        """Is never asked for: `TensorSource.layout` has none."""
        raise NotImplementedError(tensor.names)


class CountingSource:
    """Tensors in memory; asserts at each read that what it handed out before is gone."""

    location = "counting"
    naming: Naming = "hf"

    def __init__(self) -> None:
        self.tensors = random_tensors(CONFIG)
        self.handed_out: list[weakref.ref[np.ndarray]] = []
        self.reads: list[str] = []
        self.is_open = False

    def inventory(self) -> Inventory:
        return Inventory(shapes={name: tensor.shape for name, tensor in self.tensors.items()})

    def layout(self, tensor: Tensor) -> Layout | None:
        return None

    @contextmanager
    def open(self) -> Iterator[Reader]:
        def read(tensor: Tensor, dtype: np.dtype) -> np.ndarray:
            held = [name for name, array in zip(self.reads, self.handed_out, strict=True) if array() is not None]
            assert {name.rsplit(".", 2)[0] for name in held} <= {tensor.names["hf"].rsplit(".", 2)[0]}
            assert len(held) < MOST_JOINED
            self.reads.append(tensor.names["hf"])
            array = self.tensors[tensor.names["hf"]].copy()
            self.handed_out.append(weakref.ref(array))
            return array

        self.is_open = True
        yield Numbers(read)
        self.is_open = False


@pytest.mark.parametrize("heads", [None, Heads((2, 1, 0), (1, 0, 2), (0, 1, 2))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_most_the_tensors_of_one_parameter_are_held_at_a_time(heads: Heads | None, dtype: str):
    source = CountingSource()
    params = load_tensors(source, MODEL, Forms(dtype=dtype), heads)
    assert sorted(source.reads) == sorted(source.tensors)
    assert not source.is_open
    assert_same_tree(params, manual_params(CONFIG, source.tensors, heads.order if heads else None), dtype)


def test_progress_counts_bytes_up_to_all_of_them():
    calls: list[tuple[int, int]] = []
    source = CountingSource()
    load_tensors(source, MODEL, Forms(dtype="bfloat16"), progress=lambda done, total: calls.append((done, total)))
    total = 2 * sum(tensor.size for tensor in source.tensors.values())
    done = [done for done, _ in calls]
    assert {total for _, total in calls} == {total}
    assert done[0] == 0
    assert done[-1] == total
    assert done == sorted(set(done))
    assert len(calls) == len(parameters(MODEL)) + 1


def test_loaded_parameters_do_not_share_memory_with_the_file():
    source = CountingSource()
    expected = manual_params(CONFIG, {name: tensor.copy() for name, tensor in source.tensors.items()})

    @contextmanager
    def open_mapped() -> Iterator[Reader]:
        yield Numbers(lambda tensor, dtype: source.tensors[tensor.names["hf"]])

    source.open = open_mapped
    params = load_tensors(source, MODEL, Forms(dtype="float32"))
    for tensor in source.tensors.values():
        tensor[:] = 0
    assert_same_tree(params, expected)


def test_heads_of_another_model_are_refused_before_anything_is_read():
    source = CountingSource()
    with pytest.raises(ValueError, match="head order has 1 layers"):
        load_tensors(source, MODEL, Forms(dtype="float32"), Heads((0, 1, 2)))
    assert not source.reads
