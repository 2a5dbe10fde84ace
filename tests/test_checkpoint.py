"""Checkpoints that are whole, altered, foreign or gone, in a folder and in an object store."""

import json

import numpy as np
import pytest

from cluster.store import FolderStore, ObjectStore, open_store
from train import checkpoint
from train.checkpoint import CheckpointError

NOW = {"train": 1}


def arrays_of(members, step):
    return {"state/weights": np.array([[ord(m[0]) * 1000.0 + step] * 3 for m in members], dtype=np.float32)}


def save(files, pack, members, step, versions=NOW):
    checkpoint.save(files, pack, members, step, arrays_of(members, step), versions)


def restored(files, members, notes=None):
    found = checkpoint.restore(files, members, NOW, (notes if notes is not None else []).append)
    if found is None:
        return None
    step, slices = found
    return step, np.concatenate([arrays["state/weights"][rows] for arrays, rows in slices])


@pytest.fixture(params=["folder", "object store"])
def files(request, tmp_path):
    return FolderStore(tmp_path) if request.param == "folder" else ObjectStore(tmp_path.as_uri())


def test_the_furthest_step_that_all_members_share_is_restored(files):
    save(files, "p", ["a", "b"], 10)
    save(files, "q", ["c"], 10)
    save(files, "p", ["a", "b"], 20)
    assert checkpoint.latest_steps(checkpoint.manifests(files, NOW, print)) == {"a": 20, "b": 20, "c": 10}
    assert restored(files, ["b", "a"])[0] == 20
    step, weights = restored(files, ["c", "b"])
    assert step == 10
    np.testing.assert_array_equal(weights[:, 0], [99_010, 98_010])
    assert restored(files, ["a", "d"]) is None


def test_the_two_newest_of_a_pack_are_kept(files):
    for step in (10, 20, 30):
        save(files, "p", ["a"], step)
    save(files, "q", ["b"], 10)
    assert [m.step for m in checkpoint.manifests(files, NOW, print)] == [20, 30, 10]
    assert len(files.names(checkpoint.FOLDER)) == 6


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "altered": lambda content: content[:-40] + b"x" + content[-39:],
    "foreign": lambda content: b"not a tensor file",
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_with_its_reason_and_the_previous_one_used(tmp_path, damage):
    files, notes = FolderStore(tmp_path), []
    save(files, "p", ["a"], 10)
    save(files, "p", ["a"], 20)
    name = f"{checkpoint.FOLDER}/p-000000020.npz"
    files.put(name, DAMAGE[damage](files.get(name)))
    step, weights = restored(files, ["a"], notes)
    assert (step, weights[0, 0]) == (10, 97_010)
    assert len(notes) == 1
    assert "p-000000020.npz is truncated or altered" in notes[0]


def test_a_missing_file_and_a_damaged_manifest_are_passed_over(tmp_path):
    files, notes = FolderStore(tmp_path), []
    for step in (10, 20):
        save(files, "p", ["a"], step)
    save(files, "q", ["a"], 30)
    files.put(f"{checkpoint.FOLDER}/q-000000030.json", b"{")
    files.delete(f"{checkpoint.FOLDER}/p-000000020.npz")
    assert restored(files, ["a"], notes)[0] == 10
    assert any("unreadable manifest" in note for note in notes)
    assert any("cannot be read" in note for note in notes)


def test_a_tensor_file_without_its_manifest_is_never_read(tmp_path):
    files = FolderStore(tmp_path)
    save(files, "p", ["a"], 10)
    files.delete(f"{checkpoint.FOLDER}/p-000000010.json")
    assert restored(files, ["a"]) is None


def test_a_manifest_that_goes_while_others_are_read_is_no_trouble(tmp_path):
    """As another process on the same folder drops it."""

    class Shared(FolderStore):
        def names(self, folder):
            return [*super().names(folder), f"{folder}/gone-000000020.json"]

    files, notes = Shared(tmp_path), []
    save(files, "p", ["a"], 10)
    assert restored(files, ["a"], notes)[0] == 10
    assert notes == []


def test_other_results_versions_are_refused(tmp_path):
    files, notes = FolderStore(tmp_path), []
    save(files, "p", ["a"], 10, {"train": 0})
    assert restored(files, ["a"], notes) is None
    assert "results versions {'train': 0}, now {'train': 1}" in notes[0]


def test_pickles_are_refused():
    import io

    buffer = io.BytesIO()
    np.savez(buffer, x=np.array([object()], dtype=object))
    with pytest.raises(CheckpointError, match="not a tensor file"):
        checkpoint.decode_arrays(buffer.getvalue())


def test_stores_write_whole_or_not_at_all(files, tmp_path):
    files.put("a/b.bin", b"one")
    files.put("a/b.bin", b"two")
    assert files.get("a/b.bin") == b"two"
    assert files.names("a") == ["a/b.bin"]
    assert files.names("nowhere") == []
    files.delete("a/b.bin")
    files.delete("a/b.bin")
    with pytest.raises(FileNotFoundError):
        files.get("a/b.bin")


def test_an_interrupted_write_leaves_the_old_content(tmp_path, monkeypatch):
    files = FolderStore(tmp_path)
    files.put("x", b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.put("x", b"new")
    assert files.get("x") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_open_store_tells_paths_from_urls(tmp_path):
    assert isinstance(open_store(tmp_path), FolderStore)
    assert open_store(tmp_path.as_uri()).root == tmp_path
    assert isinstance(open_store("s3://bucket/sweeps?region=eu-west-1"), ObjectStore)


def test_manifests_are_plain_json(tmp_path):
    files = FolderStore(tmp_path)
    save(files, "p", ["a", "b"], 7)
    body = json.loads(files.get(f"{checkpoint.FOLDER}/p-000000007.json"))
    assert body["members"] == ["a", "b"]
    assert body["step"] == 7


@pytest.mark.parametrize("field", ["step", "file"])
def test_a_manifest_with_a_flipped_bit_in_its_step_or_file_is_not_believed(tmp_path, field):
    """The tensors' own checksum still holds; only the name that the manifest was written under tells."""
    files, notes = FolderStore(tmp_path), []
    for step in (10, 20):
        save(files, "p", ["a"], step)
    name = f"{checkpoint.FOLDER}/p-000000020.json"
    body = json.loads(files.get(name))
    changed = {"step": 21, "file": body["file"].replace("20.npz", "10.npz")}
    files.put(name, json.dumps({**body, field: changed[field]}).encode())
    assert restored(files, ["a"], notes)[0] == 10
    assert "it names another file or step" in notes[0]
