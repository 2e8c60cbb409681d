import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmdoctor.errors import LoadError, StorageError, UsageError
from llmdoctor.files import atomic_path, ensure_replaceable, locked, read_json, write_json
from llmdoctor.records import PairScores, Side, TokenScores
from llmdoctor.token_rewards.folder import SCHEMA_VERSION, RewardsFolder, shard_paths, write_shard

FACES = ("helpful", "safe")


def scores(pair_id: str, side: Side, length: int, seed: int) -> TokenScores:
    rng = np.random.default_rng(seed)

    def logprobs() -> dict[str, np.ndarray]:
        return {face: -rng.exponential(size=length).astype(np.float32) for face in FACES}

    return TokenScores(
        pair_id=pair_id,
        side=side,
        prompt_ids=rng.integers(0, 1000, size=seed % 5).astype(np.int32),
        response_ids=rng.integers(0, 1000, size=length).astype(np.int32),
        positive=logprobs(),
        negative=logprobs(),
        alternative_ids=rng.integers(0, 1000, size=length).astype(np.int32),
        alternative_positive=logprobs(),
        alternative_negative=logprobs(),
    )


def pairs(count: int, first: int = 0) -> list[PairScores]:
    return [
        PairScores(scores(str(i), "chosen", 1 + i % 7, 2 * i), scores(str(i), "rejected", 1 + i % 4, 2 * i + 1))
        for i in range(first, first + count)
    ]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A finished rewards folder: 150 pairs (more than one reading batch) and 3 pairs."""
    folder = tmp_path / "rewards"
    shards = [write_shard(folder, 0, pairs(150), FACES), write_shard(folder, 1, pairs(3, first=150), FACES)]
    meta = {
        "schema_version": SCHEMA_VERSION,
        "patient": {"model": "m", "fingerprint": "f"},
        "tokenizer": {"fingerprint": "t", "size": 1000},
        "faces": {face: {"positive": "+", "negative": "-"} for face in FACES},
        "shards": [shard.name for shard in shards],
    }
    write_json(folder / "meta.json", meta)
    return folder


def assert_same(got: TokenScores, wanted: TokenScores) -> None:
    assert (got.pair_id, got.side) == (wanted.pair_id, wanted.side)
    for name in ("prompt_ids", "response_ids", "alternative_ids"):
        assert getattr(got, name).dtype == np.int32
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))
    for name in ("positive", "negative", "alternative_positive", "alternative_negative"):
        assert tuple(getattr(got, name)) == FACES
        for face in FACES:
            assert getattr(got, name)[face].dtype == np.float32
            np.testing.assert_array_equal(getattr(got, name)[face], getattr(wanted, name)[face])


def test_a_rewards_folder_gives_back_exactly_what_was_written(folder):
    rewards = RewardsFolder(str(folder))
    assert rewards.faces == FACES
    assert len(rewards) == 153
    for _ in range(2):  # it can be read again and again
        read = list(rewards)
        assert len(read) == 153
        for got, wanted in zip(read, pairs(153), strict=True):
            assert_same(got.chosen, wanted.chosen)
            assert_same(got.rejected, wanted.rejected)


def test_arrays_that_were_read_can_be_written_to(folder):
    """torch.from_numpy warns about read-only memory."""
    first = next(iter(RewardsFolder(folder)))
    assert first.chosen.response_ids.flags.writeable
    assert first.rejected.negative["safe"].flags.writeable


def test_shards_are_found_in_order_and_partial_ones_are_not(folder):
    (folder / ".rewards-00002.parquet.1234.partial").touch()
    assert [path.name for path in shard_paths(folder)] == ["rewards-00000.parquet", "rewards-00001.parquet"]
    assert sorted(path.name for path in folder.glob("rewards*")) == [path.name for path in shard_paths(folder)]


def refusal(folder: Path) -> str:
    with pytest.raises(LoadError) as caught:
        list(RewardsFolder(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_absent_folder_is_refused(tmp_path):
    assert "no rewards folder at" in refusal(tmp_path / "nothing")


def test_a_folder_without_meta_says_whether_extract_has_not_finished(folder, tmp_path):
    (folder / "meta.json").unlink()
    assert "extract has not finished" in refusal(folder)
    (tmp_path / "other").mkdir()
    assert "is not a rewards folder" in refusal(tmp_path / "other")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object, got []: run extract again"),
        ('{"schema_version": 99}', "expected schema_version 1 or less, got 99: update llmdoctor"),
        ('{"schema_version": 1}', "expected a key 'patient'"),
    ],
)
def test_a_wrong_meta_is_refused(folder, meta, message):
    (folder / "meta.json").write_text(meta)
    assert message in refusal(folder)


def test_a_missing_a_cut_and_a_foreign_shard_are_refused(folder):
    shard = folder / "rewards-00001.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert "cannot read" in refusal(folder)
    shard.unlink()
    assert "is missing although meta.json names it" in refusal(folder)
    write_shard(folder, 1, pairs(2), FACES[:1])
    assert "no log-probs for face pair 'safe'" in refusal(folder)


def test_damage_inside_a_shard_is_found_while_reading(folder):
    shard = folder / "rewards-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[4:400] = bytes(396)
    shard.write_bytes(content)
    assert "cannot read" in refusal(folder)


def test_files_may_be_read_by_whom_the_user_lets_read(tmp_path):
    """Safetensors writes files for their owner alone."""
    (tmp_path / "plain").touch()
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        save_file({"x": torch.zeros(2)}, temporary / "x.safetensors")
    modes = {path.stat().st_mode for path in (tmp_path / "plain", tmp_path / "folder" / "x.safetensors")}
    assert len(modes) == 1


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    with atomic_path(target) as temporary:
        assert not temporary.exists()
        assert temporary.parent == target.parent
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def write_and_fail(target: Path, failure: BaseException) -> None:
    with atomic_path(target) as temporary:
        if target.is_dir():
            temporary.mkdir()
            (temporary / "half").write_text("new")
        else:
            temporary.write_text("new")
        raise failure


@pytest.mark.parametrize("failure", [ValueError("bug"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, failure):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    folder.mkdir()
    (folder / "inside").write_text("old")
    for target in (file, folder):
        with pytest.raises(type(failure)):
            write_and_fail(target, failure)
    assert file.read_text() == "old"
    assert [path.name for path in folder.iterdir()] == ["inside"]
    assert sorted(tmp_path.iterdir()) == [file, folder]


def test_a_folder_replaces_a_folder_as_a_whole(tmp_path):
    target = tmp_path / "doctor"
    for name in ("first", "second"):
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
        assert [path.name for path in target.iterdir()] == [name]
    assert list(tmp_path.iterdir()) == [target]


def test_a_linked_output_stays_a_link(tmp_path):
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big-disk")
    with atomic_path(tmp_path / "link") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "big-disk" / "new").exists()


def write_to_a_full_disk(temporary: Path) -> None:
    temporary.symlink_to("/dev/full")
    temporary.write_text("data")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path):
    target = tmp_path / "meta.json"
    with pytest.raises(StorageError) as caught, atomic_path(target) as temporary:
        write_to_a_full_disk(temporary)
    message = str(caught.value)
    assert message.startswith(f"cannot write {target}: No space left on device (")
    assert message.endswith("Free some space and run again.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_inside_a_folder_names_the_folder(tmp_path):
    with (
        pytest.raises(StorageError) as caught,
        atomic_path(tmp_path / "doctor") as folder,
        atomic_path(folder / "doctor.json") as temporary,
    ):
        write_to_a_full_disk(temporary)
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'doctor'}: No space left on device (")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # what the tokenizers library raises
    ],
)
def test_a_full_disk_is_recognised_in_rust_libraries(tmp_path, error):
    with pytest.raises(StorageError, match=r"No space left on device \(.* free\)\. Free some space"):
        write_and_fail(tmp_path / "model", error)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        write_json(tmp_path / "file" / "meta.json", {})


def test_only_our_own_folders_may_be_replaced(tmp_path):
    ensure_replaceable(tmp_path / "absent", "doctor.json")
    ensure_replaceable(tmp_path, "doctor.json")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"not empty and has no doctor\.json"):
        ensure_replaceable(tmp_path, "doctor.json")
    with pytest.raises(UsageError, match="is a file"):
        ensure_replaceable(tmp_path / "thesis.tex", "doctor.json")
    (tmp_path / "doctor.json").touch()
    ensure_replaceable(tmp_path, "doctor.json")


def test_json_is_read_as_it_was_written_and_is_plain_utf8(tmp_path):
    data = {"name": "Ärztin", "numbers": [1, 2.5, None]}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == data == json.loads((tmp_path / "a.json").read_bytes())
    assert "Ärztin" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_json_never_holds_what_other_programs_cannot_read(tmp_path):
    write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert read_json(tmp_path / "a.json") == {"loss": None}


def test_missing_json_is_a_load_error(tmp_path):
    with pytest.raises(LoadError, match="No such file"):
        read_json(tmp_path / "nothing.json")


HOLDER = """
import sys, time
from pathlib import Path
from llmdoctor.files import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_lock_is_refused_at_once_and_ends_with_the_process_that_holds_it(tmp_path):
    """Killed, it leaves its lock file and half a meta.json: the next holder takes the one and removes the other."""
    folder = tmp_path / "made" / "here"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another run is writing to"), locked(folder):
            pass
        (folder / ".meta.json.0a1b2c3d.partial").write_text("{")
        holder.kill()
    assert len(list(folder.iterdir())) == 2
    with locked(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert list(folder.iterdir()) == [], "it was there before: it stays"
    with locked(tmp_path / "new" / "folder"):
        pass
    assert not (tmp_path / "new").exists()
