"""``llmdoctor profiles``: the settings that come with the program."""

import typer

from llmdoctor.cli import options
from llmdoctor.cli.terminal import put, put_json

app = typer.Typer(help="List and show profiles: one YAML file holds every setting of the three stages.")


@app.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_()


@app.command("list")
def list_(as_json: options.Json = False) -> None:
    """Names and what they are for."""
    from llmdoctor.profile import load_profile, profile_names, profile_path

    profiles = [load_profile(name) for name in profile_names()]
    if as_json:
        put_json([{"name": p.name, "description": p.description, "path": str(profile_path(p.name))} for p in profiles])
        return
    width = max((len(profile.name) for profile in profiles), default=0)
    for profile in profiles:
        put(f"{profile.name:<{width}}  {profile.description}".rstrip())


@app.command()
def show(name: str = typer.Argument("clinic"), as_json: options.Json = False) -> None:
    """Every setting of a profile, defaults included, as YAML that can be saved and changed."""
    import yaml

    from llmdoctor.profile import load_profile

    profile = load_profile(name)
    if as_json:
        put_json(profile.model_dump(mode="json"))
        return
    settings = profile.model_dump(mode="json", exclude={"name"})
    put(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110).rstrip())


@app.command()
def path(name: str = typer.Argument("clinic")) -> None:
    """Where a profile's file is."""
    from llmdoctor.profile import profile_path

    put(str(profile_path(name)))


@app.command()
def faces(as_json: options.Json = False) -> None:
    """The ready face pairs that every profile may name: `extract --face NAME`, or `rewards.faces` in a profile."""
    import yaml

    from llmdoctor.profile import library_faces

    library = {name: face.model_dump() for name, face in library_faces().items()}
    if as_json:
        put_json(library)
        return
    put(yaml.safe_dump(library, sort_keys=False, allow_unicode=True, width=150).rstrip())
