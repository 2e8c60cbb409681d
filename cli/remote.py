"""``--server``: the models of `llmdoctor serve` in place of one's own."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from llmdoctor.cli import options
from llmdoctor.cli.options import option
from llmdoctor.cli.terminal import waiting
from llmdoctor.errors import UsageError
from llmdoctor.show.text import one_line

if TYPE_CHECKING:
    from llmdoctor.profile import Profile
    from llmdoctor.serving.client import RemoteDoctor

Server = Annotated[
    str | None,
    option("--server", "Ask the models of an `llmdoctor serve` elsewhere; none are loaded here.", metavar="URL"),
]
ApiKey = Annotated[
    str | None, option("--api-key", "Key of that server; better set as LLMDOCTOR_API_KEY.", metavar="KEY")
]
_LOADING = ("speculation", "draft_model")  # settings of stage 3 that are the server's


def connect(url: str, api_key: str | None, *, decode: Mapping[str, Any], **given: Any) -> "RemoteDoctor":
    """The models of the server at ``url``. Raises UsageError for options about models that were ``given``."""
    given |= {name: decode[name] for name in _LOADING}
    if wrong := [f"--{name.replace('_', '-')}" for name, value in given.items() if value not in (None, [])]:
        raise UsageError(f"--server: the models are the server's: leave out {', '.join(wrong)} (or unset its variable)")
    from llmdoctor.serving.client import RemoteDoctor

    with waiting(f"Connecting to {one_line(url)} ..."):
        return RemoteDoctor(url, api_key)


def settings_on(profile: "Profile", *, betas: Sequence[str] | None, decode: Mapping[str, Any]) -> "Profile":
    """The profile of a server, overridden by the options of ``chat`` and ``compare``."""
    from llmdoctor.profile import override

    strengths = options.parse_betas(betas or (), tuple(profile.doctors))
    doctors = {name: override(doctor, beta=strengths.get(name)) for name, doctor in profile.doctors.items()}
    return profile.model_copy(update={"doctors": doctors, "decode": override(profile.decode, **decode)})
