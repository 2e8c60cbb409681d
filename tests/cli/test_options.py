"""Flags beat LLMDOCTOR_* variables, which beat the profile, which beats the defaults."""

import json

import pytest

from llmdoctor.cli import options
from llmdoctor.errors import UsageError
from llmdoctor.models import model_fingerprint
from llmdoctor.profile import load_profile
from llmdoctor.settings import DecodeSettings, RewardSettings, TrainSettings


class Loaded(Exception):
    """Carries the profile that the models would be loaded from."""


@pytest.fixture
def effective(run, monkeypatch):
    """The settings that ``compare`` would run with."""

    def load_assistant(profile, **_how):
        raise Loaded(profile)

    monkeypatch.setattr(options, "load_assistant", load_assistant)

    def settings(*args, **env):
        result = run("compare", "Hi", *args, env=env)
        assert isinstance(result.exception, Loaded), result.output
        return result.exception.args[0]

    return settings


@pytest.fixture
def profile_file(tmp_path):
    for name in ("h", "s", "b", "d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "doctor.json").write_text("{}")
    path = tmp_path / "mine.yaml"
    path.write_text(
        "patient: {model: ./patient}\ndecode: {temperature: 0.3}\n"
        "doctors: {helpful: {checkpoint: ./h, beta: 0.7}, safe: {checkpoint: ./s}}\n"
    )
    return path


def test_flag_beats_variable_beats_profile_beats_default(effective, profile_file):
    assert load_profile("clinic").decode.temperature == 1.0
    assert effective("--profile", profile_file).decode.temperature == 0.3
    assert effective("--profile", profile_file, LLMDOCTOR_TEMPERATURE="0.5").decode.temperature == 0.5
    flags = ("--profile", profile_file, "--temperature", "0.9")
    assert effective(*flags, LLMDOCTOR_TEMPERATURE="0.5").decode.temperature == 0.9
    assert effective(*flags).decode.top_p == 1.0


def test_every_field_of_the_sections_has_its_option_and_variable(effective, run, profile_file):
    """Options that the commands have had so far keep their spelling."""
    names = {
        command: set(run(command, "--help", env={"COLUMNS": "250"}).stdout.split()) for command in ("train", "chat")
    }
    spelt = {"keep_best": "--keep-best"}
    for command, schemas in {"train": (TrainSettings, RewardSettings), "chat": (DecodeSettings,)}.items():
        for schema in schemas:
            for name in set(schema.model_fields) - {"faces"}:
                assert spelt.get(name, f"--{name.replace('_', '-')}") in names[command], name
    assert {"--keep-last", "--no-anchor", "LLMDOCTOR_TRAIN_DOCTOR]"} <= names["train"]
    assert "--no-speculation" in names["chat"]
    decode = effective("--profile", profile_file, "--stop", "a b", "--stop", "c", "--no-speculation").decode
    assert (decode.stop, decode.speculation) == (("a b", "c"), False)
    assert effective("--profile", profile_file, LLMDOCTOR_PLAUSIBILITY="0.5").decode.plausibility == 0.5
    assert effective("--profile", profile_file, LLMDOCTOR_SPECULATION="0").decode.speculation is False
    assert effective("--profile", profile_file, "--top-k", "0").decode.top_k == 0


def test_options_of_training_reach_the_settings(run, monkeypatch):
    """Zero, False and several values are values, and only what was not given is left to the profile."""
    seen = []
    monkeypatch.setattr("llmdoctor.profile.override", lambda settings, **given: seen.append(given) or settings)
    flags = "--value-weight 0 --no-anchor --keep-last --report-to a --report-to b --lora-targets all-linear --tau 3"
    run("train", *flags.split(), env={"LLMDOCTOR_TRAIN_DOCTOR": "d", "LLMDOCTOR_SEED": "4"})
    training, rewarding = ({key: value for key, value in given.items() if value is not None} for given in seen[:2])
    assert training == {
        "value_weight": 0.0,
        "anchor": False,
        "keep_best": False,
        "report_to": ["a", "b"],
        "lora_targets": ["all-linear"],
        "doctor": "d",
        "seed": 4,
    }
    assert rewarding == {"tau": 3.0}


def test_the_profile_itself_can_come_from_the_environment(effective, profile_file):
    assert effective(LLMDOCTOR_PROFILE=str(profile_file)).name == "mine"
    assert effective("--profile", "clinic", LLMDOCTOR_PROFILE=str(profile_file)).name == "clinic"


def test_betas_by_number_by_name_and_by_variable(effective, profile_file):
    def betas(*args, **env):
        doctors = effective("--profile", profile_file, *args, **env).doctors
        return {name: doctor.beta for name, doctor in doctors.items()}

    assert betas() == {"helpful": 0.7, "safe": 0.8}
    assert betas("--beta", "0.2") == {"helpful": 0.2, "safe": 0.2}
    assert betas("--beta", "safe=0") == {"helpful": 0.7, "safe": 0.0}
    assert betas("--beta", "0.2", "--beta", "helpful=1") == {"helpful": 1.0, "safe": 0.2}
    assert betas(LLMDOCTOR_BETA="helpful=0.1 safe=0.2") == {"helpful": 0.1, "safe": 0.2}
    assert betas("--beta", "safe=1", LLMDOCTOR_BETA="0.1") == {"helpful": 0.7, "safe": 1.0}


def test_other_doctors_get_the_general_mode_unless_a_profile_was_chosen(effective, profile_file):
    def how(*args):
        decode = effective(*args).decode
        return decode.mode, decode.plausibility

    given = profile_file.parent / "d"
    own = load_profile("clinic").decode
    assert own.mode == "ratio"
    assert how() == how("--profile", "clinic", "--doctor", given) == ("ratio", own.plausibility)
    assert how("--doctor", given) == ("product", 0.0)
    assert how("--doctor", given, "--mode", "ratio") == ("ratio", 0.0)
    profile_file.write_text(profile_file.read_text().replace("temperature: 0.3", "mode: ratio, plausibility: 0.2"))
    assert how("--profile", profile_file, "--doctor", given) == ("ratio", 0.2)


def test_doctors_replace_those_of_the_profile(effective, profile_file, tmp_path):
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "doctor.json").write_text(json.dumps({"name": "kind", "base_model": "org/base"}))
    doctors = effective("--doctor", trained, "--doctor", f"safe={tmp_path / 'b'}", "--doctor-base", "org/base").doctors
    assert {name: (d.checkpoint, d.base) for name, d in doctors.items()} == {
        "kind": (str(trained), "org/base"),
        "safe": (str(tmp_path / "b"), "org/base"),
    }


