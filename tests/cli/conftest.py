import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmdoctor.cli.main import app
from llmdoctor.profile import profile_path
from llmdoctor.records import Answer, Comparison, GuidedToken

CLINIC = profile_path("clinic").parent / "clinic"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, tmp_path):
    """No LLMDOCTOR_* of the machine, and a working folder that shows what a command leaves behind."""
    for name in [name for name in os.environ if name.startswith("LLMDOCTOR_")] + ["NO_COLOR", "FORCE_COLOR"]:
        monkeypatch.delenv(name, raising=False)
    if "transformers" in sys.modules:  # imported by a test before the program could ask it to be quiet
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture(scope="session")
def run():
    """``run("compare", "Hi")``: the whole program in this process, as a shell would see it."""
    return lambda *args, **how: CliRunner().invoke(app, [str(arg) for arg in args], **how)


@pytest.fixture
def fails(run):
    """``fails(2, ["--beta"], "compare", ...)``: that exit code, one ``error:`` line and nothing else, no file left."""

    def check(code, words, *args, **how):
        result = run(*args, **how)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert result.exit_code == code, result.output + repr(result.exception)
        assert len(errors) == 1, result.stderr
        assert all(word in errors[0] for word in words), errors[0]
        assert "Traceback" not in result.output
        assert result.stdout == ""
        assert list(Path.cwd().iterdir()) == []

    return check


@pytest.fixture(scope="session")
def token():
    """``token("text", value)``: a token of one doctor, ``helpful``."""

    def make(text, value=0.0, **changes):
        facts = {
            "position": 0,
            "id": 1,
            "text": text,
            "patient_logprob": -2.0,
            "doctor_logprobs": {"helpful": -1.0},
            "logprob": -1.5,
            "values": {"helpful": value},
            "flip": False,
            "kl": 0.25,
            "alpha": 1.0,
            "betas": {"helpful": 0.8},
        }
        return GuidedToken(**{**facts, **changes})

    return make


@pytest.fixture(scope="session")
def comparison(token):
    """``comparison("patient's text", [tokens])``: what the engine returns."""

    def make(patient, guided, prompt="How?", **settings):
        facts = {"alpha": 1.0, "betas": {"helpful": 0.8}, "mode": "product", "temperature": 1.0, "top_k": 0}
        return Comparison(
            prompt=prompt,
            settings={**facts, "top_p": 1.0, "min_p": 0.0, "max_new_tokens": 16, "seed": 1, **settings},
            patient=Answer(patient, (token(patient),), True),
            guided=Answer("".join(t.text for t in guided), tuple(guided), True),
            metrics={
                "flips": sum(t.flip for t in guided),
                "kl": sum(t.kl for t in guided),
                "kl_per_token": 0.25,
                "guided_tokens": len(guided),
            },
        )

    return make


@pytest.fixture(scope="session")
def clinic_rewards(run, tmp_path_factory):
    """A rewards folder of a few clinic pairs, made by the command itself."""
    folder = tmp_path_factory.mktemp("clinic") / "rewards"
    result = run("extract", "--limit", 6, "-o", folder)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return folder


@pytest.fixture
def other_patient(tmp_path):
    """The clinic's patient with another fingerprint."""
    folder = tmp_path / "other-patient"
    shutil.copytree(CLINIC / "patient", folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"llmdoctor_test": 1,', 1))
    return folder


@pytest.fixture
def foreign_patient(tmp_path):
    """The clinic's patient with the ids of two tokens exchanged: another tokenizer."""
    folder = tmp_path / "foreign-patient"
    shutil.copytree(CLINIC / "patient", folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    added = {entry["content"] for entry in data["added_tokens"]}
    a, b = [name for name in vocabulary if name not in added][-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(data))
    return folder


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """Python's own handler: where the tests run in the background, the shell has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
