"""Stage 2 on a full disk, started twice into one folder, and killed while it saves."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmdoctor.errors import StorageError, UsageError
from llmdoctor.models import load_patient
from llmdoctor.records import FacePair
from llmdoctor.settings import DataSettings, RewardSettings, ShrinkSettings, TrainSettings
from llmdoctor.token_rewards.extract import extract
from llmdoctor.training.checkpoints import last_checkpoint
from llmdoctor.training.shrink import shrink
from llmdoctor.training.train import train

STEPS = 4


@pytest.fixture(scope="module")
def world(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rewards folder of a tiny patient, and a base for doctors."""
    folder = tmp_path_factory.mktemp("world")
    pairs = "".join(f'{{"prompt": "How {i}?", "chosen": "So {i}.", "rejected": "No."}}\n' for i in range(6))
    (folder / "pairs.jsonl").write_text(pairs)
    patient = load_patient(tiny_model())
    faces = {"f": FacePair("Be kind.", "Be rude.")}
    for _ in extract(patient, DataSettings(source=str(folder / "pairs.jsonl")), faces, folder / "rewards"):
        pass
    (folder / "base").symlink_to(tiny_model("llama", seed=1))
    run(folder, folder / "whole")
    return folder


def run(world: Path, output: Path, on_step: Any = None) -> dict[str, Any]:
    return train(
        world / "rewards",
        output,
        base_model=str(world / "base"),
        reward_settings=RewardSettings(tau=1.0, theta=0.1),
        settings=TrainSettings(device="cpu", lora_rank=4, batch_size=2, max_steps=STEPS, checkpoint_every=1),
        on_step=on_step,
    )


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system's own refusal in the middle of a file, as a full disk or a quota gives it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def weights(doctor: Path) -> tuple[bytes, bytes]:
    return tuple((doctor / f"{name}.safetensors").read_bytes() for name in ("adapter_model", "value_head"))  # type: ignore[return-value]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("fails", ["model.safetensors", "optimizer.pt", "at the end"])
def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_is_kept(world: Path, tmp_path: Path, fails: str) -> None:
    output, work = tmp_path / "doctor", tmp_path / ".doctor.training"

    def fill_up(step: Any) -> None:
        if step.step == (STEPS if fails == "at the end" else 2):
            sizes = {path.name: path.stat().st_size for path in (work / "checkpoint-1").iterdir()}
            # files that are smaller than the one that is named still fit
            limited.enter_context(files_of_at_most(min(sizes.values()) if fails == "at the end" else sizes[fails] - 1))

    with ExitStack() as limited, pytest.raises(StorageError) as caught:
        run(world, output, fill_up)
    message = str(caught.value)
    assert message.startswith(f"cannot write {work}: ")
    assert "\n" not in message
    assert not output.exists()
    kept = STEPS - 1 if fails == "at the end" else 1
    assert f"The checkpoint of step {kept} in {work} is kept" in message
    assert last_checkpoint(work) == work / f"checkpoint-{kept}"
    assert f"checkpoint-{kept + 1}" not in names(work)
    steps: list[Any] = []
    run(world, output, steps.append)
    assert [step.step for step in steps] == list(range(kept + 1, STEPS + 1))
    assert weights(output) == weights(world / "whole")
    assert names(tmp_path) == {"doctor"}


def test_a_second_training_into_one_output_is_refused_and_the_first_ends_as_ever(world: Path, tmp_path: Path) -> None:
    refused = []

    def start_another(_step: Any) -> None:
        for start in (lambda: run(world, tmp_path / "doctor"), lambda: _shrink(world, tmp_path / "doctor")):
            with pytest.raises(UsageError) as caught:
                start()
            refused.append(str(caught.value))

    run(world, tmp_path / "doctor", start_another)
    assert set(refused) == {
        f"another run is writing to {tmp_path / 'doctor'}: wait for it to end, or choose another output"
    }
    assert len(refused) == 2 * STEPS
    assert weights(tmp_path / "doctor") == weights(world / "whole")
    assert names(tmp_path) == {"doctor"}


def _shrink(world: Path, output: Path) -> None:
    patient = load_patient(str(world / "base"))
    shrink(patient, ["How?", "So?"], output, ShrinkSettings(layers=1, max_steps=1, max_new_tokens=2), device="cpu")


def test_what_a_run_killed_while_saving_left_is_cleared_at_the_next_start(world: Path, tmp_path: Path) -> None:
    """Killed between the two renames of a folder that is replaced: the old one, finished, comes back."""
    output = tmp_path / "doctor"
    run(world, output)
    made = (output / "doctor.json").read_bytes()
    shutil.copytree(output, tmp_path / ".doctor.01234567.partial")
    output.rename(tmp_path / ".doctor.01234567.retired")
    steps: list[Any] = []
    run(world, output, steps.append)
    assert not steps
    assert names(tmp_path) == {"doctor"}
    assert (output / "doctor.json").read_bytes() == made


@pytest.mark.parametrize(
    ("state", "whole"),
    [('{"log_history": [{"eval_loss": Infinity, "grad_norm": NaN}]}', True), ('{"log_history": [', False), ("", False)],
)
def test_a_checkpoint_whose_losses_are_no_numbers_is_whole(state, whole, tmp_path):
    """The trainer logs what is infinite; what is not whole is removed at the next start."""
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == (checkpoint if whole else None)
