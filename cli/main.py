"""The ``llmdoctor`` command: the app, and how what goes wrong becomes one line and an exit code."""

import errno
import io
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from llmdoctor import __version__
from llmdoctor.cli.every_command import Quiet, Verbose, examples
from llmdoctor.cli.terminal import narrate, say
from llmdoctor.errors import LLMDoctorError, LLMDoctorWarning
from llmdoctor.show.text import clean

# Libraries below talk and draw bars on their own; this program does its own narration. A variable already set wins.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


class _App(TyperGroup):
    """Typer's group with commands that are loaded when they are called, and with this program's ends.

    These are the exit codes 0, 1, 2, 3, 130 and one ``error:`` line.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands = cast("dict[str, Any]", _Commands())

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """List the commands without loading them."""
        whole, self.commands = self.commands, {name: _listed(name) for name in COMMANDS}
        try:
            super().format_help(ctx, formatter)
        finally:
            self.commands = whole

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command line and exit."""
        _prepare()
        narrate(0)
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            if code == 130:
                say("interrupted")
            sys.exit(code)
        except typer.TyperException as error:  # a usage mistake, found while parsing
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context else ""
            _fail(error.format_message() + hint, error.exit_code)
        except LLMDoctorError as error:
            _fail(str(error), error.exit_code)
        except UnicodeError as error:
            _fail(f"expected text in UTF-8: {error}", 2)
        except typer.Abort:
            sys.exit(130)
        except SystemExit as ended:  # Typer and rich turn a closed pipe into exit code 1
            if not isinstance(ended.__context__, BrokenPipeError):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still held goes nowhere
            sys.exit(0)  # the reader has what it wants, as `head` does
        except OSError as error:
            reason = error.strerror or str(error)
            hint = ". Free some space and run again." if error.errno in {errno.ENOSPC, errno.EDQUOT} else ""
            _fail(f"{error.filename}: {reason}{hint}" if error.filename else f"{reason}{hint}", 1)
        except (RuntimeError, MemoryError) as error:  # torch's own are of the first kind
            if not isinstance(error, MemoryError) and not re.search("OutOfMemory|can't allocate memory", repr(error)):
                raise
            _fail("out of memory: try a smaller --batch-size, --batch-tokens or model", 1)


def _prepare() -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("once", category=LLMDoctorWarning)
        warnings.showwarning = _warn
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer may hold what the terminal's encoding lacks
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments: refused where it is used


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {message}")


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(clean(message).split())}", file=sys.stderr)
    sys.exit(code)


EXAMPLES = {
    "": ('compare "How can I sleep better?" --seed 5', "profiles show clinic", "train --help"),
    "chat": ("chat", "chat --beta helpful=1.2 --beta safe=0 --temperature 0.7", "chat --profile smollm2"),
    "compare": (
        'compare "How can I sleep better?" --seed 5',
        'compare "How can I sleep better?" --vs beta=0.3 --vs "safe=0 temperature=0.5"',
        'compare "How can I sleep better?" --sweep beta=0:2:0.5 --samples 2',
        "compare --prompts prompts.txt --output answers.jsonl --html page.html",
    ),
    "serve": ("serve", "serve --profile smollm2 --port 8080 --name smollm2"),
    "extract": (
        "extract --limit 8 -o outputs/rewards",
        "extract --patient ./model --data pairs.jsonl --probe --face helpful -o outputs/rewards",
        "extract --data other.jsonl --columns prompt=q,chosen=good,rejected=bad -o outputs/other",
    ),
    "inspect": (
        "inspect outputs/rewards --worst 2",
        "inspect outputs/rewards --diagnose",
        'inspect --prompt "How can I sleep better?" --text "Just sleep." --show gap',
    ),
    "train": (
        "train --rewards outputs/rewards --holdout 0.1 -o outputs/doctor",
        "train --rewards outputs/rewards --doctor org/model-1b -o outputs/doctor",
        "train --rewards outputs/rewards --direction advantage --method head -o outputs/doctor",
    ),
    "shrink": ("shrink --patient ./model --prompts prompts.txt --layers 6 -o outputs/shrunk",),
    "push": ("push outputs/doctor my-name/my-doctor --dry-run", "push outputs/doctor my-name/my-doctor --private"),
    "env": ("env", "env --json"),
}
"""Shown by ``--help``, of every command. The tests run those that need nothing but the embedded models."""


