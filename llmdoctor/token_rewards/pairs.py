"""Preference pairs and prompts, streamed from files and hub data sets."""

import json
import random
import tempfile
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from llmdoctor.errors import DataError
from llmdoctor.records import Message, PairShape, PreferencePair, Question, SkippedRecord
from llmdoctor.token_rewards.shapes import NAME_THEM, NEEDED, merged, shapes, to_pair, to_question
from llmdoctor.token_rewards.sources import SUFFIXES, Unusable, local_path, records, suffix, text_lines

_GIVE_UP_AFTER = 1000  # unusable records at the start: a wrong data set should not be read to its end


def read_pairs(
    source: str | Path,
    *,
    split: str = "train",
    label: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    strict: bool = False,
    on_skip: Callable[[SkippedRecord], None] | None = None,
    on_shape: Callable[[PairShape], None] | None = None,
) -> Iterator[PreferencePair]:
    """Stream the preference pairs of a file or a hub data set.

    Files are ``.jsonl``, ``.json``, ``.parquet``, ``.csv`` or ``.tsv`` (these two with a header row), plain or ``.gz``.
    How a record holds a pair is recognised by its columns, and each such shape goes to ``on_shape`` before its first
    pair. ``columns`` maps chosen, rejected and, where they are, prompt and system to the names of columns instead.
    ``label`` names the column that holds 0 or 1, the better of response_0 and response_1 (other shapes ignore it);
    ``limit`` counts usable pairs. A record that cannot be used goes to ``on_skip``. A pair's id is the line of its
    record; consecutive rows that are one pair (HelpSteer2) count as one record, whose line is that of the first.

    Raises DataError for a source that cannot be read, that holds nothing usable or, when ``strict``, one record that
    cannot be used.
    """
    skipped: list[SkippedRecord] = []
    usable = 0
    known = shapes(label, columns)
    met: set[str] = set()
    for line, record in merged(records(source, split), known):
        if usable == limit:
            return
        try:
            pair, shape = to_pair(str(line), record, known)
        except Unusable as reason:
            skip = SkippedRecord(line, str(reason))
            if strict:
                advice = "Mend or remove the record, or run without --strict"
                raise DataError(f"{source}, line {line}: {reason}. {advice}.") from None
            if usable == 0:  # held back: if nothing is usable, one error says so instead of a thousand notes
                skipped.append(skip)
                if len(skipped) == _GIVE_UP_AFTER:
                    break
            elif on_skip:
                on_skip(skip)
            continue
        if usable == 0 and on_skip:
            for skip in skipped:
                on_skip(skip)
        if on_shape and shape.name not in met:
            on_shape(shape)
        met.add(shape.name)
        usable += 1
        yield pair
    if usable == 0:
        raise _nothing_usable(source, skipped)


def shuffled(pairs: Iterable[PreferencePair], seed: int) -> Iterator[PreferencePair]:
    """All of ``pairs`` in an order that ``seed`` decides, each order as likely as any other.

    They are all read first and kept in a temporary file; memory holds a few bytes per pair.
    """
    with tempfile.TemporaryFile() as waiting:
        starts = array("Q")
        for pair in pairs:
            starts.append(waiting.tell())
            waiting.write(json.dumps([pair.id, pair.prompt, pair.chosen, pair.rejected]).encode() + b"\n")
        random.Random(seed).shuffle(starts)
        for start in starts:
            waiting.seek(start)
            id, prompt, chosen, rejected = json.loads(waiting.readline())
            yield PreferencePair(id, tuple(prompt), chosen, rejected)


def _nothing_usable(source: str | Path, skipped: list[SkippedRecord]) -> DataError:
    if not skipped:
        return DataError(f"{source} is empty: expected preference pairs ({NEEDED})")
    reasons = {skip.reason: skip.line for skip in reversed(skipped)}
    first = sorted((line, reason) for reason, line in reasons.items())[:3]
    quoted = "; ".join(f"line {line}: {reason}" for line, reason in first)
    return DataError(
        f"{source}: no usable record in its first {len(skipped)} ({quoted}). Expected {NEEDED}: for other "
        f"columns, {NAME_THEM}"
    )


def read_questions(
    path: str | Path,
    *,
    name: str | None = None,
    used: Collection[str] = (),
    on_note: Callable[[str], None] | None = None,
) -> list[Question]:
    """What a file asks: a text file, one question per line, or records, in any of the forms of `read_pairs`' files.

    A record is a text, a conversation, or an object whose column ``prompt``, ``turns``, ``instruction``, ``messages``
    or the like holds one; of preference pairs the prompt is taken. Records that cannot be used are skipped. An id that
    comes again gets a number: ``7``, ``7#2``. ``on_note`` gets one line about what was skipped, and one if columns are
    not used, except for those that the caller says it ``used``. ``name`` is what messages call the file. Raises
    DataError for a file that is absent, damaged or without anything usable.
    """
    called = name or str(path)
    file = local_path(path)
    if file is None or file.is_dir():
        raise DataError(f"no file at {called}: expected prompts, one per line, or a .jsonl, .json or .csv file")
    questions: list[Question] = []
    skipped: list[SkippedRecord] = []
    unused: dict[str, None] = {}
    if suffix(file) in SUFFIXES:
        known = shapes(None, None)
        for line, record in records(file, split="train"):
            try:
                question, rest = to_question(line, record, known)
            except Unusable as reason:
                skipped.append(SkippedRecord(line, str(reason)))
                continue
            questions.append(question)
            unused.update(dict.fromkeys(column for column in rest if column not in used))
    else:
        questions += (Question(str(line), (text,)) for line, text in enumerate(text_lines(file), start=1))
    first = f"line {skipped[0].line}: {skipped[0].reason}" if skipped else ""
    if not questions and skipped:
        raise DataError(f"{called}: no usable record among its {len(skipped)} ({first})")
    if not questions:
        raise DataError(f"{called} is empty: expected at least one prompt")
    if skipped and on_note:
        on_note(f"{called}: skipped {len(skipped)} of {len(skipped) + len(questions)} records ({first})")
    if unused and on_note:
        turns = sum(len(question.turns) for question in questions)
        asked = f"{len(questions)} prompt{'s' if len(questions) > 1 else ''}"
        asked += f" with {turns} turns in all" if turns > len(questions) else ""
        on_note(f"{called}: {asked}; not used: {', '.join(unused)}")
    return _told_apart(questions)


def _told_apart(questions: Iterable[Question]) -> list[Question]:
    """The questions, each with an id of its own."""
    met: set[str] = set()
    apart = []
    for question in questions:
        id, number = question.id, 1
        while id in met:
            number += 1
            id = f"{question.id}#{number}"
        met.add(id)
        apart.append(replace(question, id=id))
    return apart


def read_prompts(path: str | Path, *, on_note: Callable[[str], None] | None = None) -> list[str | list[Message]]:
    """The first turns of `read_questions`."""
    return [question.turns[0] for question in read_questions(path, on_note=on_note)]
