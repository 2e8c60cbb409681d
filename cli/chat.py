"""``llmdoctor chat``: the full-screen app, or a plain streaming conversation with the guided patient."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdoctor.cli import options
from llmdoctor.cli.options import option
from llmdoctor.cli.side_by_side import coloured_text
from llmdoctor.cli.terminal import console, decorated, put_json, say
from llmdoctor.errors import LLMDoctorError, UsageError
from llmdoctor.show.formats import settings_text, short_name
from llmdoctor.show.lens import lens_scores
from llmdoctor.show.text import clean

if TYPE_CHECKING:
    from llmdoctor.assistant import LLMdoctor
    from llmdoctor.profile import Profile
    from llmdoctor.records import GuidedToken, Message
    from llmdoctor.sessions import Session
    from llmdoctor.settings import DecodeSettings, Guidance

_HELP = """\
/set alpha=1 beta=0.8   change how the models speak; beta.helpful=0.8 or helpful=0.8 for one doctor;
                        also temperature, top_k, top_p, min_p, max_new_tokens, seed (seed=off: a fresh one each time)
/show                   the settings in use
/reset                  forget the conversation
/quit                   leave (as Ctrl+D does)
Ctrl+C stops an answer and keeps the conversation."""


def chat(
    *,
    profile: options.ProfileName = None,
    patient: options.Patient = None,
    doctor: options.Doctors = None,
    doctor_base: options.DoctorBase = None,
    alpha: options.Alpha = None,
    beta: options.Betas = None,
    mode: options.Mode = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    max_new_tokens: options.MaxNewTokens = None,
    seed: options.Seed = None,
    speculation: options.Speculation = None,
    plain: Annotated[bool, option("--plain", "A conversation line by line, without the full screen.")] = False,
    go_on: Annotated[bool, option("--continue", "Go on with the last saved conversation (full screen).")] = False,
    resume: Annotated[
        str | None, option("--resume", "Go on with this saved conversation (full screen).", metavar="ID")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Talk with the guided patient, side by side with the patient alone; F1 (or /help) says how.

    In a terminal this is a full-screen app; without one, or with --plain, a conversation line by line.
    """
    screen = not plain and not as_json and _full_screen()
    session = None
    if go_on or resume is not None:
        if not screen:
            raise UsageError("--continue and --resume need the full screen: a terminal, without --plain and --json")
        session = _saved_session(None if go_on else resume)
    settings = options.guided_profile(
        options.load(profile) if session is None or profile else _profile_of(session),
        named=profile is not None,
        patient={"model": patient, "device": device, "dtype": dtype},
        doctors=doctor,
        doctor_base=doctor_base,
        betas=beta,
        decode={
            "alpha": alpha,
            "mode": mode,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "max_new_tokens": max_new_tokens,
            "speculation": speculation,
        },
    )
    if screen:
        from llmdoctor.tui import launch

        raise typer.Exit(launch.chat(settings, seed=seed, session=session, trust_remote_code=trust_remote_code))
    assistant = options.load_assistant(settings, trust_remote_code=trust_remote_code)
    conversation = Conversation(assistant, settings.decode, seed, as_json=as_json)
    interactive = sys.stdin.isatty()
    if interactive:
        say(f"{short_name(settings.patient.model)}, {conversation.describe()}. /help for help.")
    for line in _typed() if interactive else sys.stdin:
        if line.strip() and not conversation.take(line.strip()):
            break
    if interactive:
        say("bye")


def _full_screen() -> bool:
    from llmdoctor.tui.launch import full_screen

    return full_screen(sys.stdin, sys.stdout)


def _saved_session(name: str | None) -> "Session":
    """The session whose id begins so, or the last one."""
    from llmdoctor.sessions import SessionStore
    from llmdoctor.tui.launch import sessions_file

    store = SessionStore(sessions_file())
    if name is None:
        saved = store.list()
        if not saved:
            raise UsageError("--continue: there is no saved conversation yet")
        name = saved[0].id
    return store.load(name)


def _profile_of(session: "Session") -> "Profile":
    """The models of a saved conversation, with the settings that it ended with."""
    from llmdoctor.profile import Profile

    try:
        saved = Profile.model_validate(session.profile)
    except ValueError:
        raise UsageError(
            f"session {session.id} was held with a profile that this version cannot read: name one with --profile"
        ) from None
    if not session.turns:
        return saved
    last = session.turns[-1]
    names = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens", "stop")
    guidance = last.guidance
    how: dict[str, Any] = {"alpha": guidance.alpha}
    if set(guidance.betas) == set(saved.doctors):  # the last turn may have been held with other ones
        how |= {"mode": guidance.mode, "plausibility": guidance.plausibility}
    decode = saved.decode.model_copy(update=how | {name: getattr(last.sampling, name) for name in names})
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
    print(file=sys.stderr)  # the cursor stands behind the prompt


