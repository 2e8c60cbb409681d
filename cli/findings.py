"""What extract and inspect say of a whole rewards folder: whether its faces work, and the diagnosis."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdoctor.cli import charts
from llmdoctor.cli.terminal import console, decorated, progress, put, say
from llmdoctor.errors import DataError, UsageError

if TYPE_CHECKING:
    from llmdoctor.records import PairScores
    from llmdoctor.settings import RewardSettings
    from llmdoctor.token_rewards.diagnosis import Diagnosis
    from llmdoctor.token_rewards.folder import RewardsFolder
    from llmdoctor.token_rewards.summary import FaceDifference


@dataclass(frozen=True, slots=True)
class Findings:
    """How much the faces differ, and which behaviours the labels reward (None where there are too few pairs)."""

    differences: "tuple[FaceDifference, ...]"
    diagnosis: "Diagnosis | None"

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` says of them."""
        return {
            "face_differences": [difference.as_dict() for difference in self.differences],
            "diagnosis": self.diagnosis and self.diagnosis.as_dict(),
        }

    def show(self) -> None:
        """The diagnosis on stdout."""
        if self.diagnosis is None:
            return
        if decorated(sys.stdout):
            screen = console(sys.stdout)
            screen.print()
            screen.print(charts.rich_diagnosis(self.diagnosis, screen.width))
        else:
            put("\n" + charts.plain_diagnosis(self.diagnosis))


def find(rewards: "RewardsFolder", settings: "RewardSettings", faces: Sequence[str] | None = None) -> Findings:
    """The findings over ``faces``, or over every face pair of the folder. Warns of faces that hardly differ.

    Of several processes only the first reads the folder; the others return empty findings.
    """
    from llmdoctor.token_rewards.diagnosis import diagnose
    from llmdoctor.token_rewards.summary import FaceDifferences

    if os.environ.get("RANK", "0") != "0":
        return Findings((), None)
    names = tuple(faces) if faces else rewards.signals
    counted = FaceDifferences([name for name in names if name in rewards.faces])
    diagnosis = None
    with progress("Diagnosing", len(rewards), "pair") as advance:

        def pairs() -> "Iterator[PairScores]":
            for pair in rewards:
                counted.add(pair)
                advance()
                yield pair

        if len(rewards) > 1:
            diagnosis = diagnose(pairs(), names, settings.model_copy(update={"faces": None}))
        else:
            list(pairs())
    differences = counted.result()
    warn(differences)
    return Findings(differences, diagnosis)


def after_extraction(folder: Path, settings: "RewardSettings") -> Findings:
    """`find` for a folder just written. A diagnosis that fails is only a warning: the rewards are there."""
    from llmdoctor.token_rewards.folder import RewardsFolder
    from llmdoctor.token_rewards.summary import face_differences

    rewards = RewardsFolder(folder)
    try:
        return find(rewards, settings)
    except (DataError, UsageError) as error:
        say(f"warning: no diagnosis: {error}")
    differences = face_differences(rewards, rewards.faces)
    warn(differences)
    return Findings(differences, None)


def warn(differences: "Sequence[FaceDifference]") -> None:
    """Say on stderr which face pairs hardly differ on this patient, with the figure and what to change."""
    from llmdoctor.token_rewards.summary import HARDLY

    for face in differences:
        if face.hardly:
            say(
                f"warning: the two faces of {face.name!r} hardly differ on this patient: root mean square gap "
                f"{face.rms_gap:.3f} nats per token, below {HARDLY:g}. What it rewards is mostly noise. Word the two "
                "faces as opposites, choose others (--face), or take a patient that follows system prompts (larger, "
                "or tuned on instructions)"
            )
