"""Bad input: the right exit code, exactly one ``error:`` line, no traceback, nothing half-written."""

import errno
import json
import shutil
from pathlib import Path

import pytest

PAIR = {"prompt": "Is rain wet?", "chosen": "Yes, it is.", "rejected": "Go away."}


@pytest.fixture
def data(tmp_path):
    """``data(line, ...)``: a .jsonl file of these lines."""

    def write(*lines):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return write


def test_a_missing_data_file(fails, tmp_path):
    fails(2, ["nowhere.jsonl"], "extract", "--data", tmp_path / "nowhere.jsonl")


def test_an_empty_data_file(fails, data):
    fails(2, ["pairs.jsonl"], "extract", "--data", data())


def test_a_file_without_json(fails, data):
    fails(2, ["JSON"], "extract", "--data", data("once upon a time", "there was"))


def test_records_without_the_needed_columns(fails, data):
    fails(2, ["question"], "extract", "--data", data({"question": "?", "answer": "!"}))


def test_only_empty_answers(fails, data):
    fails(2, ["pairs.jsonl"], "extract", "--data", data({**PAIR, "chosen": ""}))


@pytest.mark.parametrize(
    ("line", "word"), [("{broken", "JSON"), ({**PAIR, "rejected": " "}, "empty"), ({"prompt": "x"}, "")]
)
def test_a_bad_record_is_skipped_and_said_and_with_strict_it_is_fatal(line, word, run, fails, data, tmp_path):
    source = data(PAIR, line, {**PAIR, "chosen": "It is."})
    result = run("extract", "--data", source, "-o", tmp_path / "rewards")
    assert result.exit_code == 0, result.output
    taken, skipped = result.stderr.splitlines()[:2]
    assert taken.startswith("pairs read as chosen and rejected (prompt, chosen, rejected)")
    assert skipped.startswith("line 2: ")
    assert word in result.stderr
    fails(2, ["2", word], "extract", "--data", source, "--strict")


def test_no_model_there(fails, data):
    fails(3, ["nowhere"], "extract", "--data", data(PAIR), "--patient", "./nowhere")
    fails(3, ["nowhere"], "compare", "Hi", "--patient", "./nowhere")
    fails(3, ["nowhere"], "compare", "Hi", "--doctor", "./nowhere")


def test_a_prompt_longer_than_the_context(fails):
    fails(2, ["context"], "compare", "sleep " * 3000)


def test_a_doctor_for_another_tokenizer(fails, foreign_patient):
    fails(3, ["foreign-patient"], "compare", "Hi", "--patient", foreign_patient)


def test_a_base_model_with_another_tokenizer(fails, foreign_patient, clinic_rewards):
    fails(3, ["foreign-patient"], "train", "--rewards", clinic_rewards, "--doctor", foreign_patient)


def test_rewards_of_another_patient(fails, other_patient, clinic_rewards):
    fails(3, ["patient"], "train", "--rewards", clinic_rewards, "--patient", other_patient, "--max-steps", 1)


def test_no_rewards_folder(fails, tmp_path):
    fails(3, ["outputs/rewards", "extract"], "train")
    fails(3, [str(tmp_path)], "inspect", tmp_path)


def test_rewards_that_lack_a_shard(fails, clinic_rewards, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(clinic_rewards, broken)
    next(broken.glob("rewards-*.parquet")).unlink()
    fails(3, ["rewards-00000.parquet"], "inspect", broken)


def test_a_pair_that_is_not_there(fails, clinic_rewards):
    fails(2, ["--pair", "'x'"], "inspect", clinic_rewards, "--pair", "x")


def test_an_output_folder_that_is_not_ours(fails, run, data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    fails(2, ["mine"], "extract", "--data", data(PAIR), "-o", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_loss_that_is_not_finite(fails, clinic_rewards):
    fails(1, ["loss", "step 1"], "train", "--rewards", clinic_rewards, "--rho", "1e30", "--max-steps", 2)


def test_a_full_disk(fails, run, clinic_rewards, data, monkeypatch, tmp_path):
    def full(*_args, **_how):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    result = run("extract", "--data", data(PAIR), "-o", tmp_path / "rewards")
    assert result.exit_code == 1
    assert [line for line in result.stderr.splitlines() if "No space left" in line and line.startswith("error:")]
    assert not list(tmp_path.rglob("*.parquet*"))
    assert not list(tmp_path.rglob("meta.json"))
    monkeypatch.setattr(Path, "write_text", full)
    steps = ("--max-steps", 1, "--batch-size", 2)
    fails(1, ["No space left", "Free some space"], "train", "--rewards", clinic_rewards, "-o", "doctor", *steps)
    fails(1, ["a.svg", "No space left"], "compare", "Hi", "--svg", "a.svg", "--max-new-tokens", 1)
