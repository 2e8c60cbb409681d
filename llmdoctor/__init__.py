"""Align a frozen language model (the patient) while it generates: a small doctor model steers every token.

>>> from llmdoctor import LLMdoctor                    # doctest: +SKIP
>>> doctor = LLMdoctor.from_profile("clinic")           # doctest: +SKIP
>>> print(doctor.generate("How can I sleep better?"))   # doctest: +SKIP

Names are imported on first use (PEP 562), so that ``import llmdoctor`` is fast and does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LLMdoctor": "assistant",
    "Comparison": "records",
    "Guidance": "settings",
    "GuidedToken": "records",
    "LLMDoctorError": "errors",
    "PreferencePair": "records",
    "Sampling": "settings",
    "PrefixCache": "decoding.prefix",
    "TokenRewards": "records",
}
__all__ = [*_HOME, "__version__"]  # noqa: PLE0604

if TYPE_CHECKING:
    from llmdoctor.assistant import LLMdoctor as LLMdoctor
    from llmdoctor.decoding.prefix import PrefixCache as PrefixCache
    from llmdoctor.errors import LLMDoctorError as LLMDoctorError
    from llmdoctor.records import Comparison as Comparison
    from llmdoctor.records import GuidedToken as GuidedToken
    from llmdoctor.records import PreferencePair as PreferencePair
    from llmdoctor.records import TokenRewards as TokenRewards
    from llmdoctor.settings import Guidance as Guidance
    from llmdoctor.settings import Sampling as Sampling


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"llmdoctor.{_HOME[name]}"), name)
    raise AttributeError(f"module 'llmdoctor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
