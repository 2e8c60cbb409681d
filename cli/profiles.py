"""``llmdoctor profiles``: the settings that come with the program, and the user's own."""

from pathlib import Path
from typing import Annotated

import typer

from llmdoctor.cli import options
from llmdoctor.cli.every_command import examples
from llmdoctor.cli.options import option
from llmdoctor.cli.terminal import put, put_json, say
from llmdoctor.errors import ProfileError, UsageError

EXAMPLES = (
    "profiles",
    "profiles show clinic --origin",
    "profiles new mine --extends smollm2",
    "profiles check mine",
)
"""Shown by ``--help``; the tests run them."""
EPILOG = examples(*EXAMPLES)

app = typer.Typer(
    help="List, show, make and check profiles: one YAML file holds every setting of the three stages.",
    epilog=EPILOG,
    add_completion=False,
)

_NAME = typer.Argument("clinic", autocompletion=options.complete_profile)


@app.callback(invoke_without_command=True)
def _default(context: typer.Context, as_json: options.Json = False) -> None:
    if context.invoked_subcommand is None:
        list_(as_json=as_json)


@app.command("list", epilog=EPILOG)
def list_(as_json: options.Json = False) -> None:
    """Names and what they are for."""
    from llmdoctor.profile import load_profile, profile_names, profile_path

    about: dict[str, str] = {}
    for name in profile_names():
        try:
            about[name] = load_profile(name).description
        except ProfileError as error:  # one of the user's own, which must not hide the others
            say(f"warning: {error}")
    if as_json:
        put_json([{"name": n, "description": text, "path": str(profile_path(n))} for n, text in about.items()])
        return
    width = max(map(len, about), default=0)
    for name, description in about.items():
        put(f"{name:<{width}}  {description}".rstrip())


@app.command(epilog=EPILOG)
def show(
    name: str = _NAME,
    origin: Annotated[bool, option("--origin", "Say of every setting which file it comes from.")] = False,
    as_json: options.Json = False,
) -> None:
    """Every setting of a profile, defaults included, as YAML that can be saved and changed."""
    import yaml

    from llmdoctor.profile import load_profile, origins

    profile = load_profile(name)
    if origin:
        stated = origins(name)
        settings = _flat(profile.model_dump(mode="json", exclude={"name"}))
        if as_json:
            put_json({key: {"value": value, "from": stated.get(key)} for key, value in settings.items()})
            return
        width = max(map(len, settings))
        for key, value in settings.items():
            shown = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).splitlines()[0]
            put(f"{key:<{width}}  {stated.get(key, 'default')}  {shown}")
        return
    if as_json:
        put_json(profile.model_dump(mode="json"))
        return
    settings = profile.model_dump(mode="json", exclude={"name"})
    put(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110).rstrip())


@app.command(epilog=EPILOG)
def path(name: str = _NAME) -> None:
    """Where a profile's file is."""
    from llmdoctor.profile import profile_path

    put(str(profile_path(name)))


@app.command(epilog=EPILOG)
def new(
    name: Annotated[str, typer.Argument(help="What it is to be called, or a path that ends in .yaml.")],
    extends: Annotated[
        str, option("--extends", "Profile whose settings it takes over (default: clinic).", metavar="NAME")
    ] = "clinic",
) -> None:
    """Start a profile of your own: it goes to the configuration folder, where --profile NAME finds it."""
    from llmdoctor.files import atomic_path, user_path
    from llmdoctor.profile import load_profile, profile_names, profile_path, user_profiles

    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise UsageError(f"expected a name of letters, digits, '_', '.' and '-', or a .yaml file, got {name!r}")
        if name in profile_names():
            raise UsageError(f"there is a profile {name!r} already, {profile_path(name)}: choose another name")
        path = user_profiles() / f"{name}.yaml"
    if path.exists():
        raise UsageError(f"{path} exists already: choose another name")
    known = load_profile(extends)
    other = extends if extends in profile_names() else str(user_path(extends).absolute())
    with atomic_path(path) as temporary:
        temporary.write_text(_NEW.format(other=other, model=known.patient.model), encoding="utf-8")
    say(f"wrote {path}. Change it, then: llmdoctor profiles check {name}")
    put(str(path))


_NEW = """\
# A profile of llmdoctor. It takes over every setting of the one that it extends and states what differs.
# All settings with their values: llmdoctor profiles show {other}
# Where each comes from: llmdoctor profiles show NAME --origin
extends: {other}
description: my own settings

# patient:
#   model: {model}

# decode:
#   alpha: 1.0
#   max_new_tokens: 200
"""


@app.command(epilog=EPILOG)
def check(
    file: Annotated[str, typer.Argument(help="Profile, by its name or path.", autocompletion=options.complete_profile)],
) -> None:
    """Read a profile and say whether anything in it is wrong: keys, values, and folders that are not there."""
    from llmdoctor.files import present, user_path
    from llmdoctor.profile import LOCATIONS, load_profile, profile_path

    for key, place in _flat(load_profile(file).model_dump(mode="json")).items():
        path = str(place) if key.rpartition(".")[2] in LOCATIONS and place else ""
        if path.startswith(("/", "./", "../", "~")) and not present(user_path(path)):
            say(f"warning: {key}: there is nothing at {path}")
    put(f"{profile_path(file)}: all settings are known and in range")


@app.command(epilog=EPILOG)
def schema() -> None:
    """The JSON schema of profiles, for editors that complete and check YAML.

    Save it, and begin a profile with: # yaml-language-server: $schema=FILE
    """
    from llmdoctor.profile import Profile

    made = Profile.model_json_schema()
    made["properties"].pop("name")  # the name of the file
    made["properties"]["extends"] = {"type": "string", "description": "Profile whose settings this one takes over"}
    made["required"] = []  # an extended profile may state them
    put_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **made})


def _flat(settings: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Settings by dotted name."""
    found: dict[str, object] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


@app.command(epilog=EPILOG)
def faces(as_json: options.Json = False) -> None:
    """The ready face pairs that every profile may name: `extract --face NAME`, or `rewards.faces` in a profile."""
    import yaml

    from llmdoctor.profile import library_faces

    library = {name: face.model_dump() for name, face in library_faces().items()}
    if as_json:
        put_json(library)
        return
    put(yaml.safe_dump(library, sort_keys=False, allow_unicode=True, width=150).rstrip())
