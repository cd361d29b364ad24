"""Whose a folder is, one training at a time in it, and which checkpoint is gone on from."""

import errno
import json

import pytest

from curlora.train import TrainError
from curlora.train.folder import Folder, claim


def test_a_folder_is_of_one_training(tmp_path):
    folder = Folder(tmp_path / "out", {"rank": 8, "data": "ab"})
    assert folder.record() is None
    with claim(folder):
        folder.write({})
    assert folder.record() == {"identity": {"rank": 8, "data": "ab"}}
    other = Folder(folder.path, {"rank": 16, "data": "ab"})
    assert other.record() is None  # nothing has been done yet
    folder.write({"outcome": {}})
    with pytest.raises(TrainError, match="belongs to another training: rank is 16 and was 8. Choose another folder"):
        other.record()
    with pytest.raises(TrainError, match="seed is 1 and was None"):
        Folder(folder.path, {"rank": 8, "data": "ab", "seed": 1}).record()


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\xff"])
def test_a_record_that_is_none(content, tmp_path):
    (tmp_path / "training.json").write_text(content, encoding="latin-1")
    with pytest.raises(TrainError, match="training.json cannot be read"):
        Folder(tmp_path, {}).record()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for path in (tmp_path, tmp_path / "precious"):
        with pytest.raises(TrainError, match="holds files, but no training|is a file"):
            Folder(path, {}).record()
    assert (tmp_path / "precious").read_text() == "mine"


def test_one_training_at_a_time(tmp_path):
    folder = Folder(tmp_path / "out", {})
    with claim(folder), pytest.raises(TrainError, match="in use by another training"), claim(Folder(folder.path, {})):
        pass
    with claim(folder):
        pass
    assert list(folder.path.iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(TrainError, match="is full. Finished work is not lost"), claim(Folder(tmp_path, {})):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_the_newest_complete_checkpoint(tmp_path):
    folder = Folder(tmp_path, {})
    checkpoints = folder.checkpoints
    assert checkpoints.newest() is None
    assert checkpoints.seconds(None) == 0
    for step in (9, 10, 20):
        (checkpoints.folder / f"checkpoint-{step}").mkdir(parents=True)
    for step in (9, 10):
        checkpoints.complete(step, step / 2)
    found = checkpoints.newest()  # 20 was cut off
    assert found == checkpoints.folder / "checkpoint-10"
    assert checkpoints.seconds(found) == 5
    checkpoints.keep_only(found)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["checkpoint-10"]
    folder.remove_checkpoints()
    assert not checkpoints.folder.exists()
    folder.write({"outcome": {}})
    assert json.loads((tmp_path / "training.json").read_text())["outcome"] == {}