class Conversation:
    """A conversation and its settings: what a line of the user does to them, and what it prints."""

    def __init__(self, assistant: "LLMdoctor", decode: "DecodeSettings", seed: int | None, *, as_json: bool) -> None:
        from llmdoctor.decoding.caches import PrefixCache

        self.assistant, self.decode, self.seed, self.as_json = assistant, decode, seed, as_json
        self.messages: list[Message] = []
        self._prefix_cache = PrefixCache()
        self.turn = 0
        self._coloured = not as_json and decorated(sys.stdout)
        self._greatest = 0.0

    def take(self, line: str) -> bool:
        """Answer the line, or obey it when it is a command; False to leave."""
        command, _, rest = line.partition(" ")
        match command:
            case "/quit" | "/exit":
                return False
            case "/help":
                say(_HELP)
            case "/show":
                say(self.describe())
            case "/reset":
                self.messages.clear()
                say("the conversation starts anew")
            case "/set":
                self._complaining(self._set, rest)
            case _ if command.startswith("/"):
                say(f"error: unknown command {command}; /help lists them")
            case _:
                self._complaining(self._answer, line)
        return True

    def describe(self) -> str:
        """The settings in use, in one line."""
        shown = {**self.decode.model_dump(), **self.assistant.guidance.to_dict(), "seed": self.seed}
        return f"{settings_text(shown)}, at most {self.decode.max_new_tokens} tokens"

    def _complaining(self, action: Any, text: str) -> None:
        """One line about a mistake; the conversation goes on."""
        try:
            action(text)
        except LLMDoctorError as error:
            say(f"error: {' '.join(str(error).split())}")
            if self.as_json:
                put_json({"turn": self.turn, "error": str(error)})

    def _set(self, text: str) -> None:
        """``alpha=1 beta=0.8 ...``: all of it, or, where one value is wrong, nothing."""
        decode, guidance, seed = parse_settings(
            text, self.assistant.doctor_names, self.decode, self.assistant.guidance, self.seed
        )
        self.assistant.guidance = guidance
        self.decode, self.seed = decode, seed
        say(self.describe())

    def _answer(self, text: str) -> None:
        """Stream one answer; Ctrl+C keeps what was said."""
        messages = [*self.messages, {"role": "user", "content": text}]
        seed = options.fresh_seed() if self.seed is None else self.seed
        how = self.decode.model_dump(include={"temperature", "top_k", "top_p", "min_p", "max_new_tokens", "stop"})
        pieces: list[str] = []
        began, count, interrupted = time.monotonic(), 0, False
        self.turn += 1
        try:
            for token in self.assistant.stream(messages, seed=seed, prefix_cache=self._prefix_cache, **how):  # type: ignore[arg-type]
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
            name = next((name for name, beta in token.betas.items() if beta > 0), None)
            score = lens_scores([token], "value", name)[0]
            self._greatest = max(self._greatest, abs(score or 0.0))
            text = coloured_text([piece], [score], self._greatest)
            console(sys.stdout).print(text, end="", soft_wrap=True)


def parse_settings(
    text: str, names: Sequence[str], decode: "DecodeSettings", guidance: "Guidance", seed: int | None
) -> "tuple[DecodeSettings, Guidance, int | None]":
    """``alpha=1 beta=0.8 helpful=1.2 seed=5`` laid over the settings in use. Raises UsageError."""
    from llmdoctor.profile import override

    given: dict[str, Any] = {}
    betas: list[str] = []
    if not text.strip():
        raise UsageError("expected name=value, for example: /set alpha=1 beta=0.8")
    for item in text.split():
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise UsageError(f"expected name=value, got {item!r}")
        key = key.replace("-", "_")
        if key == "beta":
            betas.append(value)
        elif key.removeprefix("beta.") in names:
            betas.append(f"{key.removeprefix('beta.')}={value}")
        elif key == "seed":
            seed = None if value == "off" else _seed(value)
        elif key in ("alpha", "temperature", "top_k", "top_p", "min_p", "max_new_tokens"):
            given[key] = options.parse_number(key, value)
        else:
            known = ["alpha", "beta", *(f"beta.{name}" for name in names), "temperature", "top_k", "top_p", "min_p"]
            raise UsageError(f"there is no setting {key!r} (there are: {', '.join(known)}, max_new_tokens, seed)")
    chosen = override(decode, **given)
    named = options.parse_betas(betas, names)
    return chosen, replace(guidance, alpha=chosen.alpha, betas={**guidance.betas, **named}), seed


def _seed(value: str) -> int:
    if not value.isdecimal() or int(value) > options.GREATEST_SEED:
        raise UsageError(f"seed: expected a whole number up to {options.GREATEST_SEED}, or off, got {value!r}")
    return int(value)