_TRY, _MAKE, _ABOUT = "Ask the guided model", "Make a doctor of your own", "Settings and help"
COMMANDS = {
    "chat": (
        _TRY,
        "Talk with the guided patient, side by side with the patient alone; F1 (or /help) explains the keys.",
    ),
    "compare": (_TRY, "Answer a question without and with the doctors, and show token by token what changed."),
    "serve": (
        _TRY,
        "Serve the guided patient to many clients at once, as OpenAI's API does; alpha and beta per request.",
    ),
    "extract": (
        _MAKE,
        "Score every answer's tokens with the patient's own two faces, or by a probe of its hidden states.",
    ),
    "inspect": (
        _MAKE,
        "Show which tokens of the chosen and the rejected answers are rewarded, and what the rewards add up to.",
    ),
    "train": (_MAKE, "Train a small doctor on a rewards folder."),
    "eval": (_MAKE, "Does my doctor work? On held-out pairs, on prompts, or both."),
    "shrink": (_MAKE, "Make a small model of the patient's first layers, for a patient that has no small sibling."),
    "push": (
        _MAKE,
        "Send a trained doctor with its model card to the Hugging Face hub (log in with `hf auth login` first).",
    ),
    "env": (_ABOUT, "Show what a bug report needs: versions, device, precision, folders. No tokens or keys are shown."),
    "profiles": (
        _ABOUT,
        "List, show, make and check profiles: one YAML file holds every setting of the three stages.",
    ),
}
"""The heading of each in ``--help``, and how its own help begins: to list them none has to be loaded."""


def _listed(name: str) -> TyperCommand:
    panel, summary = COMMANDS[name]
    return TyperCommand(name, help=summary, rich_help_panel=panel)


@cache
def _loaded(name: str) -> Any:
    """The command of this name, from the module of this name."""
    module = import_module(f"llmdoctor.cli.{name}")
    panel, _ = COMMANDS[name]
    group = getattr(module, "app", None)
    if group is None:
        group = typer.Typer(add_completion=False)
        epilog = getattr(module, "EPILOG", "") or examples(*EXAMPLES[name], then=getattr(module, "AFTER_EXAMPLES", ""))
        group.command(name, epilog=epilog)(module.evaluate if name == "eval" else getattr(module, name))
    command: Any = get_command(group)
    command.name, command.rich_help_panel = name, panel
    return command


class _Commands(Mapping[str, Any]):
    def __getitem__(self, name: str) -> Any:
        if name not in COMMANDS:
            raise KeyError(name)
        return _loaded(name)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


app = typer.Typer(
    name="llmdoctor",
    cls=_App,
    help="Align a frozen language model while it generates: a small doctor model steers every token of the patient.",
    epilog=examples(*EXAMPLES[""], then="Every option can be set as LLMDOCTOR_<OPTION>."),
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"llmdoctor {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", "-V", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
    _quiet: Quiet = False,
    _verbose: Verbose = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def run() -> NoReturn:
    """Run the command line and exit; called by ``llmdoctor.__main__``."""
    try:
        app(prog_name="llmdoctor")
    except SystemExit as ended:
        _leave(ended.code)
        raise
    raise AssertionError("the app exits by itself")


def _leave(code: Any) -> None:
    """End the process at once if models still load or speak in a thread of the app's.

    Such a thread cannot be stopped inside a call of torch. When the interpreter is torn down around it, the whole
    process aborts (SIGABRT) in place of exiting with ``code``.
    """
    code = code or 0  # None is 0 too
    if isinstance(code, int) and any(thread.name.startswith("llmdoctor-") for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
