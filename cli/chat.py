"""``llmdoctor chat``: the full-screen app, or a plain streaming conversation with the guided patient."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdoctor.cli import options, remote
from llmdoctor.cli.options import option
from llmdoctor.cli.side_by_side import coloured_text
from llmdoctor.cli.terminal import console, decorated, put_json, say
from llmdoctor.errors import LLMDoctorError, UsageError
from llmdoctor.set_command import parse_settings, setting_help
from llmdoctor.settings import GuidanceFields, Sampling, SamplingFields, WelcomeSettings
from llmdoctor.show.formats import OUTSIDE, counted, knows_text, settings_text, short_name
from llmdoctor.show.lens import DEFAULT_LENS, lens_limit, lens_scores
from llmdoctor.show.text import clean

if TYPE_CHECKING:
    from llmdoctor.assistant import LLMdoctor
    from llmdoctor.profile import Profile
    from llmdoctor.records import GuidedToken, Message
    from llmdoctor.serving.client import RemoteDoctor
    from llmdoctor.sessions import Session, SessionStore

_HELP = """\
/set alpha=1 beta=0.8   change how the models speak; beta.helpful=0.8 or helpful=0.8 for one doctor; seed=off, stop=off
{settings}
/show                   the settings in use
/reset                  forget the conversation
/quit                   leave (as Ctrl+D does)
Ctrl+C stops an answer and keeps the conversation."""


@options.derived
def chat(
    *,
    guided: options.Guided,
    seed: options.Seed = None,
    server: remote.Server = None,
    api_key: remote.ApiKey = None,
    plain: Annotated[bool, option("--plain", "A conversation line by line, without the full screen.")] = False,
    go_on: Annotated[bool, option("--continue", "Continue the last saved conversation (full screen).")] = False,
    resume: Annotated[
        str | None, option("--resume", "Continue this saved conversation (full screen).", metavar="ID")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Talk with the guided patient, side by side with the patient alone; F1 (or /help) explains the keys.

    In a terminal this is a full-screen app; without one, or with --plain, a conversation line by line.
    """
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one talks
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (to the end of the process)
    screen = not plain and not as_json and "RANK" not in os.environ and _full_screen()
    session = store = None
    if go_on or resume is not None:
        if not screen:
            raise UsageError("--continue and --resume need the full screen: a terminal, without --plain and --json")
        store, session = _saved_session(None if go_on else resume)
    models: RemoteDoctor | None = None
    if server is not None:
        models = remote.connect(server, api_key, guided, trust_remote_code=trust_remote_code)
        settings = remote.settings_on(models.profile if session is None else _as_held(models.profile, session), guided)
        models.guidance = settings.decode.guidance(settings.doctors)
    else:
        settings = options.guided_profile(guided, _profile_of(session) if session and not guided["profile"] else None)
    if screen:
        from llmdoctor.tui import launch

        how = {"seed": seed, "session": session, "store": store}
        raise typer.Exit(launch.chat(settings, remote=models, trust_remote_code=trust_remote_code, **how))  # type: ignore[arg-type]
    sampling = settings.decode.sampling(seed)
    assistant = models or options.load_assistant(settings, trust_remote_code=trust_remote_code)
    interactive = sys.stdin.isatty()
    welcome = settings.welcome if interactive else WelcomeSettings()
    conversation = Conversation(assistant, sampling, welcome, as_json=as_json)
    if interactive:
        say(f"{short_name(settings.patient.model)}{knows_text(settings.welcome)}")
        for question in settings.welcome.examples:
            say(f"  {question}")
        say(f"{conversation.describe()}. /help for help.")
    lines = iter(_typed() if interactive else sys.stdin)
    while (line := options.of_first_process(lambda: next(lines, None))) is not None:
        if line.strip() and not conversation.take(line.strip()):
            break
    if interactive:
        say("bye")


def _full_screen() -> bool:
    from llmdoctor.tui.launch import full_screen

    return full_screen(sys.stdin, sys.stdout)


def _saved_session(name: str | None) -> "tuple[SessionStore, Session]":
    """The session whose id begins with ``name``, or the last one, and the store that knows it from now on."""
    from llmdoctor.sessions import SessionStore
    from llmdoctor.tui.launch import sessions_file

    store = SessionStore(sessions_file())
    if name is None:
        saved = store.list()
        if not saved:
            raise UsageError("--continue: there is no saved conversation yet")
        name = saved[0].id
    return store, store.load(name)


def _profile_of(session: "Session") -> "Profile":
    """The profile of a saved conversation, with the settings of its last turn."""
    from llmdoctor.profile import Profile

    if "server" in session.profile:
        where = session.profile["server"]
        raise UsageError(f"session {session.id} was held on a server: add --server {where}, or name a --profile")
    try:
        saved = Profile.model_validate(session.profile)
    except ValueError:
        raise UsageError(
            f"session {session.id} was held with a profile that this version cannot read: name one with --profile"
        ) from None
    return _as_held(saved, session)


