"""Stage 1 in two processes: the folder of one."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmdoctor.models import load_patient
from llmdoctor.records import FacePair
from llmdoctor.settings import DataSettings
from llmdoctor.token_rewards.extract import extract
from llmdoctor.token_rewards.folder import RewardsFolder
from llmdoctor.token_rewards.states import add_probe

# One of two gloo processes: what it scores goes to stdout; then the same folder with another face.
PROCESS = """
import sys
import torch
torch.set_num_threads(1)
import llmdoctor.token_rewards.extract as stage
from llmdoctor.errors import LLMDoctorError
from llmdoctor.models import load_patient
from llmdoctor.settings import DataSettings
from llmdoctor.records import FacePair

stage.SHARD_PAIRS, stage._WINDOW_PAIRS = 4, 3
def run(positive):
    faces = {"f": FacePair(positive, "Be rude.")}
    out = stage.Path(sys.argv[3])
    return stage.extract(load_patient(sys.argv[1]), DataSettings(source=sys.argv[2]), faces, out)
print(*[pair.chosen.pair_id for pair in run("Be kind.")])
print((out := stage.Path(sys.argv[3]) / "meta.json").is_file())
try:
    list(run("Be exact."))
except LLMDoctorError as error:
    print(error)
"""


def read(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def write(path: Path, count: int) -> DataSettings:
    records = [
        {"prompt": f"Q{i}", "chosen": "yes " * (i % 5 + 1), "rejected": "no " * (i % 3 + 1)} for i in range(count)
    ]
    records[1]["chosen"] = ""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataSettings(source=str(path))


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """As the launchers give each of several processes: sums of floats depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield None
    torch.set_num_threads(threads)


def test_two_gloo_processes_share_the_shards_and_write_the_folder_of_one(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """19 pairs in shards of 4: the first process takes shards 0, 2 and 4, the second 1 and 3. Both see an error."""
    model, data = tiny_model(), write(tmp_path / "pairs.jsonl", 20)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", PROCESS, str(model), data.source, str(tmp_path / "two")]
    world = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            command, env={**world, "RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    usable = [str(line) for line in range(1, 21) if line != 2]
    for (out, _), shards in zip(said, ((0, 2, 4), (1, 3)), strict=True):
        scored, finished, refusal = out.splitlines()
        assert scored.split() == [id for shard in shards for id in usable[4 * shard : 4 * shard + 4]]
        assert finished == "True"
        assert "holds the rewards of another run: its faces is f" in refusal
    monkeypatch.setattr("llmdoctor.token_rewards.extract.SHARD_PAIRS", 4)
    monkeypatch.setattr("llmdoctor.token_rewards.extract._WINDOW_PAIRS", 3)
    list(extract(load_patient(model), data, {"f": FacePair("Be kind.", "Be rude.")}, tmp_path / "one"))
    assert read(tmp_path / "two") == read(tmp_path / "one")


def test_accelerate_launch_gives_the_folder_of_one_process(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model, data = tiny_model(), write(tmp_path / "pairs.jsonl", 300)
    face = {"positive": "Be kind.", "negative": "Be rude."}
    (tmp_path / "p.yaml").write_text(json.dumps({"patient": {"model": str(model)}, "faces": {"f": face}}))
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "llmdoctor"]
    command = ["extract", "--profile", "p.yaml", "--data", data.source, "-o", "two", "--probe", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, *launch, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)  # one object: of two processes only the first prints
    assert (report["written"], sum(report["skipped"].values())) == (299, 1)
    assert ran.stderr.count("line 2: empty answer") == 1
    list(extract(load_patient(model), data, {"f": FacePair("Be kind.", "Be rude.")}, tmp_path / "one"))
    list(add_probe(load_patient(model), tmp_path / "one"))
    assert len(RewardsFolder(tmp_path / "one")) == 299
    assert read(tmp_path / "two") == read(tmp_path / "one")
