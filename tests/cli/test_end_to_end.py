"""Every command on the embedded clinic, offline, as a user runs it."""

import json
import math
import subprocess
import sys
from pathlib import Path

from llmdoctor.profile import load_profile, profile_names

QUESTION = "How can I sleep better?"
GUIDED_TOKEN_KEYS = [
    "position",
    "id",
    "text",
    "patient_logprob",
    "doctor_logprobs",
    "logprob",
    "values",
    "flip",
    "kl",
    "alpha",
    "betas",
    "top",
    "patient_id",
    "patient_text",
]


def beside_progress(stderr: str) -> list[str]:
    """Its lines without those that follow every ten seconds on a slow machine."""
    return [line for line in stderr.splitlines() if not line.startswith("Asking: ")]


def test_compare_json_is_the_contracts_object_and_nothing_else():
    program = subprocess.run(
        [sys.executable, "-m", "llmdoctor", "compare", QUESTION, "--json", "--seed", "1", "--max-new-tokens", "12"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert beside_progress(program.stderr) == []
    result = json.loads(program.stdout)
    assert list(result) == ["prompt", "settings", "patient", "guided", "metrics", "id", "turn", "sample"]
    assert result["prompt"] == QUESTION
    settings = {key: result["settings"][key] for key in ("alpha", "betas", "temperature", "top_p", "seed")}
    betas = {name: doctor.beta for name, doctor in load_profile("clinic").doctors.items()}
    assert settings == {"alpha": 1.0, "betas": betas, "temperature": 1.0, "top_p": 1.0, "seed": 1}
    for side in ("patient", "guided"):
        tokens = result[side]["tokens"]
        assert 0 < len(tokens) <= 12
        assert all(list(token) == GUIDED_TOKEN_KEYS for token in tokens)
        assert "".join(token["text"] for token in tokens) == result[side]["text"]
        assert [token["position"] for token in tokens] == list(range(len(tokens)))
    assert all(set(token["values"]) == set(betas) for token in result["guided"]["tokens"])
    kl = sum(token["kl"] for token in result["guided"]["tokens"])
    assert math.isclose(result["metrics"]["kl"], kl)


def test_compare_in_a_pipe_is_plain_text_with_a_two_line_summary(run):
    result = run("compare", QUESTION, "--seed", 7, "--max-new-tokens", 20, "--beta", "helpful=0.5")
    assert result.exit_code == 0, result.output
    assert beside_progress(result.stderr) == []
    assert "\x1b" not in result.stdout
    assert result.stdout.startswith(f"prompt: {QUESTION}\n\npatient alone:\n")
    assert "guided by helpful 0.5" in result.stdout
    changed, settings = result.stdout.splitlines()[-2:]
    assert "guidance changed the likeliest token at " in changed
    assert settings.startswith("alpha 1, beta helpful=0.5 safe=")
    assert settings.endswith("seed 7")
    again = run("compare", QUESTION, "--seed", 7, "--max-new-tokens", 20, "--beta", "helpful=0.5")
    assert again.stdout == result.stdout


def test_without_guidance_and_with_the_same_seed_both_answers_are_equal(run):
    result = run("compare", QUESTION, "--beta", 0, "--json", "--seed", 3, "--max-new-tokens", 20)
    sides = json.loads(result.stdout)
    assert sides["patient"]["text"] == sides["guided"]["text"]
    assert sides["metrics"]["kl"] == 0


def test_compare_draws_and_shows_a_seed(run):
    seeds = {run("compare", QUESTION, "--max-new-tokens", 1).stdout.strip().rpartition("seed ")[2] for _ in range(2)}
    assert len(seeds) == 2
    assert all(seed.isdecimal() for seed in seeds)


def test_compare_reads_the_prompt_from_stdin_and_lists_alternatives(run):
    result = run("compare", "-", "--json", "--top", 3, "--max-new-tokens", 2, input=f"{QUESTION}\n")
    compared = json.loads(result.stdout)
    assert compared["prompt"] == QUESTION
    for token in compared["guided"]["tokens"]:
        keys = ["id", "text", "patient_logprob", "doctor_logprobs", "logprob", "rank", "patient_rank"]
        assert all(list(other) == keys for other in token["top"])
        ranks = [other["rank"] for other in token["top"][:3]]  # those that are cut tie
        assert ranks[0] == 1
        assert ranks == sorted(ranks)


def test_chat_streams_and_goes_on_after_a_prompt_that_is_too_long(run):
    lines = f"{QUESTION}\n{'sleep ' * 3000}\n/set beta=0\n{QUESTION}\n"
    result = run("chat", "--json", "--max-new-tokens", 6, "--seed", 1, input=lines)
    assert result.exit_code == 0, result.output
    objects = [json.loads(line) for line in result.stdout.splitlines()]
    turns = [entry for entry in objects if "turn" in entry]
    assert [turn["turn"] for turn in turns] == [1, 2, 3]
    assert "error" in turns[1]
    tokens = [entry for entry in objects if "turn" not in entry]
    assert all(list(token) == GUIDED_TOKEN_KEYS for token in tokens)
    assert {token["betas"]["helpful"] for token in tokens} == {load_profile("clinic").doctors["helpful"].beta, 0.0}


def test_extract_ends_with_one_object(run, tmp_path):
    data = tmp_path / "pairs.jsonl"
    records = [{"prompt": f"Is {i} a number?", "chosen": "Yes, it is.", "rejected": "Go away."} for i in range(4)]
    data.write_text("\n".join([*map(json.dumps, records), '{"prompt": "x", "chosen": "", "rejected": "no"}', "{", ""]))
    result = run("extract", "--data", data, "-o", tmp_path / "rewards", "--face", "safe", "--face", "helpful", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["read"], report["written"], sum(report["skipped"].values())) == (6, 4, 2)
    assert set(report["faces"]) == {"safe", "helpful"}
    assert {"seconds", "statistics", "tokens", "output"} <= set(report)
    told = [line.partition(":")[0] for line in result.stderr.splitlines()]
    assert told == ["pairs read as chosen and rejected (prompt, chosen, rejected)", "line 5", "line 6"]
    again = run("extract", "--data", data, "-o", tmp_path / "rewards", "--face", "safe", "--face", "helpful", "--json")
    assert json.loads(again.stdout)["written"] == 4


def test_extract_prints_a_summary(run, tmp_path):
    result = run("extract", "--limit", 2, "-o", tmp_path / "rewards")
    assert result.exit_code == 0, result.output
    for words in ("read 2 records", "wrote 2 pairs", "mean_abs_gap", "agreement"):
        assert words in result.stdout


def test_train_makes_a_doctor_that_compare_loads_under_its_name(run, clinic_rewards, tmp_path):
    doctor = tmp_path / "doctor"
    steps = ("--max-steps", 2, "--batch-size", 2, "--flow", "absolute", "--no-anchor")
    result = run("train", "--rewards", clinic_rewards, "-o", doctor, "--name", "kind", *steps, "--json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    report = json.loads(result.stdout)
    assert report["read"] == 6
    assert report["doctor"]["metrics"]["steps"] == 2
    assert report["doctor"]["metrics"] == json.loads((doctor / "doctor.json").read_text())["metrics"]
    trained = report["doctor"]["settings"]["train"]
    assert (trained["batch_size"], trained["flow"], trained["anchor"]) == (2, "absolute", False)
    compared = run("compare", QUESTION, "--doctor", doctor, "--beta", "kind=0.3", "--json", "--max-new-tokens", 2)
    assert json.loads(compared.stdout)["settings"]["betas"] == {"kind": 0.3}


def test_inspect_shows_chosen_beside_rejected(run, clinic_rewards):
    result = run("inspect", clinic_rewards, "--limit", 2)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert result.stdout.count("chosen, reward") == result.stdout.count("rejected, reward") == 2
    for words in ("direction gap", "rewarded: ", "mean |gap|", "gap and label agree"):
        assert words in result.stdout


def test_inspect_json_sums_up(run, clinic_rewards):
    everything = json.loads(run("inspect", clinic_rewards, "--json", "--direction", "label").stdout)
    assert everything["statistics"]["pairs"] == 6
    assert len(everything["pairs"]) == 3
    name = everything["pairs"][1]["id"]
    one = json.loads(run("inspect", clinic_rewards, "--json", "--direction", "label", "--pair", name).stdout)
    assert one["pairs"] == [everything["pairs"][1]]
    for side, sign in (("chosen", 1), ("rejected", -1)):
        rewards = [token["reward"] for token in one["pairs"][0][side]["tokens"]]
        assert all(reward * sign >= 0 for reward in rewards)
        assert math.isclose(sum(rewards), one["pairs"][0][side]["reward"], abs_tol=1e-4)


def test_inspect_writes_a_picture(run, clinic_rewards, tmp_path):
    assert run("inspect", clinic_rewards, "--svg", tmp_path / "rewards.svg").exit_code == 0
    assert "rejected" in (tmp_path / "rewards.svg").read_text(encoding="utf-8")


def test_profiles_list_show_path(run, tmp_path):
    listed = run("profiles").stdout
    assert run("profiles", "list").stdout == listed
    assert [line.split()[0] for line in listed.splitlines()] == profile_names()
    assert [entry["name"] for entry in json.loads(run("profiles", "list", "--json").stdout)] == profile_names()
    path = Path(run("profiles", "path", "clinic").stdout.strip())
    assert path.name == "clinic.yaml"
    assert path.is_file()
    saved = tmp_path / "clinic.yaml"
    saved.write_text(run("profiles", "show", "clinic").stdout)
    assert load_profile(saved) == load_profile("clinic")
    assert json.loads(run("profiles", "show", "clinic", "--json").stdout)["name"] == "clinic"


def test_from_pairs_to_a_head_on_the_patient_by_its_own_states(run, tmp_path):
    """Without faces: extract fits a probe, train makes a head on the patient itself, compare is guided by it."""
    profile = tmp_path / "bare.yaml"
    clinic = load_profile("clinic")
    profile.write_text(f"patient: {{model: {clinic.patient.model}}}\ndata: {{source: {clinic.data.source}}}\n")
    made = run("extract", "--profile", profile, "--limit", 20, "--probe", "--json", "-o", "rewards")
    assert made.exit_code == 0, made.output + repr(made.exception)
    found = json.loads(made.stdout)
    assert found["faces"] == []
    assert 0 <= found["probe"]["held_out_accuracy"] <= 1
    assert found["diagnosis"]["probe_accuracy"] is not None
    shown = run("inspect", "rewards", "--diagnose")
    assert shown.exit_code == 0, shown.output + repr(shown.exception)
    assert "the probe" in shown.stdout
    picture = run("inspect", "rewards", "--diagnose", "--svg", "d.svg")
    assert picture.exit_code == 0, picture.output + repr(picture.exception)
    one = run("inspect", "rewards", "--direction", "probe", "--limit", 1)
    assert one.exit_code == 0, one.output + repr(one.exception)
    options = ("--direction", "probe", "--method", "head", "--max-steps", 2, "--lora-rank", 2)
    trained = run("train", "--profile", profile, "--rewards", "rewards", *options, "-o", "kind", "--json")
    assert trained.exit_code == 0, trained.output + repr(trained.exception)
    assert json.loads(trained.stdout)["doctor"]["settings"]["face_weights"] == {"probe": 1.0}
    how = ("--mode", "ratio", "--beta", "5", "--json", "--max-new-tokens", 10, "--seed", 1)
    compared = run("compare", QUESTION, "--profile", profile, "--doctor", "kind", *how)
    assert compared.exit_code == 0, compared.output + repr(compared.exception)
    assert json.loads(compared.stdout)["metrics"]["kl"] > 0


def test_a_probe_asked_of_a_folder_without_one(fails, clinic_rewards):
    rewards = ("--rewards", clinic_rewards)
    fails(2, ["no probe", "--probe"], "train", *rewards, "--direction", "probe", "-o", "doctor")
    fails(2, ["no probe", "--probe"], "inspect", clinic_rewards, "--direction", "probe")
