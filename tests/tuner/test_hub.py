"""Adapters by hub id, from the hub's cache: what is loaded, and what is refused before the model is changed."""

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from peft.utils import save_and_load

from tests.models import curlora, layers, llama, tokens

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of files of the repository ``me/adapter`` in a cache, from which requests to the hub are answered."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    repository = tmp_path / "models--me--adapter"
    files = repository / "snapshots" / REVISION
    files.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr(save_and_load, "file_exists", lambda repo_id, filename, **_: (files / filename).exists())
    return files


@pytest.mark.parametrize("subfolder", [None, "inner"])
def test_an_adapter_is_loaded_by_its_id(subfolder, hub, tmp_path):
    model = curlora(llama())
    model.save_pretrained(hub / (subfolder or ""))
    where = {"cache_dir": tmp_path, "local_files_only": True} | ({"subfolder": subfolder} if subfolder else {})
    loaded = PeftModel.from_pretrained(llama(), "me/adapter", **where).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    other = curlora(llama(), seed=1)
    other.load_adapter("me/adapter", "second", **where)
    other.set_adapter("second")
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)


def test_a_subfolder_of_a_folder(tmp_path):
    model = curlora(llama())
    model.save_pretrained(tmp_path / "inner")
    loaded = PeftModel.from_pretrained(llama(), tmp_path, subfolder="inner").eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("subfolder", [None, "inner"])
def test_a_truncated_file_is_refused_before_the_model_is_touched(subfolder, hub, tmp_path):
    curlora(llama()).save_pretrained(hub / (subfolder or ""))
    path = hub / (subfolder or "") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    base = llama()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read .*incomplete or damaged"):
        PeftModel.from_pretrained(base, "me/adapter", cache_dir=tmp_path, local_files_only=True, subfolder=subfolder)
    assert not layers(base)


def test_a_pickle_is_never_opened(hub, tmp_path):
    curlora(llama()).save_pretrained(hub)
    (hub / "adapter_model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")

    torch.save({"x": Bomb()}, hub / "adapter_model.bin")
    base = llama()
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle, and CURLoRA adapters are never loaded from"):
        PeftModel.from_pretrained(base, "me/adapter", cache_dir=tmp_path, local_files_only=True)
    assert not layers(base)
    assert not (tmp_path / "exploded").exists()


def test_an_id_without_an_adapter_says_so(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # otherwise it would ask the hub repeatedly
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at 'me/adapter'"):
        PeftModel.from_pretrained(llama(), "me/adapter", cache_dir=tmp_path, local_files_only=True)
