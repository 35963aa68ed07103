"""The Hopper kernel of `quantized_matmul`: values against the reference, and machine code for an H200.

Values are interpreted on the CPU, or computed on a Hopper GPU where one is.
"""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from pallas_kernels import QuantizedMatrix, quantized_matmul
from pallas_kernels.core.hopper import SHARED_MEMORY, Device
from pallas_kernels.core.workloads import PRODUCTS, Product
from pallas_kernels.quantized_matmul import mosaic_gpu, reference
from pallas_kernels.quantized_matmul.mosaic_gpu import Config, form_of, heuristic
from tests.pallas_kernels import hopper
from tests.pallas_kernels.cases import MATRICES, abstract, assert_same_bits, dense_matrix, random_matrix

H200 = Device("NVIDIA H200", 132)
STORED: dict[str, dict[str, Any]] = {name: row for name, row in MATRICES.items() if name.startswith("int8")} | {
    "int4-groups": MATRICES["int4-groups"],
    "int4-nested": MATRICES["int4-nested"],
    "int4-64": {"codes": "uint8", "group": 64, "scale": "bfloat16", "has_low": True},
    "int4-128": {"codes": "uint8", "group": 128, "scale": "float16", "has_low": True},
    "int8-128": {"codes": "int8", "group": 128, "scale": "float32"},
}
TOLERANCE = 2e-7
"""Greatest |out − reference| as a share of Σ_d |x_d · w_d|: codes and inputs are exact, sums are float32."""


def _matrix(storage: str, outputs: int = 128, inputs: int | None = None) -> QuantizedMatrix:
    group = STORED[storage].get("group")
    return random_matrix(np.random.default_rng(0), outputs, inputs or 16 * (group or 64), **STORED[storage])


def _rows(count: int, inputs: int) -> NDArray[Any]:
    return np.random.default_rng(1).normal(size=(count, inputs)).astype(jnp.bfloat16)


def _check(x: NDArray[Any], w: QuantizedMatrix, config: Config | None = None, *, detect_races: bool = False) -> Any:
    run = partial(mosaic_gpu.quantized_matmul, config=config, out_dtype="float32")
    out = np.asarray(hopper.evaluate(run, jnp.asarray(x), w, detect_races=detect_races))
    expected = np.asarray(reference.quantized_matmul(jnp.asarray(x), w, out_dtype=jnp.float32))
    if w.input_bits is not None:
        assert_same_bits(out, expected)
    else:
        bound = TOLERANCE * (np.abs(x.astype(np.float64)) @ np.abs(dense_matrix(w)).T)
        assert (np.abs(out - expected) <= bound).all()
    return out


@pytest.mark.parametrize("storage", STORED)
def test_storage(storage: str) -> None:
    w = _matrix(storage)
    _check(_rows(3, w.shape[1]), w, Config(warpgroups=2, stages=2, splits=2))


@pytest.mark.parametrize("rows", [1, 8, 9, 17, 32])
@pytest.mark.parametrize("storage", ["int8-inputs", "int4-groups"])
def test_rows(storage: str, rows: int) -> None:
    w = _matrix(storage, outputs=64)
    _check(_rows(rows, w.shape[1]), w)


@pytest.mark.parametrize("config", [Config(1, 2, 1), Config(1, 5, 4), Config(2, 2, 8), Config(3, 3, 2)], ids=str)
@pytest.mark.parametrize("storage", ["int8-rows", "int4-groups"])
def test_launches(storage: str, config: Config) -> None:
    """Fewer blocks than stages, more, and as many; one to three tiles of outputs."""
    w = _matrix(storage, outputs=64 * config.warpgroups, inputs=2048)
    _check(_rows(2, 2048), w, config)


@pytest.mark.parametrize("storage", ["int8-inputs", "int8-rows", "int4-128"])
def test_races(storage: str) -> None:
    w = _matrix(storage, outputs=64)
    _check(_rows(2, w.shape[1]), w, Config(warpgroups=1, stages=2, splits=1), detect_races=True)


@pytest.mark.parametrize("storage", ["int8-inputs", "int8-rows", "int4-128"])
def test_zero_rows_are_zero_and_rows_without_numbers_spoil_no_other(storage: str) -> None:
    w = _matrix(storage, outputs=64)
    x = _rows(4, w.shape[1])
    x[0] = 0
    expected = _check(x, w)
    assert not expected[0].any()
    x[1, 7], x[2, 5] = np.nan, np.inf
    out = np.asarray(hopper.evaluate(partial(mosaic_gpu.quantized_matmul, out_dtype="float32"), jnp.asarray(x), w))
    assert_same_bits(out[[0, 3]], expected[[0, 3]])
    assert np.isnan(out[1]).all() and not np.isfinite(out[2]).any()


@pytest.mark.parametrize("storage", ["int8-inputs", "int8-offsets", "int4-groups"])
def test_a_row_is_the_same_among_any_others(storage: str) -> None:
    w = _matrix(storage, outputs=64)
    x = _rows(5, w.shape[1])
    together = _check(x, w)
    assert_same_bits(_check(x[3:4], w), together[3:4])
    assert_same_bits(_check(x[::-1], w), together[::-1])


@pytest.mark.parametrize("storage", ["int8-rows", "int4-128"])
def test_rows_of_any_magnitude_keep_their_bits(storage: str) -> None:
    """Float16 alone would overflow, or lose what is small."""
    w = _matrix(storage, outputs=64)
    sizes = np.array([[1e-30], [1e-9], [1.0], [1e5], [1e30]])
    x = (_rows(5, w.shape[1]).astype(np.float64) * sizes).astype(jnp.bfloat16)
    x[2, ::3] *= jnp.bfloat16(2.0**-12)
    _check(x, w)


