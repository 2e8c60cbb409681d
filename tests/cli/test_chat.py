"""The conversation, with a fake assistant whose answers are given by the test."""

import json
import signal
import sys
from contextlib import suppress
from dataclasses import replace

import pytest

from llmdoctor.cli import chat, options
from llmdoctor.cli.chat import _profile_of
from llmdoctor.errors import UsageError
from llmdoctor.profile import load_profile
from llmdoctor.sessions import Session, Turn
from llmdoctor.settings import Guidance, Sampling, WelcomeSettings, check_guidance
from llmdoctor.show.formats import OUTSIDE
from llmdoctor.tui.start import start_of


class FakeAssistant:
    """Answers "one two three"; "stop" presses Ctrl+C after the second word, "long" is longer than the context."""

    doctor_names = ("helpful", "safe")

    def __init__(self, token):
        self._token = token
        self._guidance = Guidance(betas={"helpful": 0.8, "safe": 0.4})
        self.asked = []

    @property
    def guidance(self):
        return self._guidance

    @guidance.setter
    def guidance(self, guidance):
        check_guidance(guidance, self.doctor_names)
        self._guidance = guidance

    def stream(self, messages, **sampling):
        self.asked.append((messages, sampling, self.guidance))
        question = messages[-1]["content"]
        if question == "long":
            raise UsageError("the prompt is 900 tokens long and the context holds 512")
        return self._tokens(question)

    def _tokens(self, question):
        for number, word in enumerate([" one", " two", " three"]):
            if number == 2 and question == "stop":
                signal.raise_signal(signal.SIGINT)
            yield self._token(word, float(number))


@pytest.fixture
def assistant(token, monkeypatch):
    fake = FakeAssistant(token)
    monkeypatch.setattr(options, "load_assistant", lambda *_args, **_how: fake)
    return fake


def test_every_line_of_a_pipe_is_a_turn_and_stdout_is_the_answers(run, assistant):
    result = run("chat", "--seed", "3", "--top-p", "0.9", input="first\n\nsecond\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "one two three\none two three\n", "")
    messages, sampling, _ = assistant.asked[1]
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert [m["content"] for m in messages] == ["first", "one two three", "second"]
    assert (sampling["seed"], sampling["top_p"], sampling["max_new_tokens"]) == (3, 0.9, 240)


def test_a_question_about_what_the_model_does_not_know_has_a_notice(assistant, capsys):
    talk = chat.Conversation(assistant, Sampling(seed=1), load_profile("clinic").welcome, as_json=False)
    for line in ("How can I sleep better?", "Any more?", "/reset", "Any more?"):
        talk.take(line)
    assert capsys.readouterr().err == f"the conversation starts again\n({OUTSIDE})\n"


def test_reset_forgets_and_quit_leaves(run, assistant):
    result = run("chat", input="first\n/reset\nsecond\n/quit\nnever\n")
    assert result.exit_code == 0
    assert [len(messages) for messages, _, _ in assistant.asked] == [1, 1]


def test_set_changes_guidance_and_sampling(run, assistant):
    line = "/set alpha=0.5 beta=0.1 beta.safe=0.9 temperature=0 top_k=4 seed=5\n/set helpful=2\n"
    result = run("chat", input=f"{line}hello\n/show\n")
    _, sampling, guidance = assistant.asked[0]
    assert guidance.alpha == 0.5
    assert guidance.betas == {"helpful": 2.0, "safe": 0.9}
    assert (sampling["temperature"], sampling["top_k"], sampling["seed"]) == (0.0, 4, 5)
    assert "alpha 0.5, beta helpful=2 safe=0.9, greedy, top-k 4, no-repeat-ngram 2, seed 5" in result.stderr
    assert result.stdout == "one two three\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set alpha=0.1 beta=nan", ["beta", "nan"]),
        ("/set alpha=0.1 helpful=-1", ["-1"]),
        ("/set alpha=0.1 temperature=-1", ["temperature", "-1"]),
        ("/set alpha=much", ["alpha", "much"]),
        ("/set alpha=0.1 colour=3", ["colour", "top_p"]),
        ("/set alpha=0.1 beta.quack=3", ["quack"]),
        ("/set alpha=0.1 seed=-1", ["seed", "-1"]),
        ("/set alpha=0 beta=0", ["alpha", "beta", "0"]),
        ("/set alpha=0.1 beta", ["name=value"]),
        ("/set", ["name=value"]),
        ("/dance", ["/dance", "/help"]),
    ],
)
def test_a_bad_command_is_one_line_and_changes_nothing(line, words, run, assistant):
    result = run("chat", "--seed", "1", "--temperature", "0.5", input=f"{line}\nhello\n")
    errors = result.stderr.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert all(word in errors[0] for word in words), errors
    assert (result.exit_code, result.stdout) == (0, "one two three\n")
    _, sampling, guidance = assistant.asked[0]
    assert guidance == Guidance(betas={"helpful": 0.8, "safe": 0.4})
    assert (sampling["temperature"], sampling["seed"]) == (0.5, 1)


