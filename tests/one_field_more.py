"""A program of `test_settings.py`: the schema with one field more per group, looked for everywhere it should arrive."""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

MORE = {
    "SamplingFields": 'typical: float = Field(default=1.0, gt=0, le=1, description="Keep typical tokens")',
    "GuidanceFields": 'sharpness: float = Field(default=1.0, ge=0, description="Sharpen the product")',
    "TrainSettings": 'zeal: int = Field(default=1, ge=1, description="Try harder")',
    "RewardSettings": 'bias: float | None = Field(default=None, ge=0, description="Shift the rewards")',
}


class Patched(SourceFileLoader):
    """Loads a module with the lines of ``MORE`` behind the docstrings of their classes."""

    def get_code(self, fullname: str) -> Any:
        text = Path(self.path).read_text(encoding="utf-8")
        for name, line in MORE.items():
            head, statement, rest = text.partition(f"class {name}(Settings):\n")
            doc, quotes, body = rest.partition('"""\n')
            assert body, name
            text = f"{head}{statement}{doc}{quotes}\n    {line}\n{body}"
        return compile(text, self.path, "exec")


class Finder:
    """Finds `llmdoctor.settings` where it is, and has it loaded by ``Patched``."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        spec = PathFinder.find_spec(name, path) if name == "llmdoctor.settings" else None
        if spec is not None:
            spec.loader = Patched(name, str(spec.origin))
        return spec


sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]
os.environ["COLUMNS"] = "200"

import pytest  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from llmdoctor import LLMdoctor  # noqa: E402
from llmdoctor.cli import options  # noqa: E402
from llmdoctor.cli.chat import _profile_of  # noqa: E402
from llmdoctor.cli.main import app  # noqa: E402
from llmdoctor.errors import LLMDoctorError  # noqa: E402
from llmdoctor.profile import load_profile  # noqa: E402
from llmdoctor.sessions import Session, SessionStore, Turn  # noqa: E402
from llmdoctor.set_command import parse_settings  # noqa: E402
from llmdoctor.settings import Guidance, Sampling  # noqa: E402
from llmdoctor.tui.commands import COMMANDS  # noqa: E402
from llmdoctor.tui.generation import Part, Worker  # noqa: E402
from llmdoctor.tui.start import start_of  # noqa: E402


def run(*args: str, lines: str | None = None, **env: str) -> Any:
    return CliRunner().invoke(app, list(args), input=lines, env=env)


def refused(make: Callable[[], Any], word: str) -> None:
    with pytest.raises(LLMDoctorError, match=word):
        make()


def in_the_profile(folder: Path) -> None:
    mine = folder / "mine.yaml"
    for section, name, good, bad in (
        ("decode", "typical", 0.5, 2),
        ("decode", "sharpness", 2, -1),
        ("train", "zeal", 3, 0),
        ("rewards", "bias", 1, -1),
    ):
        mine.write_text(f"patient: {{model: m}}\n{section}: {{{name}: {good}}}\n")
        assert getattr(getattr(load_profile(mine), section), name) == good
        mine.write_text(f"patient: {{model: m}}\n{section}: {{{name}: {bad}}}\n")
        refused(lambda: load_profile(mine), f"{section}.{name}")
    assert "typical: 1.0" in run("profiles", "show", "clinic").stdout


def among_the_options() -> None:
    """Flag, help text, range and environment variable."""
    decode = {"--typical": "Keep typical tokens (> 0 and <= 1).", "--sharpness": "Sharpen the product (>= 0)."}
    rewards = {"--bias": "Shift the rewards (>= 0)."}
    wanted = {
        "chat": decode,
        "compare": decode,
        "inspect": rewards,
        "train": {"--zeal": "Try harder (>= 1)."} | rewards,
    }
    for command, flags in wanted.items():
        shown = run(command, "--help").stdout
        for flag, text in flags.items():
            assert flag in shown, (command, flag)
            assert text in shown, (command, text)
    result = run("train", "--zeal", "0")
    assert result.exit_code == 2
    assert "'zeal' should be greater than or equal to 1, got 0" in result.stderr
    assert "'bias' should be" in run("train", LLMDOCTOR_BIAS="-1").stderr


def in_the_objects_of_the_decoder(doctor: LLMdoctor) -> None:
    refused(lambda: Sampling(typical=2), "typical")  # type: ignore[call-arg]
    refused(lambda: LLMdoctor("/absent", sharpness=-1), "sharpness")
    assert doctor.guidance.sharpness == 2  # type: ignore[attr-defined]
    settings = doctor.compare("Hi", seed=1, max_new_tokens=2, typical=0.5).to_dict()["settings"]
    assert (settings["typical"], settings["sharpness"]) == (0.5, 2.0)


def in_a_conversation(doctor: LLMdoctor) -> None:
    """/set and its help, in the command and in the app, whose worker hands it to the models."""
    guidance, sampling = parse_settings("typical=0.5 sharpness=2", ("a",), Guidance(betas={"a": 1.0}), Sampling())
    assert (guidance.sharpness, sampling.typical) == (2.0, 0.5)  # type: ignore[attr-defined]
    options.load_assistant = lambda *_args, **_how: doctor
    lines = "/help\n/set typical=2\n/set typical=0.25 sharpness=3\nHi\n"
    asked: list[dict[str, Any]] = []
    stream = doctor.stream
    doctor.stream = lambda *args, **how: (asked.append(how), stream(*args, **how))[1]  # type: ignore[method-assign]
    result = run("chat", "--seed", "1", "--max-new-tokens", "2", lines=lines)
    assert result.exit_code == 0, result.output
    assert "Keep typical tokens (> 0 and <= 1)." in result.stderr
    assert "'typical' should be less than or equal to 1, got 2.0" in result.stderr
    assert "sharpness 3, typical 0.25" in result.stderr, result.stderr  # the settings in use, said after /set
    assert (asked[0]["typical"], doctor.guidance.sharpness) == (0.25, 3.0)  # type: ignore[attr-defined]
    assert "typical" in next(command.help for command in COMMANDS if command.name == "set")
    worker = Worker(lambda _progress: doctor, Sampling())
    worker.start()
    worker.speak((Part("guided", [{"role": "user", "content": "Hi"}]),), 3, Sampling(typical=0.75, max_new_tokens=1))  # type: ignore[call-arg]
    while len(asked) < 2:
        time.sleep(0.01)
    worker.close()
    assert (asked[1]["typical"], asked[1]["seed"]) == (0.75, 3)


def in_a_saved_conversation(folder: Path) -> None:
    guidance = Guidance(betas={"helpful": 1.0, "safe": 0.6}, sharpness=3)  # type: ignore[call-arg]
    turn = Turn("Hi", 1, Sampling(typical=0.5), guidance)  # type: ignore[call-arg]
    profile = load_profile("clinic").model_dump(mode="json")
    saved = SessionStore(folder / "s").save(replace(Session.new(profile), turns=(turn,)))
    assert SessionStore(folder / "s").load(saved.id).turns == (turn,)
    assert saved.to_dict()["turns"][0]["sampling"]["typical"] == 0.5
    start = start_of(_profile_of(saved))
    assert (start.sampling.typical, start.guidance.sharpness) == (0.5, 3.0)  # type: ignore[attr-defined]


with tempfile.TemporaryDirectory() as name:
    in_the_profile(Path(name))
    among_the_options()
    assistant = LLMdoctor.from_profile("clinic", sharpness=2)
    in_the_objects_of_the_decoder(assistant)
    in_a_conversation(assistant)
    in_a_saved_conversation(Path(name))
print("found everywhere")
