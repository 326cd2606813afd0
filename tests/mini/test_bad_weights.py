"""Damaged weights, weights of another model, folders of no model: one clear error each."""

import shutil

import pytest
import tiny
from safetensors.torch import load_file, save_file

import captum_dcam
from captum_dcam.errors import UnknownNameError, WeightsError
from captum_dcam.mini import loading


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    tiny.model().save_pretrained(made)
    tiny.tokenizer().save_pretrained(made)
    tiny.processor().image_processor.save_pretrained(made)
    return made


def cut(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.0.gate_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def of_another_size(folder):
    tiny.model(hidden_size=96).save_pretrained(folder / "other")
    shutil.copy(folder / "other" / "model.safetensors", folder)


WEIGHTS = {
    "garbage": lambda f: (f / "model.safetensors").write_bytes(b"garbage" * 100),
    "empty": lambda f: (f / "model.safetensors").write_bytes(b""),
    "cut": lambda f: cut(f / "model.safetensors"),
    "a tensor less": without_a_tensor,
    "another size": of_another_size,
    "config is no json": lambda f: (f / "config.json").write_text("{"),
    "config without a type": lambda f: (f / "config.json").write_text("{}"),
    "config of another model": lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
}


@pytest.mark.parametrize("damage", WEIGHTS)
def test_damaged_or_foreign_weights(folder, damage):
    WEIGHTS[damage](folder)
    with pytest.raises(WeightsError, match=str(folder)):
        captum_dcam.load(folder, family="mini")


def test_folders_that_hold_no_known_model(folder, tmp_path):
    assert captum_dcam.load(folder).family == "mini"
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json missing"):
        captum_dcam.load(folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json, model\.safetensors"):
        loading.load_mini(tmp_path)
    WEIGHTS["config of another model"](folder)
    with pytest.raises(UnknownNameError, match="unknown model"):
        captum_dcam.load(folder)
    WEIGHTS["config is no json"](folder)
    with pytest.raises(WeightsError, match="damaged"):
        captum_dcam.load(folder)
