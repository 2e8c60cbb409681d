"""What the conversation begins with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmdoctor.sessions import Session, SessionStore
from llmdoctor.settings import Guidance, Sampling, WelcomeSettings
from llmdoctor.show.formats import short_name
from llmdoctor.show.text import one_line

if TYPE_CHECKING:
    from llmdoctor.assistant import LLMdoctor
    from llmdoctor.profile import Profile
    from llmdoctor.serving.client import RemoteDoctor
    from llmdoctor.tui.generation import Assistant


@dataclass(frozen=True)
class Start:
    """``load`` gets a function for lines about progress and returns the models, whose names ``models`` shows.

    ``profile`` is the profile as plain JSON values, to be saved with the conversation. ``seed`` None draws a fresh one
    for every answer, ``session`` None begins a new conversation, ``store`` None is the user's own.
    """

    load: "Callable[[Callable[[str], None]], Assistant]"
    models: str
    guidance: Guidance = field(default_factory=Guidance)
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    profile: Mapping[str, Any] = field(default_factory=dict)
    session: Session | None = None
    store: SessionStore | None = None
    welcome: WelcomeSettings = field(default_factory=WelcomeSettings)

    @property
    def patient(self) -> str:
        """The short name of the patient's model."""
        return short_name(self.profile.get("patient", {}).get("model", "")) or self.models

    @property
    def doctors(self) -> list[str]:
        """The names of the doctors; of one that has no name of its own (it is "doctor" then), its folder's."""
        doctors = self.profile.get("doctors", {})
        return [
            short_name(settings.get("checkpoint", "")) or name if name == "doctor" else name
            for name, settings in doctors.items()
        ]

    @property
    def header(self) -> str:
        """``patient clinic/patient · doctors helpful, safe · profile clinic``."""
        named = {"doctor" if len(self.doctors) == 1 else "doctors": ", ".join(self.doctors) or "none"}
        where = {"at": self.profile.get("server"), "profile": self.profile.get("name")}
        shown = {"patient": self.patient, **named, **where}
        return one_line(" · ".join(f"{what} {name}" for what, name in shown.items() if name))


def start_of(
    profile: "Profile",
    *,
    seed: int | None = None,
    session: Session | None = None,
    store: SessionStore | None = None,
    trust_remote_code: bool = False,
    remote: "RemoteDoctor | None" = None,
) -> Start:
    """A start with the models and settings of a profile. Loading them is left to the app, which shows its progress.

    With ``remote`` they are a server's, and there is nothing to load.
    """
    models = " + ".join(part for part in (short_name(profile.patient.model), ", ".join(profile.doctors)) if part)

    def load(progress: Callable[[str], None]) -> "LLMdoctor | RemoteDoctor":
        if remote is not None:
            return remote
        # Both bring torch: it is imported in the app's thread, so that the screen is up before it.
        from llmdoctor.assistant import LLMdoctor
        from llmdoctor.models import spare_threads

        progress(f"loading {models} ...")
        assistant = LLMdoctor.from_profile(profile, trust_remote_code=trust_remote_code)
        spare_threads(assistant.patient.model)
        return assistant

    return Start(
        load=load,
        models=models,
        guidance=profile.decode.guidance(profile.doctors),
        sampling=profile.decode.sampling(),
        seed=seed,
        profile=profile.model_dump(mode="json") | ({"server": remote.url} if remote is not None else {}),
        session=session,
        store=store,
        welcome=profile.welcome,
    )
