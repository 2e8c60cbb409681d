"""Exceptions. Each message says in one line what was expected, what was found, and what to do."""


class LLMDoctorError(Exception):
    """The base of all errors that a user can understand and fix. ``exit_code`` is the command line's exit status."""

    exit_code = 1


class UsageError(LLMDoctorError):
    """A setting or option is out of range, or a combination of them makes no sense."""

    exit_code = 2


class DataError(LLMDoctorError):
    """Input data is missing, empty, or in no known format."""

    exit_code = 2


class ProfileError(LLMDoctorError):
    """A profile does not exist, does not parse, or has an unknown key."""

    exit_code = 2


class LoadError(LLMDoctorError):
    """A model, doctor or rewards folder cannot be loaded, or does not fit the others."""

    exit_code = 3


class VersionError(LoadError):
    """A file was written by a later llmdoctor, in a form that this one does not know."""


class VocabularyError(LoadError):
    """Patient and doctor do not share a token-to-id map."""


class StorageError(LLMDoctorError):
    """A file cannot be written (disk full, no permission)."""


class TrainingError(LLMDoctorError):
    """Training stopped because the loss is not a number, or has exploded."""


class LLMDoctorWarning(UserWarning):
    """Something works, but not the way it was asked for."""
