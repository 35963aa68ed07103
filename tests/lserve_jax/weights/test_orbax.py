import dataclasses
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lserve_jax.config.errors import InputError
from lserve_jax.weights import open_checkpoint, orbax
from lserve_jax.weights.layout import INT4, INT8, INT8_WIDE, Layout
from lserve_jax.weights.rules import expected_tensors
from pallas_kernels import QuantizedMatrix
from tests.lserve_jax.checkpoints import (
    assert_same_bits,
    assert_same_tree,
    manual_params,
    random_tensors,
    tiny_config,
    write_folder,
)
from tests.lserve_jax.weights.test_rules import CONFIGS, Heads


def write_others(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


GGUF = Path(__file__).parents[2] / "golden" / "quantized" / "gguf"


def saved(tmp_path: Path, config: dict[str, Any], *, weight_dtype: str | None = None, **changes: Any) -> Path:
    """A folder that `orbax.save` wrote from a Hugging Face folder of random tensors."""
    source = open_checkpoint(str(write_folder(tmp_path / "source", config, random_tensors(config))))
    arguments: dict[str, Any] = {
        "config": source.config,
        "hf_config": source.hf_config,
        "generation_config": {"eos_token_id": [3, 4]},
        "write_others": write_others,
    }
    orbax.save(tmp_path / "out", source.load_params("float32", weight_dtype=weight_dtype), **arguments | changes)
    return tmp_path / "out"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_restored_in_the_dtype_asked_for(name: str, dtype: str, tmp_path: Path):
    config = CONFIGS[name]
    checkpoint = open_checkpoint(str(saved(tmp_path, config)))
    assert checkpoint.config.architecture == config["model_type"]
    assert checkpoint.config.eos_token_ids == (3, 4)
    assert checkpoint.tokenizer_source == tmp_path / "out"
    assert_same_tree(checkpoint.load_params(dtype), manual_params(config, random_tensors(config)), dtype)


def test_heads_are_permuted_when_restored(tmp_path: Path):
    config = CONFIGS["biased"]
    orders = ((2, 0, 1), (0, 1, 2), (1, 0, 2))
    params = open_checkpoint(str(saved(tmp_path, config))).load_params("float32", Heads(*orders))
    assert_same_tree(params, manual_params(config, random_tensors(config), orders))


def test_folder_holds_everything_and_nothing_is_left_beside_it(tmp_path: Path):
    folder = saved(tmp_path, tiny_config())
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "params", "params.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_failure_while_saving_leaves_nothing(tmp_path: Path):
    def fail(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        saved(tmp_path, tiny_config(), write_others=fail)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_existing_target_is_refused_unless_it_is_an_empty_folder(make: Callable[[Path], None], tmp_path: Path):
    make(tmp_path / "out")
    if (tmp_path / "out").is_dir():
        saved(tmp_path, tiny_config())
        shutil.rmtree(tmp_path / "source")
    with pytest.raises(ValueError, match=r"out: (the folder is not empty|exists and is not a folder)"):
        saved(tmp_path, tiny_config())


def test_missing_unexpected_and_misshapen_parameters_are_all_named_at_once(tmp_path: Path):
    folder = saved(tmp_path, tiny_config())
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": 41, "num_hidden_layers": 4, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="missing tensor") as caught:
        open_checkpoint(str(folder)).load_params("float32")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{folder / 'params.json'}: missing tensor layers_3.input_norm.scale [32]; ")
    assert "unexpected tensor lm_head.kernel" in message
    assert message.endswith("tensor embed.embedding has shape [40, 32], expected [41, 32]")


def damage_nothing_but_delete(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate_data(folder: Path) -> None:
    files = [*folder.rglob("d/*")]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def break_metadata(folder: Path) -> None:
    (folder / "_METADATA").write_text("{")


@pytest.mark.parametrize("damage", [damage_nothing_but_delete, truncate_data, break_metadata])
def test_damaged_parameters_are_named_in_one_line(damage: Callable[[Path], None], tmp_path: Path):
    folder = saved(tmp_path, tiny_config())
    damage(folder / "params")
    with pytest.raises(ValueError, match="params: damaged or not an orbax checkpoint") as caught:
        open_checkpoint(str(folder)).load_params("float32")
    assert "\n" not in str(caught.value)
    gc.collect()  # an exception that another thread could not raise would fail this test


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": ["x"]}'])
def test_damaged_list_of_parameters_is_named(text: str, tmp_path: Path):
    folder = saved(tmp_path, tiny_config())
    (folder / "params.json").write_text(text)
    with pytest.raises(ValueError, match=r"\A.*params\.json: not a list of parameters .*\Z"):
        open_checkpoint(str(folder)).load_params("float32")


def test_array_of_another_shape_than_listed_is_named(tmp_path: Path):
    folder = saved(tmp_path, tiny_config())
    (folder / "params.json").write_text((folder / "params.json").read_text().replace("40", "41"))
    (folder / "config.json").write_text((folder / "config.json").read_text().replace(": 40", ": 41"))
    with pytest.raises(ValueError, match=r"embed\.embedding has shape \(40, 32\), but params\.json says \(41, 32\)"):
        open_checkpoint(str(folder)).load_params("float32")


def test_restored_parameters_are_jax_arrays_on_the_device(tmp_path: Path):
    params = open_checkpoint(str(saved(tmp_path, tiny_config()))).load_params(jnp.bfloat16)
    assert (params["embed"]["embedding"] + 1).dtype == jnp.bfloat16
    assert np.asarray(params["embed"]["embedding"]).shape == (40, 32)


# --- quantised --------------------------------------------------------------------------------------------------------


def copied(tmp_path: Path, model: str, weight_dtype: str) -> tuple[Any, Any]:
    """A checkpoint, and the one that `orbax.save` made of it, with numbers in float32."""
    source = open_checkpoint(model)
    params = source.load_params("float32", weight_dtype=weight_dtype)
    own = {"hf_config": source.hf_config, "generation_config": {}, "write_others": write_others}
    orbax.save(tmp_path / "out", params, config=source.config, **own)
    return source, open_checkpoint(str(tmp_path / "out"))


@pytest.mark.parametrize("file", sorted(GGUF.glob("*.gguf")), ids=lambda path: path.stem)
def test_what_llama_cpp_quantised_is_restored_bit_for_bit(file: Path, tmp_path: Path):
    source, copy = copied(tmp_path, str(file), "auto")
    orders = Heads(*(tuple(reversed(range(source.config.num_kv_heads))) for _ in range(source.config.num_layers)))
    for heads in (None, orders):
        wanted = source.load_params("float32", heads, weight_dtype="auto")
        assert any(isinstance(leaf, QuantizedMatrix) for leaf in matrices(wanted))
        assert_same_bits(copy.load_params("float32", heads, weight_dtype="auto"), wanted)
        # The numbers too, and other forms that are made of them.
        for form in (None, "float32", "int8"):
            wanted = source.load_params("float32", heads, weight_dtype=form)
            assert_same_bits(copy.load_params("float32", heads, weight_dtype=form), wanted)
    assert jax.tree.structure(copy.abstract_params("float32", "auto")) == jax.tree.structure(
        source.abstract_params("float32", "auto")
    )


def matrices(params: Any) -> list[Any]:
    return jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))


KEPT = sorted(path.parent.name for path in GGUF.parent.glob("*/config.json") if path.parent.name != "gptq_act_order")


@pytest.mark.parametrize("name", KEPT)
def test_quantised_hugging_face_folders_are_restored_bit_for_bit(name: str, tmp_path: Path):
    source, copy = copied(tmp_path, str(GGUF.parent / name), "auto")
    for form in ("auto", "float32", "int4"):
        wanted = source.load_params("float32", weight_dtype=form)
        assert_same_bits(copy.load_params("float32", weight_dtype=form), wanted)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_what_was_quantised_here_is_restored_bit_for_bit(name: str, weight_dtype: str, tmp_path: Path):
    config = CONFIGS[name]
    source = open_checkpoint(str(write_folder(tmp_path / "source", config, random_tensors(config))))
    copy = open_checkpoint(str(saved(tmp_path, config, weight_dtype=weight_dtype)))
    for heads in (None, Heads((2, 0, 1), (0, 1, 2), (1, 0, 2))):
        wanted = source.load_params("float32", heads, weight_dtype=weight_dtype)
        for again in ("auto", weight_dtype):  # what is quantised like this already is not quantised anew
            assert_same_bits(copy.load_params("float32", heads, weight_dtype=again), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("weight_dtype", ["auto", "int8", "int4"])
def test_the_embedded_model_is_restored_bit_for_bit(weight_dtype: str, embedded_gguf: Path, tmp_path: Path):
    source, copy = copied(tmp_path, str(embedded_gguf), weight_dtype)
    wanted = source.load_params("float32", weight_dtype=weight_dtype)
    assert_same_bits(copy.load_params("float32", weight_dtype="auto"), wanted)


def every_layout() -> dict[str, Layout]:
    """A layout of every kind of code, scale and offset, with groups of 4 inputs, which do not cross heads of 4."""
    sixes = Layout(codes="int8", group=2, scale="float16")
    found = {name: Layout(codes=name, group=4, scale="float32") for name in ("int8", "uint8", "float8_e4m3fn")}
    found |= {f"row {name}": Layout(codes=name, group=None, scale="bfloat16") for name in ("int8", "float8_e4m3fn")}
    found |= {"low": Layout(codes="uint8", group=4, scale="float16", low="bfloat16")}
    found |= {"nested": Layout(codes="uint8", group=2, scale=sixes, low=sixes)}
    nested = Layout(codes="int8", group=None, scale="float16")
    return found | {
        "nested scale": Layout(codes="int8", group=2, scale=nested, low="float32"),
        "w8a8": INT8,
        "w8a16": INT8_WIDE,
    }


@pytest.mark.parametrize("name", every_layout())
def test_every_layout_is_restored_bit_for_bit(name: str, tmp_path: Path):
    """The down projection of each layer gets random bits; codes may be anything, scales are finite."""
    config = CONFIGS["biased"]
    source = open_checkpoint(str(write_folder(tmp_path / "source", config, random_tensors(config))))
    params, rng = source.load_params("float32"), np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.dtype in (np.dtype("int8"), np.dtype("uint8")):
            info = np.iinfo(leaf.dtype)
            return rng.integers(info.min, info.max, leaf.shape, leaf.dtype, endpoint=True)
        return rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)

    kernel = params["layers_1"]["mlp"]["down_proj"]["kernel"]
    matrix = jax.tree.map(fill, every_layout()[name].abstract(kernel.shape))
    params["layers_1"]["mlp"]["down_proj"]["kernel"] = jax.tree.map(jnp.asarray, matrix)
    own = {"hf_config": source.hf_config, "generation_config": {}, "write_others": write_others}
    orbax.save(tmp_path / "out", params, config=source.config, **own)
    copy = open_checkpoint(str(tmp_path / "out"))
    assert_same_bits(copy.load_params("float32", weight_dtype="auto"), params)


def test_the_list_says_how_each_tensor_is_stored(tmp_path: Path):
    listed = json.loads((saved(tmp_path, tiny_config(), weight_dtype="int4") / "params.json").read_text())
    assert listed["final_norm.scale"] == [32]
    assert listed["layers_0.attention.q_proj.kernel"] == {
        "shape": [6, 4, 32],
        "layout": {"codes": "uint8", "group": 32, "scale": "float16", "low": "float16", "input_bits": None},
    }
    assert listed["layers_0.attention.o_proj.kernel"]["layout"]["group"] == 8  # the inputs of a KV head
    assert Layout.from_json(listed["embed.embedding"]["layout"]) == INT8_WIDE
    assert Layout.from_json(listed["layers_0.mlp.up_proj.kernel"]["layout"]) == INT4


def test_a_folder_as_earlier_versions_wrote_it_still_loads(tmp_path: Path):
    """Numbers only: orbax's own checkpoint of the tensors, and a list of shapes."""
    config = tiny_config()
    folder, tensors = saved(tmp_path, config), random_tensors(config)
    shutil.rmtree(folder / "params")
    tree: dict[str, Any] = {}
    shapes = {}
    for tensor in expected_tensors(open_checkpoint(str(folder)).config, "ours"):
        orbax.set_leaf(tree, tensor.path, jnp.asarray(tensors[tensor.names["hf"]].reshape(tensor.shape)))
        shapes[".".join(tensor.path)] = tensor.shape
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", tree)
    (folder / "params.json").write_text(json.dumps(shapes))
    assert_same_tree(open_checkpoint(str(folder)).load_params("float32"), manual_params(config, tensors))


def test_a_path_may_have_any_characters(tmp_path: Path):
    folder = saved(tmp_path, tiny_config()).rename(tmp_path / "a b%20#é?&")
    assert_same_tree(
        open_checkpoint(str(folder)).load_params("float32"), manual_params(tiny_config(), random_tensors(tiny_config()))
    )


def edited(folder: Path, name: str, **changes: Any) -> None:
    """Changes fields of the layout that the list has for a tensor."""
    path = folder / "params.json"
    listed = json.loads(path.read_text())
    listed[name]["layout"] |= changes
    path.write_text(json.dumps(listed))


DOWN = "layers_1.mlp.down_proj.kernel"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"codes": "int3"}, "not a list of parameters (no layout: "),
        ({"codes": ["uint8"]}, "not a list of parameters (no layout: "),
        ({"group": 0}, "not a list of parameters (no layout: "),
        ({"group": -32}, "not a list of parameters (no layout: "),
        ({"group": 1}, "not a list of parameters (no layout: "),  # two codes of 4 bits are a byte
        ({"group": None}, "not a list of parameters (no layout: "),
        ({"group": True}, "not a list of parameters (no layout: "),
        ({"group": 32.0}, "not a list of parameters (no layout: "),
        ({"scale": None}, "not a list of parameters (no layout: "),
        ({"scale": "int8"}, "not a list of parameters (no layout: "),
        ({"scale": {"codes": "int8"}}, "not a list of parameters ("),
        ({"scale": {"codes": "int8", "group": -1, "scale": "float16"}}, "not a list of parameters (no layout: "),
        ({"input_bits": 8}, "not a list of parameters (no layout: "),
        ({"input_bits": 0}, "not a list of parameters (no layout: "),
        ({"unknown": 1}, "not a list of parameters ("),
        ({"group": 48}, f"{DOWN} [32, 64] cannot be stored as int4 in groups of 48"),
        ({"scale": {"codes": "int8", "group": 4, "scale": "float16"}}, f"{DOWN} [32, 64] cannot be stored as int4"),
        ({"group": 16}, f"{DOWN}.scale has shape (32, 2), but params.json says (32, 4)"),
        ({"scale": "float32"}, f"{DOWN}.scale has type float16, but params.json says float32"),
        ({"codes": "int8"}, f"{DOWN}.codes has shape (32, 32), but params.json says (32, 64)"),
        ({"low": None, "scale": {"codes": "int8", "group": 2, "scale": "float16"}}, f"{DOWN}.scale.codes"),
    ],
)
def test_a_layout_that_is_damaged_or_not_that_of_the_arrays_is_refused_in_one_line(
    changes: dict[str, Any], named: str, tmp_path: Path
):
    folder = saved(tmp_path, tiny_config(), weight_dtype="int4")
    edited(folder, DOWN, **changes)
    for weight_dtype in ("auto", None):
        with pytest.raises(InputError) as caught:
            open_checkpoint(str(folder)).load_params("float32", weight_dtype=weight_dtype)
        assert named in str(caught.value) and "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_a_vector_cannot_be_quantised(tmp_path: Path):
    folder = saved(tmp_path, tiny_config(attention_bias=True), weight_dtype="int4")
    listed = json.loads((folder / "params.json").read_text())
    name = "layers_0.attention.q_proj.bias"
    listed[name] = {"shape": listed[name], "layout": listed["embed.embedding"]["layout"]}
    (folder / "params.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match=rf"params\.json: {name} \[6, 4\] cannot be stored as int8\Z"):
        open_checkpoint(str(folder)).load_params("float32")


@pytest.mark.parametrize(
    "text", ['{"a": {"shape": [1]}}', '{"a": {"layout": {}}}', '{"a": {"shape": [1], "layout": 3}}']
)
def test_an_entry_without_shape_or_layout_is_no_list(text: str, tmp_path: Path):
    folder = saved(tmp_path, tiny_config())
    (folder / "params.json").write_text(text)
    with pytest.raises(InputError, match=r"\A.*params\.json: not a list of parameters .*\Z"):
        open_checkpoint(str(folder)).load_params("float32")


@pytest.mark.parametrize(("listed", "stored"), [("int4", None), (None, "int4"), ("int8", "int4")])
def test_arrays_of_another_folder_than_the_list_are_refused(listed: str | None, stored: str | None, tmp_path: Path):
    folder, other = (
        saved(tmp_path / name, tiny_config(), weight_dtype=form) for name, form in (("list", listed), ("data", stored))
    )
    shutil.rmtree(folder / "params")
    shutil.copytree(other / "params", folder / "params")
    with pytest.raises(InputError, match=r"damaged or not an orbax checkpoint|but params\.json says") as caught:
        open_checkpoint(str(folder)).load_params("float32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [damage_nothing_but_delete, truncate_data, break_metadata])
def test_damaged_codes_are_named_in_one_line(damage: Callable[[Path], None], tmp_path: Path):
    folder = saved(tmp_path, tiny_config(), weight_dtype="int4")
    damage(folder / "params")
    with pytest.raises(InputError, match="params: damaged or not an orbax checkpoint") as caught:
        open_checkpoint(str(folder)).load_params("float32", weight_dtype="auto")
    assert "\n" not in str(caught.value)


def test_scales_that_are_not_finite_are_named(tmp_path: Path):
    config = CONFIGS["biased"]
    source = open_checkpoint(str(write_folder(tmp_path / "source", config, random_tensors(config))))
    params = source.load_params("float32", weight_dtype="int4")
    mlp = params["layers_1"]["mlp"]["down_proj"]
    mlp["kernel"] = dataclasses.replace(mlp["kernel"], scale=mlp["kernel"].scale.at[3, 1].set(jnp.nan))
    own = {"hf_config": source.hf_config, "generation_config": {}, "write_others": write_others}
    orbax.save(tmp_path / "out", params, config=source.config, **own)
    for weight_dtype in ("auto", None):
        with pytest.raises(InputError, match=rf"1 of \d+ tensors are not finite as float32: {DOWN} \(\d+ NaN"):
            open_checkpoint(str(tmp_path / "out")).load_params("float32", weight_dtype=weight_dtype)
