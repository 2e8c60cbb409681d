"""Stage 1 killed, resumed, damaged, and started twice into one folder."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmdoctor.token_rewards.extract as stage
from llmdoctor.errors import LoadError, UsageError
from llmdoctor.models import Patient, load_patient
from llmdoctor.records import FacePair
from llmdoctor.settings import DataSettings
from llmdoctor.token_rewards.extract import extract
from llmdoctor.token_rewards.folder import RewardsFolder, shard_paths

FACES = {"f": FacePair("Be kind.", "Be rude.")}
PAIRS = 22
KILLS = 20

# A server that forks: torch is loaded once, and every run is a process of its own that can be killed. It reads
# [folder, kill at this file operation or None, kill after so many seconds or None] and answers the run's end, the
# seconds it took and the file operations it made below the folder.
SERVER = """
import json, os, signal, sys, time
import numpy as np, pyarrow as pa, torch
torch.set_num_threads(1)
pa.array([np.zeros(1)])  # imports what its first use imports
import llmdoctor.token_rewards.extract as stage
from llmdoctor.models import load_patient
from llmdoctor.settings import DataSettings
from llmdoctor.records import FacePair

stage.SHARD_PAIRS, stage._WINDOW_PAIRS = 4, 3
patient = load_patient(sys.argv[1])
data = DataSettings(source=sys.argv[2])
patient.fingerprint, patient.vocabulary.fingerprint  # so that a run's time is that of its scoring

def run(folder, at, report):
    operations = 0
    def count(event, args):
        nonlocal operations
        if any(isinstance(arg, str | os.PathLike) and os.fspath(arg).startswith(folder) for arg in args):
            operations += 1
            if operations == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    began = time.monotonic()
    for _ in stage.extract(patient, data, {"f": FacePair("Be kind.", "Be rude.")}, stage.Path(folder)):
        pass
    os.write(report, json.dumps([time.monotonic() - began, operations]).encode())
    os._exit(0)

print("ready", flush=True)
for line in sys.stdin:
    folder, at, after = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run(folder, at, writing)
        finally:
            os._exit(1)
    os.close(writing)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([ended, os.read(reading, 100).decode()]), flush=True)
    os.close(reading)
