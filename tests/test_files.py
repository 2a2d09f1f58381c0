import json

import pytest

from convert.errors import UserError
from convert.files import atomic_write, environment, output_folder, sha256, write_json


def fail_halfway(path):
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "deep/file.json"
    with pytest.raises(RuntimeError):
        fail_halfway(path)
    assert list(path.parent.iterdir()) == []
    write_json(path, {"b": 1, "a": 2})
    assert list(json.loads(path.read_text())) == ["b", "a"]
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, 1)
    with pytest.raises(RuntimeError):
        fail_halfway(path)
    assert json.loads(path.read_text()) == 1


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(UserError, match="the disk is full"), atomic_write(tmp_path / "a") as _:
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/deep"):
        with pytest.raises(UserError, match="cannot be written"):
            output_folder(place)
    with pytest.raises(UserError, match="cannot write here"), atomic_write(tmp_path / "file/x"):
        pass


def test_sha256_is_the_files(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_a_record_says_what_ran():
    record = environment()
    assert record["versions"]["torch"]
    assert record["hardware"]["cores"] >= 1
    assert json.loads(json.dumps(record)) == record
