"""Models, doctors, profiles and conversations whose names and texts try to steer the terminal."""

import io
import itertools
import json
import os
import re
import threading
import unicodedata
from contextlib import suppress
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from transformers import AutoTokenizer

from llmdoctor.cli.main import app
from llmdoctor.cli.options import complete_profile
from llmdoctor.errors import LLMDoctorError
from llmdoctor.harmless import MARK
from llmdoctor.records import FacePair
from llmdoctor.sessions import Session, Turn
from llmdoctor.settings import DataSettings, Guidance, TrainSettings
from llmdoctor.show.rewards import RewardedText
from llmdoctor.tui.app import BrowserApp
from llmdoctor.tui.config import Config
from llmdoctor.tui.screens.rewards_browser import RewardsScreen, rewards_item
from llmdoctor.tui.screens.sessions import SessionsScreen

from .conftest import DOCTORS, FakeAssistant
from .test_terminal import Terminal

ATTACKS = (
    "\x1b]0;owned\x07",
    "\x1b[2J\x1b[1;1Hlogin:",
    "\x1b]52;c;ZXZpbA==\x07",
    "\x9b31m",
    "\x90q\x9c",
    "ab\b\b\x7f",
    "\rerror: all is well",
    "user\u202etxt.exe\u2066",
    "\ufffe\uffff",
    "[bold red]markup[/]",
)
NAME = "d\x1b]0;owned\x07\u202e\x9b31m[bold]"
# what programs of this kind send: styles, cursor, modes, queries
SEQUENCE = re.compile(r"\x1b(\]22;[a-z]*\x07|\[[0-9;:?<=>$]*[@A-Za-z`~]|[()][A-Z0-9]|[=>78])")


def left_over(output: str) -> set[str]:
    """The characters that steer, but for the sequences of rich and Textual themselves."""
    return steering(SEQUENCE.sub("", output).replace("\r", ""))


def steering(text: str) -> set[str]:
    """The characters that steer a terminal."""
    return {c for c in set(text) - {*"\n\t"} if unicodedata.category(c) in ("Cc", "Cs") or c in "\u202e\u2066\uffff"}


@pytest.fixture(scope="module")
def hostile(tiny_model, tmp_path_factory):
    """A folder with ``patient`` and ``rewards``, and a doctor, whose tokens, names and data are attacks."""
    from llmdoctor.models import load_patient
    from llmdoctor.token_rewards.extract import extract
    from llmdoctor.training.doctor import new_doctor
    from llmdoctor.training.folder import save_doctor

    folder = tmp_path_factory.mktemp("hostile")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokenizer.add_tokens(list(ATTACKS))
    patient = folder / "pat\x1b]0;owned\x07\u202eient"
    patient.symlink_to(tiny_model(tokenizer=tokenizer, initializer_range=0.02))  # so flat that every token is drawn
    doctor, tokens = new_doctor(str(patient), TrainSettings(device="cpu", lora_rank=2))
    save_doctor(folder / "doctor", doctor, tokens, {"name": NAME, "base_model": str(patient)})
    pairs = [{"prompt": a, "chosen": f"{a} yes {b}", "rejected": "no"} for a, b in itertools.pairwise(ATTACKS)]
    data = folder / "pairs\x1b[2J.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in [*pairs, {f"key{NAME}": "x"}]))
    source = DataSettings(source=str(data))
    for _ in extract(load_patient(str(patient)), source, {"f": FacePair("+", "-")}, folder / "rewards"):
        pass
    meta = json.loads((folder / "rewards" / "meta.json").read_text())
    meta["dataset"]["source"] = meta["patient"]["model"] = NAME + "".join(ATTACKS)
    (folder / "rewards" / "meta.json").write_text(json.dumps(meta))
    return folder


def models(hostile):
    return "--patient", str(next(hostile.glob("pat*"))), "--doctor", f"{NAME}={hostile / 'doctor'}"


def in_terminal(*arguments, typed="", monkeypatch):
    """Exit code and all that the command writes to a terminal, in this process."""
    ours, theirs = os.openpty()
    written = []

    def read():
        with suppress(OSError):
            while piece := os.read(ours, 1 << 16):
                written.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patched:
        patched.setenv("TERM", "xterm-256color")
        patched.setattr("sys.stdin", io.StringIO(typed))
        for stream in ("sys.stdout", "sys.stderr"):
            patched.setattr(stream, terminal)
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments])
    reader.join()
    os.close(ours)
    return ended.value.code or 0, b"".join(written).decode("utf-8", "replace")


