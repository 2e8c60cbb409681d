"""The versions that pyproject.toml allows are the ones that are tested: constraints.txt and constraints-oldest.txt."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
REQUIREMENTS = [
    Requirement(line)
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
]


def pinned(name: str) -> dict[str, Version]:
    """{package: version} of a constraints file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    parts = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in parts}


def bounds(requirement: Requirement, operator: str) -> list[Version]:
    return [Version(part.version) for part in requirement.specifier if part.operator == operator]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_the_oldest_version_is_the_lower_bound_and_the_pinned_one_is_allowed(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    assert bounds(requirement, ">=") == [pinned("constraints-oldest.txt")[name]]
    assert pinned("constraints.txt")[name] in requirement.specifier


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_the_upper_bound_is_the_minor_release_after_the_pinned_one(name: str) -> None:
    (requirement,) = (requirement for requirement in REQUIREMENTS if requirement.name == name)
    tested = pinned("constraints.txt")[name]
    assert bounds(requirement, "<") == [Version(f"{tested.major}.{tested.minor + 1}")]
