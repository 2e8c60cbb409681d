"""What ``compare`` writes beside the screen: answers as they come, and the files of AlpacaEval and MT-Bench."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmdoctor.cli.terminal import say
from llmdoctor.errors import UsageError
from llmdoctor.harmless import finite, json_text

if TYPE_CHECKING:
    from llmdoctor.records import Comparison, Question


def kept_answers(path: Path, command: Mapping[str, Any]) -> "list[Comparison]":
    """The comparisons that a stopped run of the same command left in its ``--output``; none if there is no such file.

    A line that was cut by the stop is removed from the file. Raises UsageError for the file of another command.
    """
    from llmdoctor.files import is_stream
    from llmdoctor.records import Comparison

    if not path.exists() or is_stream(path):
        return []
    found, whole = [], 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                data = json.loads(line)
                if data.pop("command") != json.loads(json.dumps(command)):
                    raise UsageError(f"{path} holds answers of another command: give another --output, or remove it")
                found.append(Comparison.from_dict(data))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if line.endswith(b"\n"):
                    raise UsageError(f"{path} was not written by compare --output: give another file") from error
                break
            whole += len(line)
    with path.open("r+b") as file:
        file.truncate(whole)
    if found:
        say(f"{path}: going on after {len(found)} answers")
    return found


def put_answer(file: IO[str], comparison: "Comparison", command: Mapping[str, Any]) -> None:
    """One line of ``--output``, on the disk before the next one is asked for."""
    file.write(json_text(finite({**comparison.to_dict(), "command": command})) + "\n")
    file.flush()


def alpaca_eval_files(
    comparisons: "Sequence[Comparison]", questions: "Mapping[str, Question]"
) -> Iterator[tuple[str, str]]:
    """Name and content of AlpacaEval's ``model_outputs``, a file per side: first turns and first samples."""
    for side in ("patient", "guided"):
        rows = [
            {
                "instruction": _text(one.prompt),
                "output": getattr(one, side).text.strip(),
                "generator": side,
                "dataset": questions[one.id].fields.get("dataset", "llmdoctor"),
            }
            for one in comparisons
            if one.turn == one.sample == 1
        ]
        yield f"{side}.json", json_text(rows, indent=1) + "\n"


def mt_bench_files(
    comparisons: "Sequence[Comparison]", questions: "Mapping[str, Question]"
) -> Iterator[tuple[str, str]]:
    """Name and content of FastChat's ``model_answer``, one file per side: a line per question, a choice per sample."""
    for side in ("patient", "guided"):
        choices: dict[str, dict[int, list[str]]] = {}
        for one in comparisons:
            choices.setdefault(one.id, {}).setdefault(one.sample, []).append(getattr(one, side).text.strip())
        lines = [
            {
                "question_id": questions[id].fields.get("question_id", id),
                "answer_id": hashlib.sha256(json.dumps([side, id, said]).encode()).hexdigest()[:22],
                "model_id": side,
                "choices": [{"index": i, "turns": turns} for i, turns in enumerate(said.values())],
                "tstamp": time.time(),
            }
            for id, said in choices.items()
        ]
        yield f"{side}.jsonl", "".join(json_text(line) + "\n" for line in lines)


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
