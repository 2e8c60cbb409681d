import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llmdoctor.cli.main import app
from llmdoctor.types import Answer, Comparison, GuidedToken

Run = Callable[..., Result]
CLINIC = Path(__file__).parents[2] / "profiles" / "clinic"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No LLMDOCTOR_* of the machine, and a working folder that shows what a command leaves behind."""
    for name in [name for name in os.environ if name.startswith("LLMDOCTOR_")] + ["NO_COLOR", "FORCE_COLOR"]:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def run() -> Run:
    """``run("compare", "Hi", beta=...)``: the whole program in this process, as a shell would see it."""

    def invoke(*args: object, **how: object) -> Result:
        return CliRunner().invoke(app, [str(arg) for arg in args], **how)  # type: ignore[arg-type]

    return invoke


def fails(result: Result, code: int, *words: str) -> None:
    """The one way to fail: this exit code, one ``error:`` line with these words, no traceback, nothing left behind."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.exit_code == code, result.output
    assert len(errors) == 1, result.stderr
    assert all(word in errors[0] for word in words), errors[0]
    assert "Traceback" not in result.output
    assert list(Path.cwd().iterdir()) == []


def token(text: str, value: float = 0.0, **changes: object) -> GuidedToken:
    """A token of one doctor, ``helpful``."""
    facts: dict[str, object] = {
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
    return GuidedToken(**{**facts, **changes})  # type: ignore[arg-type]


def comparison(patient: str, guided: list[GuidedToken], prompt: str = "How?", **settings: object) -> Comparison:
    """A comparison as the engine returns it."""
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


@pytest.fixture(scope="session")
def clinic_rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rewards folder of a few clinic pairs, made by the command itself."""
    folder = tmp_path_factory.mktemp("clinic") / "rewards"
    result = CliRunner().invoke(app, ["extract", "--limit", "6", "-o", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def other_patient(tmp_path: Path) -> Iterator[Path]:
    """The clinic's patient with another fingerprint."""
    folder = tmp_path / "other-patient"
    shutil.copytree(CLINIC / "patient", folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"llmdoctor_test": 1,', 1))
    return folder


@pytest.fixture
def foreign_patient(tmp_path: Path) -> Path:
    """The clinic's patient with two tokens' ids exchanged: another tokenizer."""
    import json

    folder = tmp_path / "foreign-patient"
    shutil.copytree(CLINIC / "patient", folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    ordinary = [name for name in vocabulary if name not in {t["content"] for t in data["added_tokens"]}]
    a, b = ordinary[-1], ordinary[-2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(data))
    return folder