def _as_held(saved: "Profile", session: "Session") -> "Profile":
    """The profile with the settings of the conversation's last turn."""
    if not session.turns:
        return saved
    guidance, sampling = session.turns[-1].guidance, session.turns[-1].sampling
    same = set(guidance.betas) == set(saved.doctors)  # else it was held with --doctor, which sessions do not keep
    decode = saved.decode.replace(
        **guidance.model_dump(include=set(GuidanceFields.model_fields) if same else {"alpha"}),
        **sampling.model_dump(include=set(SamplingFields.model_fields)),
    )
    doctors = {
        name: doctor.model_copy(update={"beta": guidance.betas[name], "dead_zone": guidance.dead_zones.get(name, 0.0)})
        for name, doctor in saved.doctors.items()
        if name in guidance.betas
    }
    return saved.model_copy(update={"decode": decode, "doctors": {**saved.doctors, **doctors}})


def _typed() -> Iterator[str]:
    """Lines typed at the prompt, with editing and history; Ctrl+C and Ctrl+D end them."""
    with suppress(ImportError):
        import readline  # noqa: F401  (input() then edits)
    shown = sys.stdout.isatty()
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            if not shown:
                print("you> ", end="", file=sys.stderr, flush=True)
            yield input("you> " if shown else "")
    print(file=sys.stderr)  # the cursor is still on the prompt's line


class Conversation:
    """A conversation and its settings, changed and printed line by line as the user types."""

    def __init__(
        self, assistant: "LLMdoctor | RemoteDoctor", sampling: Sampling, welcome: WelcomeSettings, *, as_json: bool
    ) -> None:
        from llmdoctor.decoding.prefix import PrefixCache

        self.assistant, self.sampling, self.as_json = assistant, sampling, as_json
        self._welcome = welcome
        self.messages: list[Message] = []
        self._prefix_cache = PrefixCache()
        self.turn = 0
        self._coloured = not as_json and decorated(sys.stdout)

    def take(self, line: str) -> bool:
        """Answer the line, or run it if it is a command; False to leave."""
        command, _, rest = line.partition(" ")
        match command:
            case "/quit" | "/exit":
                return False
            case "/help":
                say(_help())
            case "/show":
                say(self.describe())
            case "/reset":
                self.messages.clear()
                say("the conversation starts again")
            case "/set":
                self._complaining(self._set, rest)
            case _ if command.startswith("/"):
                say(f"error: unknown command {command}; /help lists them")
            case _:
                self._complaining(self._answer, line)
        return True

    def describe(self) -> str:
        """The settings in use, in one line."""
        shown = self.assistant.guidance.to_dict() | self.sampling.model_dump()
        return f"{settings_text(shown)}, at most {self.sampling.max_new_tokens} tokens"

    def _complaining(self, action: Any, text: str) -> None:
        """Report a mistake in one line; the conversation continues."""
        try:
            action(text)
        except LLMDoctorError as error:
            say(f"error: {' '.join(str(error).split())}")
            if self.as_json:
                put_json({"turn": self.turn, "error": str(error)})

    def _set(self, text: str) -> None:
        """``alpha=1 beta=0.8 ...``: all of it, or nothing if one value is wrong."""
        guidance, sampling = parse_settings(text, self.assistant.doctor_names, self.assistant.guidance, self.sampling)
        self.assistant.guidance = guidance  # which may refuse it: then neither is changed
        self.sampling = sampling
        say(self.describe())

    def _answer(self, text: str) -> None:
        """Stream one answer; Ctrl+C ends it and keeps the tokens so far."""
        if not self._welcome.covers(text, first=not self.messages):
            say(f"({OUTSIDE})")
        messages = [*self.messages, {"role": "user", "content": text}]
        seed = options.fresh_seed() if self.sampling.seed is None else self.sampling.seed
        how = self.sampling.replace(seed=seed).model_dump()
        pieces: list[str] = []
        began, count, interrupted = time.monotonic(), 0, False
        self.turn += 1
        try:
            for token in self.assistant.stream(messages, prefix_cache=self._prefix_cache, **how):  # type: ignore[arg-type]
                count += 1
                piece = clean(token.text) if any(pieces) else clean(token.text).lstrip()
                pieces.append(piece)
                self._show(token, piece)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if count and not self.as_json:
                print(flush=True)
        if interrupted:
            say("(interrupted)")
        elif count >= self.sampling.max_new_tokens:
            say(f"(the length limit, {counted(count, 'token')}; /set max_new_tokens=N changes it)")
        answer = "".join(pieces).rstrip()
        self.messages = [*messages, {"role": "assistant", "content": answer}]  # type: ignore[list-item]
        if self.as_json:
            seconds = round(time.monotonic() - began, 3)
            result = {"turn": self.turn, "prompt": text, "text": answer, "tokens": count, "seconds": seconds}
            put_json({**result, "seed": seed, "interrupted": interrupted})

    def _show(self, token: "GuidedToken", piece: str) -> None:
        if self.as_json:
            put_json(token.to_dict())
        elif not self._coloured or not piece:
            print(piece, end="", flush=True)
        else:
            text = coloured_text([piece], lens_scores([token], DEFAULT_LENS, None), lens_limit(DEFAULT_LENS))
            console(sys.stdout).print(text, end="", soft_wrap=True)


def _help() -> str:
    """The commands, and every setting that /set takes."""
    return _HELP.format(settings="\n".join(f"  {name:<22}{text}" for name, text in setting_help()))
