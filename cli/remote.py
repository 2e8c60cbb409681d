"""``--server``: the models of `llmdoctor serve` in place of one's own."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from llmdoctor.cli import options
from llmdoctor.cli.compare_columns import Models, Plan
from llmdoctor.cli.options import option
from llmdoctor.cli.terminal import waiting
from llmdoctor.errors import UsageError
from llmdoctor.settings import DecodeSettings
from llmdoctor.show.text import one_line

if TYPE_CHECKING:
    from llmdoctor.cli.kept_run import KeptRun
    from llmdoctor.comparing import Column
    from llmdoctor.profile import Profile
    from llmdoctor.serving.client import RemoteDoctor

Server = Annotated[
    str | None,
    option("--server", "Ask the models of an `llmdoctor serve` elsewhere; none are loaded here.", metavar="URL"),
]
ApiKey = Annotated[
    str | None, option("--api-key", "Key of that server; better set as LLMDOCTOR_API_KEY.", metavar="KEY")
]
_OWN = {"beta", *DecodeSettings.model_fields} - {"speculation", "draft_model"}  # what a client may ask for


def connect(
    url: str, api_key: str | None, guided: Mapping[str, Any], *, trust_remote_code: bool = False
) -> "RemoteDoctor":
    """The models of the server at ``url``. Raises UsageError for options about models in the `GuidedOptions` group."""
    given = {**guided, "trust_remote_code": trust_remote_code or None}
    about_models = [name for name, value in given.items() if name not in _OWN and value not in (None, [])]
    if wrong := [f"--{name.replace('_', '-')}" for name in about_models]:
        raise UsageError(f"--server: the models are the server's: leave out {', '.join(wrong)} (or unset its variable)")
    from llmdoctor.serving.client import RemoteDoctor

    with waiting(f"Connecting to {one_line(url)} ..."):
        return RemoteDoctor(url, api_key)


def settings_on(profile: "Profile", guided: Mapping[str, Any]) -> "Profile":
    """The profile of a server, overridden by the options of a `GuidedOptions` group."""
    from llmdoctor.profile import override

    strengths = options.parse_betas(guided["beta"] or (), tuple(profile.doctors))
    doctors = {name: override(doctor, beta=strengths.get(name)) for name, doctor in profile.doctors.items()}
    decode = {name: value for name, value in guided.items() if name in DecodeSettings.model_fields}
    return profile.model_copy(update={"doctors": doctors, "decode": override(profile.decode, **decode)})


class RemoteModels(Models):
    """The columns of ``compare`` on a server, where nothing has to be loaded.

    Raises UsageError for a column that needs others than the server's.
    """

    def __init__(self, plans: Sequence[Plan], remote: "RemoteDoctor") -> None:
        super().__init__(plans, trust_remote_code=False)
        self._remote = remote
        for plan in plans:
            if _models(plan.profile) != _models(remote.profile):
                wanted = "settings like beta=2, no doctor, profile or system_prompt"
                raise UsageError(f"--vs: a server has its own models: expected {wanted}, got {plan.name!r}")

    def columns(self, plans: Sequence[Plan], kept: "KeptRun", *, silent: bool = False) -> "list[Column]":
        """The plans as columns that the server answers."""
        del silent
        columns = [plan.column(self._remote) for plan in plans]
        kept.begin(columns)
        return columns


def _models(profile: "Profile") -> tuple[object, ...]:
    return profile.patient, [(name, doctor.checkpoint, doctor.base) for name, doctor in profile.doctors.items()]
