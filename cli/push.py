"""``llmdoctor push``: a doctor folder to the hub."""

from pathlib import Path
from typing import Annotated

import typer

from llmdoctor.cli import options
from llmdoctor.cli.options import option
from llmdoctor.cli.terminal import put, put_json, waiting


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Doctor folder that train wrote.", autocompletion=options.complete_doctor
        ),
    ],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where it goes on the Hugging Face hub.")],
    private: Annotated[bool, option("--private", "Only you and your organisation can see it.")] = False,
    dry_run: Annotated[bool, option("--dry-run", "Show the files and the model card, and send nothing.")] = False,
    as_json: options.Json = False,
) -> None:
    """Send a trained doctor with its model card to the Hugging Face hub (log in with `hf auth login` first)."""
    from llmdoctor.files import user_path
    from llmdoctor.training.publish import files_of, push_to_hub, require_name

    files = files_of(folder)
    require_name(repository)
    if dry_run:
        card = (user_path(folder) / "README.md").read_text(encoding="utf-8", errors="replace")
        if as_json:
            put_json({"repository": repository, "files": files, "card": card})
            return
        put(f"would send to {repository}:")
        put("\n".join(f"{size:>14,} bytes  {name}" for name, size in files.items()))
        put(f"\nREADME.md, the model card:\n\n{card}")
        return
    with waiting(f"Sending {folder} ..."):
        address = push_to_hub(folder, repository, private=private)
    if as_json:
        put_json({"repository": repository, "address": address, "files": files})
    else:
        put(f"sent {len(files)} files: {address}")
