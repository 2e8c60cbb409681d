"""Errors to exit codes, help without torch, and the other ends of the program."""

import errno
import os
import subprocess
import sys

import pytest
from conftest_cli import Run, fails

import llmdoctor
from llmdoctor.cli import options
from llmdoctor.errors import (
    DataError,
    LLMDoctorError,
    LoadError,
    ProfileError,
    StorageError,
    TrainingError,
    UsageError,
    VocabularyError,
)

COMMANDS = ["", "extract", "train", "chat", "compare", "inspect", "profiles", "profiles list", "profiles show"]


def raising(error: BaseException) -> object:
    def load(_name: object) -> None:
        raise error

    return load
