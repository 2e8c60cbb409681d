"""What can go wrong, by who has to act. Each message says what was expected, what was got, and what to do."""


class LLMDoctorError(Exception):
    """Something the user can understand and mend. ``exit_code`` is what the command line ends with."""

    exit_code = 1


class UsageError(LLMDoctorError):
    """A setting or option out of range, or a combination that makes no sense."""

    exit_code = 2


class DataError(LLMDoctorError):
    """Input data that is missing, empty, or not in a known shape."""

    exit_code = 2


class ProfileError(LLMDoctorError):
    """A profile that does not exist, does not parse, or has an unknown key."""

    exit_code = 2


class LoadError(LLMDoctorError):
    """A model, doctor or rewards folder that cannot be loaded or does not fit the others."""

    exit_code = 3


class VocabularyError(LoadError):
    """Patient and doctor do not share the token-to-id map."""


class StorageError(LLMDoctorError):
    """A file could not be written (disk full, no permission)."""


class TrainingError(LLMDoctorError):
    """Training had to stop: the loss is not a number, or has exploded."""


class LLMDoctorWarning(UserWarning):
    """Something that works, but not in the way that was asked for."""
