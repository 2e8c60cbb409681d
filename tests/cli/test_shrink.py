"""``llmdoctor shrink``: what it says, and one line for every mistake."""

import json

import pytest

PROMPTS = "How can I sleep better?\nWhat should I do?\nIs the room dark?\n"
FEW = ["--layers", "1", "--answers", "1", "--max-new-tokens", "4", "--max-steps", "2"]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return tmp_path / "prompts.txt"


def test_it_writes_a_model_that_drafts(run, tiny_model, prompts, tmp_path):
    patient = tiny_model("llama", num_hidden_layers=3)
    small = tmp_path / "small"
    done = run("shrink", "--patient", patient, "--prompts", prompts, "-o", small, *FEW, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["report"]["layers"] == 1
    assert said["report"] == json.loads((small / "shrunk.json").read_text())["report"]
    how = [
        "compare",
        "Hello",
        "--patient",
        patient,
        "--seed",
        "1",
        "--max-new-tokens",
        "12",
        "--json",
        "--device",
        "cpu",
    ]
    doctors = ["--profile", _profile(tmp_path, patient)]
    plain, drafted = (run(*how, *doctors, *more) for more in ([], ["--draft-model", small]))
    assert plain.exit_code == drafted.exit_code == 0, drafted.output
    texts = [[json.loads(one.stdout)[side]["text"] for side in ("patient", "guided")] for one in (plain, drafted)]
    assert texts[0] == texts[1]


def _profile(folder, patient):
    path = folder / "mine.yaml"
    path.write_text(f"patient: {{model: {patient}}}\n")
    return path


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--layers", "3"], 2, ["has 3 layers", "fewer", "got 3"]),
        (["--layers", "0"], 2, ["layers", "1"]),
        (["--prompts", "nowhere.txt"], 2, ["nowhere.txt"]),
        (["--holdout", "1"], 2, ["holdout", "1"]),
    ],
    ids=repr,
)
def test_a_mistake_is_one_line(args, code, words, fails, tiny_model, prompts):
    patient = tiny_model("llama", num_hidden_layers=3)
    fails(code, words, "shrink", "--patient", patient, "--prompts", prompts, "-o", "small", "--device", "cpu", *args)


def test_a_profile_without_data_needs_prompts(fails, tiny_model, tmp_path):
    fails(2, ["mine", "--prompts"], "shrink", "--profile", _profile(tmp_path, tiny_model("llama")))


def test_the_small_model_of_another_patient_is_told(run, tiny_model, prompts, tmp_path):
    patient = tiny_model("llama", num_hidden_layers=3)
    done = run("shrink", "--patient", patient, "--prompts", prompts, "-o", tmp_path / "s", *FEW, "--device", "cpu")
    assert done.exit_code == 0, done.output
    other = _profile(tmp_path, tiny_model("llama", seed=3))
    done = run("compare", "Hi", "--profile", other, "--draft-model", tmp_path / "s", "--max-new-tokens", "4")
    assert done.exit_code == 0, done.output
    assert "shrunk from another patient" in done.stderr
