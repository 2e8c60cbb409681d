"""The forms in which ``compare`` gives what it found, and the files of AlpacaEval and MT-Bench."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdoctor.cli.terminal import write_file
from llmdoctor.harmless import json_text

if TYPE_CHECKING:
    from llmdoctor.comparing import Run


@dataclass(frozen=True)
class Forms:
    """What is asked for: JSON on stdout, pages, and by kind the folder of files for other programs."""

    as_json: bool
    jsonl: bool
    html: Path | None
    svg: Path | None
    markdown: Path | None
    exports: Mapping[str, Path | None]

    @property
    def pages(self) -> bool:
        """Whether there is a page or picture to write."""
        return bool(self.html or self.svg or self.markdown)

    @property
    def text(self) -> bool:
        """Whether nothing was asked for, so that answers are printed."""
        return not (self.as_json or self.jsonl or self.pages or any(self.exports.values()))

    def export(self, run: "Run", columns: Sequence[str]) -> None:
        """Write the files for other programs, where they are asked for."""
        for kind, folder in self.exports.items():
            for name, content in EXPORTS[kind](run, columns) if folder is not None else ():
                write_file(Path(folder or ".") / name, content)


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
