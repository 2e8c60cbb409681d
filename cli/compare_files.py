"""What ``compare`` writes beside the screen: answers as they finish, and the files of AlpacaEval and MT-Bench."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmdoctor.errors import UsageError
from llmdoctor.files import storage_errors
from llmdoctor.harmless import json_text

if TYPE_CHECKING:
    from llmdoctor.comparing import Key, Run, Timed
    from llmdoctor.profile import Profile


def kept_answers(path: Path, command: str, seed: int | None) -> "tuple[dict[Key, Timed], int | None]":
    """The answers that a stopped run of the same command left in its ``--output``, and the seed they have.

    There are none if there is no such file. A line that was cut by the stop is removed from the file. Raises UsageError
    for the file of another command or another ``seed``.
    """
    from llmdoctor.comparing import Key
    from llmdoctor.files import is_stream
    from llmdoctor.records import Answer

    if not path.exists() or is_stream(path):
        return {}, seed
    found: dict[Key, Timed] = {}
    whole = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                data = json.loads(line)
                theirs, run_seed = data["command"], data["run_seed"]
                key = Key(data["column"], data["question"], data["sample"], data["turn"])
                timed = Answer.from_dict(data["answer"]), data["seconds"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if line.endswith(b"\n"):
                    raise UsageError(f"{path} was not written by compare --output: give another file") from error
                break
            if theirs != command:
                raise UsageError(f"{path} holds answers of another command: give another --output, or remove it")
            if seed not in (None, run_seed):
                raise UsageError(
                    f"{path} holds answers of seed {run_seed}, not {seed}: give another --output, or that seed"
                )
            seed, found[key] = run_seed, timed
            whole += len(line)
    with path.open("r+b") as file:
        file.truncate(whole)
    return found, seed


def weights_of(profile: "Profile") -> list[str]:
    """What tells the patient and the doctors of a profile from others that were at the same places before."""
    from llmdoctor.errors import LoadError
    from llmdoctor.model_source import doctor_fingerprint, model_fingerprint

    found = [doctor_fingerprint(doctor.checkpoint) for doctor in profile.doctors.values()]
    with suppress(LoadError):  # a model of the hub that is not here yet
        found.append(model_fingerprint(profile.patient.model))
    return found


def put_answer(
    path: Path, file: IO[str], run: "Run", key: "Key", timed: "Timed", settings: Mapping[str, Any], command: str
) -> None:
    """One line of ``--output``, on the disk before the next answer is finished. Raises StorageError."""
    question = run.questions[key.question - 1]
    line = {
        "id": question.id,
        **key._asdict(),
        "prompt": question.turns[key.turn - 1],
        "settings": dict(settings),
        "answer": timed[0].to_dict(),
        "seconds": timed[1],
        "run_seed": run.seed,
        "command": command,
    }
    with storage_errors(path):
        file.write(json_text(line) + "\n")
        file.flush()


def fingerprint(command: Mapping[str, Any]) -> str:
    """What tells one command from another in the lines of ``--output``."""
    return hashlib.sha256(json.dumps(command, sort_keys=True).encode()).hexdigest()[:16]


def alpaca_eval_files(run: "Run", columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and content of AlpacaEval's ``model_outputs``, a file per column: first turns and first samples."""
    for column in columns:
        rows = [
            {
                "instruction": _text(run.questions[key.question - 1].turns[0]),
                "output": run.known[key][0].text.strip(),
                "generator": column,
                "dataset": run.questions[key.question - 1].fields.get("dataset", "llmdoctor"),
            }
            for key in run.keys(column)
            if key.turn == key.sample == 1
        ]
        yield f"{_file_name(column)}.json", json_text(rows, indent=1) + "\n"


def mt_bench_files(run: "Run", columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and content of FastChat's ``model_answer``, a file per column: a line per question, a choice per sample."""
    for column in columns:
        said: dict[int, dict[int, list[str]]] = {}
        for key in run.keys(column):
            turns = said.setdefault(key.question, {}).setdefault(key.sample, [])
            turns.append(run.known[key][0].text.strip())
        lines = [
            {
                "question_id": run.questions[number - 1].fields.get("question_id", run.questions[number - 1].id),
                "answer_id": hashlib.sha256(json.dumps([column, number, choices]).encode()).hexdigest()[:22],
                "model_id": column,
                "choices": [{"index": i, "turns": turns} for i, turns in enumerate(choices.values())],
                "tstamp": time.time(),
            }
            for number, choices in said.items()
        ]
        yield f"{_file_name(column)}.jsonl", "".join(json_text(line) + "\n" for line in lines)


EXPORTS: Mapping[str, Callable[["Run", Sequence[str]], Iterator[tuple[str, str]]]] = {
    "alpaca_eval": alpaca_eval_files,
    "mt_bench": mt_bench_files,
}


def _file_name(column: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", column).strip("_")


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
