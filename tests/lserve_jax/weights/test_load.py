import builtins
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lserve_jax.config.errors import InputError
from lserve_jax.models.known import known_configs
from lserve_jax.weights import embedded, open_checkpoint
from tests.lserve_jax.checkpoints import random_tensors, tiny_config, write_folder, write_gguf

CONFIG = tiny_config()


def test_opening_reads_no_weights(tmp_path: Path):
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG), generation_config={"temperature": 0.6, "eos_token_id": 9})
    (tmp_path / "model.safetensors").unlink()
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.name == str(tmp_path)
    assert checkpoint.config.eos_token_ids == (9,)
    assert checkpoint.hf_config == CONFIG
    assert checkpoint.generation_config == {"temperature": 0.6, "eos_token_id": 9}
    assert checkpoint.tokenizer_source == tmp_path


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "model", CONFIG, random_tensors(CONFIG))
    assert open_checkpoint("~/model").config.num_layers == 3


@pytest.mark.parametrize("name", known_configs())
def test_known_name_gives_the_shapes_and_refuses_the_weights(name: str):
    checkpoint = open_checkpoint(name)
    assert checkpoint.config.num_layers >= 28
    assert checkpoint.tokenizer_source is None
    with pytest.raises(ValueError, match=f"only the shapes of {name} are known, for --dry-run; pass the folder"):
        checkpoint.load_params("bfloat16")


def test_folder_of_a_known_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "llama-3.1-8b", CONFIG, random_tensors(CONFIG))
    assert open_checkpoint("llama-3.1-8b").config.num_layers == 3


def test_embedded_model_is_opened_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_gguf(tmp_path / "model.gguf", CONFIG, random_tensors(CONFIG))
    monkeypatch.setattr(embedded, "path", lambda: path)
    checkpoint = open_checkpoint("smollm2-135m-instruct")
    assert checkpoint.name == "smollm2-135m-instruct"
    assert checkpoint.config.num_layers == 3


@pytest.mark.parametrize("model", ["no-such-model", "./no/such", "no/such/model", "/no/such", "org/model.gguf", ""])
def test_name_of_nothing_is_refused_with_the_names_that_are_known(model: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    expected = "the name of the model is empty" if model == "" else "no such file or folder.*smollm2.*llama-3.1-8b"
    with pytest.raises(ValueError, match=expected):
        open_checkpoint(model)


def test_what_the_system_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"\Ax+… and \d+ more characters\Z"):
        open_checkpoint("x" * 5000)

    def refuse(self: Path, **options: Any) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", refuse)  # tests may run as root, who may look everywhere
    with pytest.raises(InputError, match=rf"\A{tmp_path}: cannot be read \(Permission denied\)\Z"):
        open_checkpoint(str(tmp_path))


def test_file_that_is_no_model_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a model is a folder or a \.gguf file"):
        open_checkpoint(str(tmp_path / "config.json"))


def test_folder_without_config_names_the_gguf_it_holds(tmp_path: Path):
    with pytest.raises(ValueError, match=r"config\.json: missing, so this is no model folder$"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ValueError, match=r"no model folder; to use x\.gguf, pass that file"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["config", "generation_config"])
@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_broken_json_is_named(name: str, text: str, tmp_path: Path):
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG))
    (tmp_path / f"{name}.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}\.json: (not valid JSON|must hold a JSON object, got list)"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_every_json_file_of_a_folder_may_have_a_byte_order_mark_and_must_be_a_file(name: str, tmp_path: Path):
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG), shards=2, generation_config={"eos_token_id": 9})
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config.eos_token_ids == (9,)
    assert checkpoint.load_params("float32")
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=rf"\A.*{name}: is not a file\Z"):
        open_checkpoint(str(tmp_path)).load_params("float32")


def test_unknown_architecture_is_refused_with_the_file_named(tmp_path: Path):
    write_folder(tmp_path, CONFIG | {"architectures": ["MambaForCausalLM"]}, random_tensors(CONFIG))
    with pytest.raises(
        ValueError, match=r"config\.json: architecture 'MambaForCausalLM' is not supported; known: Llama"
    ):
        open_checkpoint(str(tmp_path))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., str]], None]:
    """Puts a function in the place of `huggingface_hub.snapshot_download`."""

    def install(download: Callable[..., str]) -> None:
        module: Any = types.ModuleType("huggingface_hub")
        module.errors = types.ModuleType("huggingface_hub.errors")
        for name in ("HfHubHTTPError", "HFValidationError", "LocalEntryNotFoundError"):
            setattr(module.errors, name, type(name, (Exception,), {}))
        module.snapshot_download = download
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", module.errors)

    return install


def test_hub_id_is_fetched_without_pickles_or_code(hub: Callable[..., None], tmp_path: Path):
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG))

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        assert repository == "org/Name-1.5"
        assert {pattern.rsplit(".", 1)[-1] for pattern in allow_patterns} == {"json", "jinja", "safetensors", "model"}
        return str(tmp_path)

    hub(download)
    checkpoint = open_checkpoint("org/Name-1.5")
    assert checkpoint.name == "org/Name-1.5"
    assert checkpoint.tokenizer_source == tmp_path


def test_hub_that_fails_is_told_in_one_line(hub: Callable[..., None]):
    def download(repository: str, *, allow_patterns: list[str]) -> str:
        raise OSError("offline\nmore")

    hub(download)
    with pytest.raises(ValueError, match=r"^org/name: no such folder, and the hub did not give it \(offline\)$"):
        open_checkpoint("org/name")


def test_hub_id_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    original = builtins.__import__

    def no_hub(name: str, *arguments: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", no_hub)
    with pytest.raises(ValueError, match=r"pip install 'lserve_jax\[hub\]'"):
        open_checkpoint("org/name")


def test_existing_folder_is_never_looked_for_on_the_hub(hub: Callable[..., None], tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "org" / "name", CONFIG, random_tensors(CONFIG))
    hub(lambda *arguments, **options: pytest.fail("asked the hub"))
    assert open_checkpoint("org/name").config.num_layers == 3