"""


def read(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its relative name."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def patient(tiny_model: Callable[..., Path]) -> Patient:
    return load_patient(tiny_model())


@pytest.fixture
def data(tmp_path: Path) -> DataSettings:
    path = tmp_path / "pairs.jsonl"
    records: list[dict[str, Any]] = [
        {"prompt": f"Question {i}", "chosen": "good " * (i % 7 + 1), "rejected": "bad " * (i % 4 + 1)}
        for i in range(PAIRS)
    ]
    records.insert(3, {"prompt": "?", "chosen": "", "rejected": "x"})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataSettings(source=str(path))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """22 pairs: five shards of four pairs and one of two."""
    monkeypatch.setattr(stage, "SHARD_PAIRS", 4)
    monkeypatch.setattr(stage, "_WINDOW_PAIRS", 3)


def test_killed_at_any_point_it_ends_with_the_folder_of_an_uninterrupted_run(
    patient: Patient, data: DataSettings, tmp_path: Path
) -> None:
    """SIGKILL at 20 random points: before a random file operation, or after a random time; then the same command."""
    draw = random.Random(0)
    command = [sys.executable, "-c", SERVER, patient.name, data.source]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin
        assert server.stdout

        def run(folder: Path, at: int | None = None, after: float | None = None) -> tuple[int, str]:
            server.stdin.write(json.dumps([str(folder), at, after]) + "\n")
            server.stdin.flush()
            ended, report = json.loads(server.stdout.readline())
            return ended, report

        assert server.stdout.readline() == "ready\n"
        ended, report = run(tmp_path / "whole")
        assert ended == 0
        seconds, operations = json.loads(report)
        whole = read(tmp_path / "whole")
        assert {"meta.json", "rewards-00005.parquet"} < set(whole)
        left: set[int] = set()
        for kill in range(KILLS):
            folder = tmp_path / f"killed-{kill}"
            if kill % 2:
                ended, _ = run(folder, at=draw.randint(1, operations))
                assert ended == -9
            else:
                after = draw.uniform(0, seconds)
                while (ended := run(folder, after=after)[0]) == 0:  # done before: the first run was slower
                    shutil.rmtree(folder)
                    after /= 2
                assert ended == -9
            left.add(len(shard_paths(folder)))
            assert run(folder)[0] == 0
            assert read(folder) == whole, f"kill {kill}"
        server.stdin.close()
    assert len(left) > 3, "the kills fell at different stages of the run"
    assert len(RewardsFolder(tmp_path / "whole")) == PAIRS


def test_two_runs_into_one_folder(patient: Patient, data: DataSettings, tmp_path: Path) -> None:
    """The second is refused while the first runs, changes nothing, and is welcome when the first has stopped."""
    out = tmp_path / "out"
    first = extract(patient, data, FACES, out)
    for _ in range(6):
        next(first)
    held = read(out)
    message = f"another run is writing to {out}: wait for it to end, or choose"
    with pytest.raises(UsageError, match=message) as refused:
        next(extract(patient, data, FACES, out))
    assert "\n" not in str(refused.value)
    assert read(out) == held
    assert len(list(first)) == PAIRS - 6
    assert list(extract(patient, data, FACES, out)) == []
    assert not [name for name in read(out) if name.startswith(".")]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_shard_is_named_and_made_again_alone(
    patient: Patient, data: DataSettings, tmp_path: Path, finished: bool, damage: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    list(extract(patient, data, FACES, whole))
    run = extract(patient, data, FACES, out)
    for _ in range(PAIRS if finished else 13):
        next(run)
    list(run) if finished else run.close()
    shard = out / "rewards-00001.parquet"
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    shard.write_bytes(content if damage == "flipped" else content[:-9])
    with pytest.raises(LoadError, match=r"rewards-00001\.parquet is damaged.*Delete it"):
        list(extract(patient, data, FACES, out))
    if finished and damage == "flipped":
        with pytest.raises(LoadError, match=r"rewards-00001\.parquet is damaged"):
            list(RewardsFolder(out))
    shard.unlink()
    scored = list(extract(patient, data, FACES, out))
    wanted = range(4, 8) if finished else [*range(4, 8), *range(12, PAIRS)]
    lines = [i + 1 + (i >= 3) for i in wanted]  # line 4 cannot be used
    assert [pair.chosen.pair_id for pair in scored] == [str(line) for line in lines]
    assert read(out) == read(whole)


def test_every_flipped_byte_of_a_shard_is_found(patient: Patient, data: DataSettings, tmp_path: Path) -> None:
    list(extract(patient, data, FACES, tmp_path / "out"))
    shard = tmp_path / "out" / "rewards-00002.parquet"
    content = shard.read_bytes()
    for place in range(0, len(content), len(content) // 16):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(LoadError, match=r"rewards-00002\.parquet"):
            list(RewardsFolder(tmp_path / "out"))


def test_files_of_others_are_never_swept(patient: Patient, data: DataSettings, tmp_path: Path) -> None:
    """Only what a killed extract can have left is removed."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".thesis.0a1b2c3d.partial").write_text("years of work")
    with pytest.raises(UsageError, match="not empty"):
        list(extract(patient, data, FACES, tmp_path / "out"))
    assert read(tmp_path / "out") == {".thesis.0a1b2c3d.partial": b"years of work"}


def test_the_rewards_section_may_change_while_resuming(
    patient: Patient, data: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tau, theta and direction are applied when rewards are read; a face is not."""
    from typer.testing import CliRunner

    from llmdoctor.cli.main import app

    def run(**rewards: Any) -> Any:
        faces = {"f": {"positive": "Be kind.", "negative": "Be rude."}, "g": {"positive": "!", "negative": "?"}}
        profile = {"patient": {"model": patient.name}, "faces": faces, "rewards": {"faces": ["f"], **rewards}}
        (tmp_path / "p.yaml").write_text(json.dumps(profile))
        args = ["extract", "--profile", str(tmp_path / "p.yaml"), "--data", data.source, "-o", str(tmp_path / "out")]
        return CliRunner().invoke(app, args)

    stopped = extract(load_patient(patient.name), data, FACES, tmp_path / "out")
    for _ in range(9):
        next(stopped)
    stopped.close()
    assert run(tau=3.0, theta=0.1, direction="label").exit_code == 0
    assert len(RewardsFolder(tmp_path / "out")) == PAIRS
    refused = run(faces=["g"])
    assert refused.exit_code == 3
    assert "its faces is f" in refused.stderr or "its faces is g" in refused.stderr