def test_two_programs_run_on_a_multiprocessor_when_rows_are_few() -> None:
    """Of 384 threads each: 80 registers, and half of the shared memory less what the system takes."""
    for storage in STORED:
        w = jax.tree.map(lambda x: abstract(4096, *x.shape[1:], dtype=x.dtype), _matrix(storage, inputs=4096))
        _, kernels = hopper.compiled(mosaic_gpu.quantized_matmul, abstract(8, 4096, dtype=jnp.bfloat16), w)
        hopper.assert_fits(kernels, count=1)
        assert kernels[0].registers <= 80, (storage, kernels)
        assert kernels[0].shared_memory <= (SHARED_MEMORY + 1024) // 2 - 1024, (storage, kernels)


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("storage", STORED)
def test_machine_code_of_more_rows(storage: str, rows: int) -> None:
    w = _matrix(storage, inputs=4096)
    _, kernels = hopper.compiled(mosaic_gpu.quantized_matmul, abstract(rows, 4096, dtype=jnp.bfloat16), w)
    hopper.assert_fits(kernels, count=1)


@pytest.mark.parametrize("name", [name for name in PRODUCTS if "_b1_" in name])
def test_the_projections_of_a_model_compile_and_copy_no_weights(name: str) -> None:
    product = PRODUCTS[name]
    program, kernels = hopper.compiled(mosaic_gpu.quantized_matmul, *_abstract(product))
    hopper.assert_fits(kernels, count=1)
    assert program.memory_analysis().temp_size_in_bytes < 16 * 2**20


def _abstract(product: Product) -> tuple[Any, QuantizedMatrix]:
    """The shapes of a product's arguments."""
    groups = product.inputs // (product.group or product.inputs)
    columns = product.inputs * product.bits // 8
    scale = abstract(product.outputs, groups, dtype=jnp.float16 if product.group else jnp.float32)
    w = QuantizedMatrix(
        codes=abstract(product.outputs, columns, dtype=jnp.int8 if product.bits == 8 else jnp.uint8),
        scale=scale,
        low=scale if product.has_low else None,
        input_bits=product.input_bits,
    )
    return abstract(product.batch, product.inputs, dtype=jnp.bfloat16), w


def test_heuristic() -> None:
    for product in PRODUCTS.values():
        x, w = _abstract(product)
        config = heuristic(H200, w.shape, form_of(len(x), w))
        assert product.outputs % (64 * config.warpgroups) == 0 and product.inputs % config.splits == 0
        assert 2 <= config.stages <= 6
        assert product.outputs // (64 * config.warpgroups) * config.splits >= H200.multiprocessors * 0.9


@pytest.mark.parametrize(
    ("storage", "rows", "change", "reason"),
    [
        ("int8-rows", 33, {}, "rows must be 1 to 32, not 33"),
        ("int8-rows", 0, {}, "rows must be 1 to 32, not 0"),
        ("int8-rows", 2, {"codes": abstract(128, 1024, dtype=jnp.float8_e4m3fn)}, "codes must be int8 or packed uint8"),
        ("int8-rows", 2, {"codes": abstract(128, 960, dtype=jnp.int8)}, "inputs must be a multiple of 128, not 960"),
        ("int4-groups", 2, {"codes": abstract(96, 256, dtype=jnp.uint8)}, "outputs must be a multiple of 64, not 96"),
        ("int4-groups", 2, {"scale": abstract(128, 32)}, "a group of 4-bit codes must be one of (32, 64, 128), not 16"),
        ("int4-groups", 2, {"scale": abstract(128, 4)}, "scales of an output must be a multiple of 8, not 4"),
    ],
)
def test_refusals(storage: str, rows: int, change: dict[str, Any], reason: str) -> None:
    w = replace(jax.tree.map(lambda x: abstract(*x.shape, dtype=x.dtype), _matrix(storage)), **change)
    with hopper.on_h200(), pytest.raises(NotImplementedError, match=re.escape(reason)):
        _trace(w, rows, implementation="mosaic_gpu")


def test_refuses_rows_of_float32() -> None:
    with hopper.on_h200(), pytest.raises(NotImplementedError, match="rows must be bfloat16, not float32"):
        _trace(_matrix("int4-groups"), 1, dtype=jnp.float32, implementation="mosaic_gpu")


@pytest.mark.skipif(hopper.has_hopper(), reason="a Hopper GPU is here")
def test_refuses_other_devices() -> None:
    with pytest.raises(NotImplementedError, match=r"need a Hopper GPU \(H100, H200\); this device is 'cpu'"):
        _trace(_matrix("int4-groups"), 1, implementation="mosaic_gpu")


def test_is_chosen_on_hopper_for_few_rows() -> None:
    w = _matrix("int4-groups")
    with hopper.on_h200():
        assert "mpmd_map" in str(_trace(w, 32))
        assert "mpmd_map" not in str(_trace(w, 33))
    if not hopper.has_hopper():
        assert "mpmd_map" not in str(_trace(w, 1))


def _trace(w: Any, rows: int, *, dtype: Any = jnp.bfloat16, **options: Any) -> Any:
    return jax.make_jaxpr(partial(quantized_matmul, **options))(abstract(rows, w.shape[1], dtype=dtype), w)
