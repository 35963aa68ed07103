"""What an interrupted calibration leaves on disk: read back exactly, never half, and only under its own settings."""

from pathlib import Path

import numpy as np
import pytest

from lserve_jax.calibration.progress import PROGRESS_FILE, Progress

SETTINGS = {"seed": 0, "lr": 0.02, "dense_layers": (1, 2)}


def test_results_are_read_back_as_they_were(tmp_path: Path, rng: np.random.Generator):
    progress = Progress(tmp_path / "new" / "folder", SETTINGS)
    assert not (tmp_path / "new").exists()
    results = {"score a b": rng.random((3, 4)), "loss": np.asarray(1 / 3), "training 0": np.asarray(5, np.int32)}
    progress["score a b"] = results["score a b"]
    progress.update({name: results[name] for name in ("loss", "training 0")})
    again = Progress(tmp_path / "new" / "folder", SETTINGS)
    assert again.keys() == results.keys()
    for name, result in results.items():
        assert again[name].dtype == result.dtype
        np.testing.assert_array_equal(again[name], result)


def test_several_results_are_kept_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    progress = Progress(tmp_path, SETTINGS)
    progress.update({"step": np.asarray(1), "gates": np.zeros(3)})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            progress.update({"step": np.asarray(2), "gates": np.ones(3)})
    found = Progress(tmp_path, SETTINGS)
    assert int(found["step"]) == 1 and not found["gates"].any()


def test_results_of_other_settings_are_refused_in_one_line(tmp_path: Path):
    Progress(tmp_path, SETTINGS)["loss"] = np.zeros(1)
    path = tmp_path / PROGRESS_FILE
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        Progress(tmp_path, SETTINGS | {"seed": 1, "quota": "layer"})
    begun = "quota=None (now layer), seed=0 (now 1)"
    assert str(error.value) == f"{path}: was begun with {begun}: continue with that, or name another folder"
    assert Progress(tmp_path, SETTINGS).keys() == {"loss"}


@pytest.mark.parametrize("content", [b"", b"not an archive", "cut"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, content: bytes | str):
    Progress(tmp_path, SETTINGS)["loss"] = np.zeros(1)
    path = tmp_path / PROGRESS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"^[^\n]*progress.npz: damaged [^\n]*delete it to start again$"):
        Progress(tmp_path, SETTINGS)


def test_what_is_finished_leaves_no_file(tmp_path: Path):
    progress = Progress(tmp_path, SETTINGS)
    progress["loss"] = np.zeros(1)
    progress.remove()
    assert not any(tmp_path.iterdir())
    progress.remove()