@pytest.mark.parametrize(
    "command", ["compare", "chat", "inspect", "text", "diagnose", "extract", "train", "push", "no profile", "no doctor"]
)
def test_commands_in_a_terminal_send_nothing_but_their_own_sequences(command, hostile, monkeypatch):
    name, rewards = next(hostile.glob("pat*")), hostile / "rewards"
    how = ("--temperature", 3, "--max-new-tokens", 60, "--seed", 1)
    arguments = {
        "compare": ("compare", f"Why {ATTACKS[1]}?", *models(hostile), *how, "--diff", "--samples", 2),
        "chat": ("chat", "--plain", *models(hostile), *how),
        "inspect": ("inspect", rewards, "--tau", 1, "--theta", 0.01),
        "text": ("inspect", "--text", "".join(ATTACKS), "--prompt", NAME, "--patient", name),
        "diagnose": ("inspect", rewards, "--diagnose"),
        "extract": ("extract", "--data", next(hostile.glob("pairs*")), "--patient", name, "-o", f"out{NAME}"),
        "train": (
            "train",
            "--rewards",
            rewards,
            "--doctor",
            name,
            "-o",
            f"doc{NAME}",
            "--max-steps",
            1,
            "--name",
            NAME,
        ),
        "push": ("push", hostile / "doctor", "org/name", "--dry-run"),
        "no profile": ("profiles", "show", f"{NAME}.yaml"),
        "no doctor": ("compare", "Hi", "--doctor", NAME),
    }
    typed = f"hello\n/set {NAME}=1\n/{NAME}\n/show\n{ATTACKS[2]}\n"
    code, seen = in_terminal(*arguments[command], typed=typed, monkeypatch=monkeypatch)
    assert code == {"no profile": 2, "no doctor": 3}.get(command, 0), seen[-2000:]
    assert not left_over(seen)
    assert "\x1b[2J" not in seen
    assert MARK in seen or command == "diagnose"  # which shows figures alone


def test_profile_names_in_a_terminal(monkeypatch, tmp_path):
    """What the shell completes is the name itself, so one that would steer is left out."""
    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / f"p{NAME}.yaml").write_text(json.dumps({"extends": "clinic", "description": NAME}))
    (folder / f"q{NAME}.yaml").write_text("nonsense")
    monkeypatch.setattr("llmdoctor.profile.config_folder", lambda: tmp_path)
    code, seen = in_terminal("profiles", "list", monkeypatch=monkeypatch)
    assert code == 0
    assert not left_over(seen)
    assert seen.count(MARK) > 8
    assert "clinic" in complete_profile("")
    assert not steering("".join(complete_profile("")))


@pytest.mark.slow
def test_the_app_in_a_terminal_shows_marks_and_survives_bytes_that_are_no_text(hostile):
    program = Terminal("chat", *models(hostile), "--temperature", "3", "--max-new-tokens", "200", "--seed", "1")
    seen = program.until("α patient|Ask")
    os.write(program.ours, b"what \xff\xfe\xc3( is \xed\xa0\x80 this\r")
    seen += program.until(r"\d+ flips, KL")
    seen += program.until("length limit|∎", 60)
    program.press("\x1bOQ")  # F2: the inspector
    program.press("\x1b[D\x1b[D\x1b[D")
    seen += program.until("logprob|patient|token")
    program.press("\x11")
    code, rest = program.end()
    seen += rest
    assert code == 0, seen[-2000:]
    assert not left_over(seen)
    assert MARK in seen


def test_the_browser_of_rewards_shows_marks(drive, tmp_path):
    text = RewardedText(f"chosen{NAME}", ATTACKS, (0.5,) * len(ATTACKS))
    numbers = [0.1] * len(ATTACKS)

    def source(post, _check):
        for attack in ATTACKS:
            post(rewards_item(NAME, attack, [(text, numbers, numbers)] * 2))
        raise LLMDoctorError(f"broken {NAME}")

    browser = BrowserApp(lambda: RewardsScreen(source), Config())

    async def steps(d):
        await d.until(lambda: len(browser.screen.items) == len(ATTACKS))
        for key in ("n", "tab", "right", "right", "f12"):
            await d.press(key)
            assert not steering(d.text())
        assert MARK in d.text()

    drive(browser, steps)
    (picture,) = tmp_path.glob("*.svg")
    ElementTree.parse(picture)  # well-formed


class HostileAssistant(FakeAssistant):
    """Says one attack after the other; one of its doctors has a hostile name."""

    doctor_names = (NAME, "safe")

    def _token(self, position, how, forced):
        token = super()._token(position, how, forced)
        top = tuple(replace(other, text=ATTACKS[other.id]) for other in token.top)
        return replace(token, text=token.text and ATTACKS[position % len(ATTACKS)], top=top)


@pytest.mark.parametrize("size", [(40, 12), (200, 50)])
def test_every_screen_of_the_app_shows_marks(size, make_app, drive, store, monkeypatch):
    """Patient, doctors, titles, prompts and answers are attacks; every line keeps its width."""
    monkeypatch.setitem(DOCTORS, NAME, DOCTORS["helpful"])
    betas = {NAME: 0.8, "safe": 0.4}
    profile = {"patient": {"model": f"org/{NAME}"}, "doctors": {name: {} for name in betas}, "name": NAME}
    store.save(Session("abcd", f"title{NAME}", profile=profile, turns=(Turn(f"Q{ATTACKS[0]}", 1),)))
    shown = make_app(HostileAssistant(shortest=12), models=NAME, guidance=Guidance(betas=betas), profile=profile)
    seen = []

    async def steps(d):
        def look():
            seen.append(d.text())
            assert not steering(d.text())
            for strip in d.strips:
                assert sum(segment.cell_length for segment in strip) == size[0], strip.text

        look()
        await d.ask(f"So {ATTACKS[3]}?")
        look()
        await d.press("f2", "left", "left")
        look()
        await d.press("escape", "escape", "f9")
        await d.until(lambda: isinstance(shown.screen, SessionsScreen))
        look()
        for key in ("d", "r"):
            await d.press("down", key)
            look()
            await d.press("escape")
        await d.press("escape")
        for command in ("/resume abcd", f"/lens {NAME}", f"/rename {NAME}", f"/export md {NAME}/x.md", "/show"):
            await d.type(command)
            look()
        await d.press("f1")
        look()

    drive(shown, steps, size)
    assert MARK in "".join(seen)