def test_a_doctor_is_as_strong_as_the_one_that_it_replaces(effective, profile_file, tmp_path):
    """By its name, or because there was only one; without a profile there is none to replace."""

    def strengths(*args):
        doctors = effective(*args).doctors
        return {name: (doctor.beta, doctor.dead_zone, doctor.base) for name, doctor in doctors.items()}

    given, text = tmp_path / "d", profile_file.read_text()
    profile_file.write_text(text.replace("beta: 0.7", "beta: 0.7, dead_zone: 2, base: ./b"))
    named = ("--profile", profile_file, "--doctor", f"helpful={given}")
    assert strengths(*named, "--doctor", f"new={given}") == {"helpful": (0.7, 2, None), "new": (0.8, 0, None)}
    assert strengths(*named, "--beta", "0.1") == {"helpful": (0.1, 2, None)}
    profile_file.write_text(text.replace(", safe: {checkpoint: ./s}", ""))
    assert strengths("--profile", profile_file, "--doctor", f"new={given}") == {"new": (0.7, 0, None)}
    assert strengths("--doctor", f"helpful={given}") == {"helpful": (0.8, 0, None)}


def test_doctors_by_path_alone():
    assert options.parse_doctors(["outputs/doctor"]) == {"doctor": "outputs/doctor"}
    assert options.parse_doctors(["./a=b"]) == {"doctor": "./a=b"}
    with pytest.raises(UsageError, match="NAME=PATH"):
        options.parse_doctors(["x=", "y"])


def test_faces_of_the_profile_count_where_the_folder_holds_them():
    profile = load_profile("clinic")
    unset = {"direction": None, "tau": None, "theta": None}
    assert options.reward_settings(profile, available=("helpful", "safe"), faces=None, **unset).faces == ("helpful",)
    assert options.reward_settings(profile, available=("safe",), faces=None, **unset).faces is None
    assert options.reward_settings(profile, available=("helpful", "safe"), faces=["safe"], **unset).faces == ("safe",)
    with pytest.raises(UsageError, match="poker"):
        options.reward_settings(profile, available=("safe",), faces=["poker"], **unset)


def test_the_clinics_settings_are_for_its_own_patient_unless_it_is_named():
    profile = load_profile("clinic")
    own = model_fingerprint(profile.patient.model)
    assert options.fitting(profile, None, own) == profile
    assert options.fitting(profile, "clinic", "another") == profile
    other = options.fitting(profile, None, "another")
    assert (other.rewards, other.train) == (RewardSettings(), TrainSettings())
    assert (profile.rewards, profile.train) != (RewardSettings(), TrainSettings())
    assert (other.faces, other.doctors) == (profile.faces, profile.doctors)
