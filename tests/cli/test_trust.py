"""The commands: outputs that are no files, bytes that are no text, no network, and a kill in the middle."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmdoctor.cli.serve import _end
from llmdoctor.comparing import KeptAnswer
from llmdoctor.files import locked
from llmdoctor.harmless import json_text

SHORT = ("--max-new-tokens", 3, "--seed", 1)


@pytest.fixture
def fifo():
    """``fifo("name")``: a FIFO; what was written to it, once its writer has closed it."""
    readers = {}

    def make(name):
        path = Path(name)
        os.mkfifo(path)
        read = []
        readers[name] = threading.Thread(target=lambda: read.append(path.read_text(encoding="utf-8")), daemon=True)
        readers[name].start()

        def closed():
            readers[name].join(20)
            assert stat.S_ISFIFO(path.stat().st_mode)
            return read[0]

        return path, closed

    return make


def test_every_file_that_compare_and_inspect_write_may_be_a_fifo_or_a_device(run, fifo, clinic_rewards):
    pipes = {kind: fifo(kind) for kind in ("html", "svg", "markdown", "output")}
    given = [part for kind, (path, _) in pipes.items() for part in (f"--{kind}", path)]
    result = run("compare", "Hi", *SHORT, *given)
    assert result.exit_code == 0, result.output
    texts = {kind: closed() for kind, (_, closed) in pipes.items()}
    assert texts["html"].rstrip().endswith("</html>")
    assert texts["svg"].rstrip().endswith("</svg>")
    assert texts["markdown"].startswith("## Hi")
    assert [json.loads(line)["prompt"] for line in texts["output"].splitlines()] == ["Hi", "Hi"]
    for option in ("--html", "--svg"):
        result = run("inspect", clinic_rewards, option, "/dev/null")
        assert result.exit_code == 0, result.output
        path, closed = fifo(f"inspect{option}")
        assert run("inspect", clinic_rewards, option, path).exit_code == 0
        assert len(closed()) > 1000
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    "arguments",
    [
        *(("compare", "Hi", option, "taken") for option in ("--html", "--svg", "--markdown", "--output")),
        *(("inspect", "rewards", option, "taken") for option in ("--html", "--svg")),
    ],
)
def test_a_folder_is_no_file_and_is_refused_before_anything_is_loaded(run, arguments):
    (Path("taken") / "thesis").mkdir(parents=True)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "taken is a folder: give the name of a file" in result.stderr
    assert Path("taken", "thesis").is_dir()
    assert "torch" not in result.output


@pytest.mark.parametrize("taken", ["fifo", "/dev/null", "file"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("compare", "Hi", "--alpaca-eval"),
        ("compare", "Hi", "--mt-bench"),
        ("extract", "--limit", 1, "-o"),
        ("train", "--rewards", "REWARDS", "--max-steps", 1, "-o"),
        ("shrink", "-o"),
    ],
)
def test_what_is_no_folder_is_refused_and_stays_what_it_is(run, arguments, taken, clinic_rewards):
    os.mkfifo("fifo")
    Path("file").write_text("years of work")
    result = run(*(clinic_rewards if part == "REWARDS" else part for part in arguments), taken)
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:") and taken in line]) == 1
    assert Path("fifo").is_fifo()
    assert Path("file").read_text() == "years of work"
    assert Path("/dev/null").is_char_device()
    assert sorted(path.name for path in Path().iterdir()) == ["fifo", "file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("option", ["--html", "--svg", "--output"])
def test_a_device_that_takes_nothing_is_not_told_about_disks(run, option):
    result = run("compare", "Hi", *SHORT, option, "/dev/full")
    assert result.exit_code != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert line == "error: cannot write /dev/full: No space left on device. It is no file: give the name of one."
    assert Path("/dev/full").is_char_device()


BAD = os.fsdecode(b"a\xff\xed\xa0\x80b")  # as Python gives an argument that is not UTF-8


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        (("compare", BAD), None),
        (("compare", "-"), os.fsencode(BAD)),
        (("compare", "--prompts", "-"), os.fsencode(BAD)),
        (("inspect", "--text", BAD), None),
        (("inspect", "--text", "x", "--prompt", BAD), None),
        (("shrink", "--prompts", "-", "--layers", 1), os.fsencode(f"{BAD}\nMore\n")),
        (("train", "--rewards", "REWARDS", "--name", BAD), None),
        (("chat", "--profile", BAD), None),
        (("profiles", "new", BAD), None),
        (("compare", "Hi", "--doctor", BAD), None),
        (("compare", "Hi", "--beta", f"{BAD}=1"), None),
        (("compare", "Hi", "--lens", BAD), None),
        (("compare", "Hi", "--vs", f"doctor={BAD}"), None),
        (("extract", "--data", BAD), None),
        (("eval", "--data", BAD), None),
        (("eval", "--data", "x.jsonl", "--label", BAD), None),
        (("extract", "--face", BAD), None),
        (("push", BAD, BAD), None),
        ((BAD,), None),
    ],
)
def test_bytes_that_are_no_text_are_one_line(run, arguments, typed, clinic_rewards):
    given = [clinic_rewards if part == "REWARDS" else part for part in arguments]
    result = run(*given, **({"input": typed} if typed else {}))
    assert result.exit_code in (2, 3), result.output + repr(result.exception)
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1, result.stderr
    assert "Traceback" not in result.output
    assert not list(Path.cwd().iterdir())


def test_a_bad_line_in_a_conversation_is_told_and_the_next_one_is_answered(run):
    result = run("chat", "--plain", *SHORT, input=os.fsencode(f"{BAD}\nHi\n"))
    assert result.exit_code == 0
    assert "error: the user turn is not Unicode: character 2 is" in result.stderr
    assert len(result.stdout.split()) >= 2


def test_names_of_files_may_be_any_bytes_but_not_of_folders_that_libraries_write_into(run):
    """On POSIX a file's name is bytes; safetensors, tokenizers and Arrow take Unicode alone."""
    assert run("compare", "Hi", *SHORT, "--html", f"{BAD}.html").exit_code == 0
    assert Path(f"{BAD}.html").exists()
    for command in ("extract", "train", "shrink"):
        result = run(command, "-o", BAD)
        assert result.exit_code in (2, 3)
        assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1
    assert len(list(Path().iterdir())) == 1


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to reach a network fails and is kept."""
    tried = []

    def refuse(*where, **_how):
        tried.append(where)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    return tried


def test_no_command_reaches_for_a_network_unless_a_hub_name_was_asked_for(run, no_network, clinic_rewards, tmp_path):
    doctor = tmp_path / "doctor"
    for arguments in (
        ("profiles", "list"),
        ("profiles", "show", "qwen2.5-7b"),
        ("profiles", "check", "clinic"),
        ("env",),
        ("extract", "--limit", 2, "-o", tmp_path / "rewards"),
        ("inspect", clinic_rewards, "--html", tmp_path / "page.html"),
        ("inspect", "--text", "Go to bed.", "--prompt", "Hi"),
        ("train", "--rewards", clinic_rewards, "-o", doctor, "--max-steps", 1, "--batch-size", 2),
        ("push", doctor, "org/name", "--dry-run"),
        ("compare", "Hi", *SHORT, "--doctor", f"d={doctor}", "--svg", tmp_path / "p.svg"),
        ("chat", "--plain", *SHORT),
    ):
        result = run(*arguments, input="Hi\n")
        assert result.exit_code == 0, (arguments, result.output, result.exception)
        assert not no_network, (arguments, no_network)
    for page in (tmp_path / "page.html", tmp_path / "p.svg"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"\b(src|href)\s*=|url\((?!#)|@import", text), "nor do the files that others open"


@pytest.mark.parametrize("arguments", [("compare", "Hi", "--patient", "org/none"), ("extract", "--data", "org/none")])
def test_hf_hub_offline_is_honoured_where_a_hub_name_is_asked_for(run, no_network, arguments, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(*arguments)
    assert result.exit_code in (2, 3), result.output + repr(result.exception)
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1
    assert not no_network


@pytest.mark.slow
def test_compare_killed_in_the_middle_of_an_answer_leaves_only_answers_and_goes_on(run, tmp_path):
    """SIGKILL while answers are written: no page; run again, the file is as if it was never killed.

    A kill may cut the write of the last line in two, so only lines that end are read.
    """
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("How can I sleep better?\nHow do I boil an egg?\nHow can I sleep well?\n")
    how = ("--prompts", prompts, "--max-new-tokens", 20, "--seed", 1, "--rows", 1, "--html", tmp_path / "page.html")
    killed = tmp_path / "killed.jsonl"
    command = [sys.executable, "-m", "llmdoctor", "compare", *map(str, how), "-o", str(killed)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (killed.exists() and killed.stat().st_size):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    kept = killed.read_bytes()
    assert all(json.loads(line)["answer"]["text"] for line in kept.splitlines(keepends=True) if line.endswith(b"\n"))
    assert {path.name for path in tmp_path.iterdir()} <= {"prompts.txt", "killed.jsonl", ".killed.jsonl.lock", "work"}
    killed.write_bytes(kept + kept[: len(kept) // 2])  # surely cut in the middle of a line
    for output in (killed, tmp_path / "whole.jsonl"):
        assert run("compare", *how, "-o", output).exit_code == 0
    assert not list(tmp_path.glob(".*"))
    said = [
        [(one["prompt"], one["column"], one["answer"]["text"]) for one in map(json.loads, output.open())]
        for output in (killed, tmp_path / "whole.jsonl")
    ]
    assert said[0] == said[1]
    assert len(said[0]) == 6


def test_serve_ended_while_it_imports_is_not_taken_for_a_library_that_is_missing():
    """transformers turns every Exception of an import into one of its own, with a traceback."""
    with pytest.raises(SystemExit) as ended:
        _end(signal.SIGTERM, None)
    assert ended.value.code == 0


KEEP = ("compare", "Hi", *SHORT, "-o", "a.jsonl")
ODD = (None, "", "x\0y", [], [1], {}, {"a": []}, True, -1, 10**30, 1e308, "\ud800", [[]] * 3)


@pytest.fixture
def kept(run):
    """The file of answers that a command has kept."""
    assert run(*KEEP).exit_code == 0
    return Path("a.jsonl")


@pytest.mark.parametrize(
    "held",
    [
        *(b"years of work", b'{"a": 1}', b'{"id": "1", "text": "years of work"}', b"\0" * 9, b"[" * 5000),
        *(b"[" * 5000 + b"\n", b"9" * 9999 + b"\n", b"NaN\n", b"\xff\n", b"\n", b"years\nof work"),
    ],
)
def test_a_file_of_something_else_is_never_cut_or_added_to(run, held):
    """A text without a line end at its end was once taken for an answer that a stop has cut, and removed."""
    Path("a.jsonl").write_bytes(held)
    for command in (KEEP, ("eval", "--prompts", "prompts.txt", *SHORT, "-o", "a.jsonl")):
        Path("prompts.txt").write_text("Hi")
        result = run(*command)
        assert result.exit_code == 2, result.output + repr(result.exception)
        assert "a.jsonl holds something else than answers" in result.stderr
        assert Path("a.jsonl").read_bytes() == held
        assert sorted(path.name for path in Path().iterdir()) == ["a.jsonl", "prompts.txt"]


def test_a_first_answer_that_a_stop_has_cut_is_made_again(run, kept):
    whole = kept.read_bytes()
    for cut in (0, 3, 30, whole.index(b"\n")):
        kept.write_bytes(whole[:cut])
        assert run(*KEEP).exit_code == 0
        said = [
            [json.loads(line)["answer"]["text"] for line in lines.splitlines()] for lines in (kept.read_bytes(), whole)
        ]
        assert said[0] == said[1]


def test_an_answer_that_a_stop_has_cut_within_a_letter_is_made_again(run):
    """Letters beyond ASCII take several bytes, and a full disk stops at any of them."""
    asked = ("compare", "Wie schläft man gut?", *KEEP[2:])
    assert run(*asked).exit_code == 0
    whole = Path("a.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (whole.index("ä".encode()) + 1, whole.index("ä".encode(), first) + 1):
        Path("a.jsonl").write_bytes(whole[:cut])
        assert run(*asked).exit_code == 0
        said = [
            [json.loads(line)["answer"]["text"] for line in lines.splitlines()]
            for lines in (Path("a.jsonl").read_bytes(), whole)
        ]
        assert said[0] == said[1]


def test_kept_answers_of_wrong_types_are_one_line(run, kept):
    """Every key of a line and of its first token, of every type; all of them where they are read, some as a command."""
    first, *others = kept.read_text().splitlines(keepends=True)
    whole = json.loads(first)
    for place, keys in (
        ((), ("column", "question", "sample", "turn", "answer", "seconds", "run_seed")),
        (("answer",), (*whole["answer"],)),
        (("answer", "tokens", 0), (*whole["answer"]["tokens"][0],)),
    ):
        for key in keys:
            for number, value in enumerate(ODD):
                data = json.loads(first)
                inside = data
                for part in place:
                    inside = inside[part]
                inside[key] = value
                with suppress(ValidationError):
                    KeptAnswer.model_validate(data)
                if number == len(keys) % 7:
                    kept.write_text(json.dumps(data) + "\n" + "".join(others))
                    result = run(*KEEP)
                    assert result.exit_code in (0, 2), (key, value, result.output, result.exception)
                    assert "Traceback" not in result.output
                    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) < 2


def test_kept_alternatives_that_cannot_be_said_have_no_chance_again(run):
    """JSON has no infinity: -inf is written as null, and was once read as nothing."""
    asked = (*KEEP, "--top", 10, "--plausibility", 0.5)
    assert run(*asked).exit_code == 0
    lines = Path("a.jsonl").read_text().splitlines()
    assert any("null" in line for line in lines)
    for line in lines:
        held = json.loads(line)
        answer = KeptAnswer.model_validate(held).answer
        assert all(isinstance(one.logprob, float) for token in answer.tokens for one in token.top)
        assert json.loads(json_text(answer.to_dict())) == held["answer"]
    assert "holds all 2 answers already" in run(*asked).stderr


def test_a_second_run_into_one_file_of_answers_is_refused(run):
    """Lines of both would stand between each other."""
    with locked(Path("a.jsonl"), beside=True):
        result = run(*KEEP)
        assert result.exit_code == 2
        assert "another run is writing to a.jsonl: wait for it to end, or choose another output\n" in result.stderr
        assert not Path("a.jsonl").exists()
    assert run(*KEEP).exit_code == 0
    assert [path.name for path in Path().iterdir()] == ["a.jsonl"]
    within = run(*KEEP[:-1], "a.jsonl/b.jsonl")
    assert within.exit_code == 2
    assert within.stderr.endswith("error: a.jsonl is not a folder: choose another output\n")


@pytest.mark.parametrize("place", ["~nobody/x", f"/{'x' * 300}"])
def test_a_profile_with_a_path_that_cannot_be_is_checked(run, place):
    """Of a name that no user has Python raises RuntimeError, of one that is too long OSError."""
    Path("p.yaml").write_text(f"patient: {{model: clinic}}\ndata: {{source: {place}}}\n")
    result = run("profiles", "check", "./p.yaml")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert f"there is nothing at {place}" in result.stderr
    assert run("profiles", "new", "n.yaml", "--extends", place).exit_code == 2


@pytest.mark.parametrize("command", [("compare", "Hi"), ("eval", "--prompts", "prompts.txt")])
def test_more_samples_than_a_list_can_hold_are_refused_at_once(run, command):
    Path("prompts.txt").write_text("Hi")
    result = run(*command, "--samples", 2**31 - 1, "-o", "a.jsonl")
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert "expected at most 10,000,000 answers in all, got 2,147,483,647" in result.stderr
    assert [path.name for path in Path().iterdir()] == ["prompts.txt"]