def test_a_saved_session_goes_on_as_it_was_held():
    """Its mode, plausibility and dead zones too, whatever the profile says by now."""
    profile = load_profile("clinic")
    guidance = Guidance(0.5, {"helpful": 2.0, "safe": 0.3}, "product", 0.2, {"safe": 0.5})
    turn = Turn("Hi", 1, Sampling(temperature=0.4), guidance)
    session = replace(Session.new(profile.model_dump(mode="json")), turns=(turn,))
    start = start_of(_profile_of(session))
    assert start.guidance == guidance.replace(dead_zones={"helpful": 0.0, "safe": 0.5})
    assert start.sampling.temperature == 0.4
    assert start_of(_profile_of(replace(session, turns=()))).guidance == start_of(profile).guidance
    others = replace(turn, guidance=Guidance(1.0, {"mine": 2.0}))  # held with --doctor, which the session does not keep
    assert start_of(_profile_of(replace(session, turns=(others,)))).guidance == start_of(profile).guidance


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(run, assistant):
    result = run("chat", input="stop\nagain\n")
    assert (result.exit_code, result.stdout) == (0, "one two\none two three\n")
    assert "(interrupted)" in result.stderr
    assert [m["content"] for m in assistant.asked[1][0]] == ["stop", "one two", "again"]


def test_an_answer_that_the_length_limit_cuts_says_so(run, assistant):
    result = run("chat", "--max-new-tokens", "3", input="first\n/set max_new_tokens=4\nsecond\n")
    assert (result.exit_code, result.stdout) == (0, "one two three\n" * 2)
    limit, settings = result.stderr.splitlines()
    assert limit == "(the length limit, 3 tokens; /set max_new_tokens=N changes it)"
    assert settings.endswith("at most 4 tokens")
    assert "length limit" not in run("chat", "--max-new-tokens", "3", input="stop\n").stderr


def test_a_prompt_longer_than_the_context_is_one_line_and_the_conversation_goes_on(run, assistant):
    result = run("chat", input="first\nlong\nthird\n")
    assert (result.exit_code, result.stdout) == (0, "one two three\n" * 2)
    assert result.stderr == "error: the prompt is 900 tokens long and the context holds 512\n"
    assert [m["content"] for m in assistant.asked[2][0]] == ["first", "one two three", "third"]


def test_json_lines_are_tokens_and_one_object_an_answer(run, assistant):
    result = run("chat", "--json", "--seed", "3", input="first\n/show\nstop\nlong\n")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["text"] for line in lines[:3]] == [" one", " two", " three"]
    first, second, third = (line for line in lines if "turn" in line)
    del first["seconds"]
    answer = {"turn": 1, "prompt": "first", "text": "one two three", "tokens": 3, "seed": 3, "interrupted": False}
    assert first == answer
    assert (second["turn"], second["text"], second["interrupted"]) == (2, "one two", True)
    assert (third["turn"], third["error"][:10]) == (3, "the prompt")


@pytest.mark.parametrize("leaving", [EOFError, KeyboardInterrupt])
def test_ctrl_d_and_ctrl_c_at_the_prompt_leave_quietly(leaving, monkeypatch, capsys):
    answers = iter(["hello"])

    def typed(_prompt):
        with suppress(StopIteration):
            return next(answers)
        raise leaving

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", sys.stdin)
    assert list(chat._typed()) == ["hello"]
    assert capsys.readouterr().out == ""


def test_tokens_stream_in_colour_on_a_terminal(assistant, monkeypatch, capsys):
    monkeypatch.setattr(chat, "decorated", lambda _stream: True)
    monkeypatch.setattr(chat, "console", _colour_console)
    talk = chat.Conversation(assistant, Sampling(seed=1), WelcomeSettings(), as_json=False)
    assert talk.take("hello")
    out = capsys.readouterr().out
    assert "\x1b[38;2;" in out
    assert "one" in out


def _colour_console(stream):
    from rich.console import Console

    return Console(file=stream, force_terminal=True, color_system="truecolor")


def test_a_mistake_in_set_speaks_of_set(run):
    for line in ("/set alpha=much", "/set colour=3", "/set"):
        assert "error: /set: " in run("chat", "--plain", input=f"{line}\n").stderr
