"""Comparisons of many questions: several turns, several samples, in batches, and from any place on."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from llmdoctor.records import Answer, Comparison, GuidedToken, Message, Question, Speaker
from llmdoctor.settings import Guidance, Sampling

if TYPE_CHECKING:
    from llmdoctor.assistant import LLMdoctor

OnToken = Callable[[Speaker, GuidedToken], None]
Said = list[tuple[Answer, float]]  # the answers of one conversation, turn after turn, and their seconds


def compared(
    assistant: "LLMdoctor",
    questions: Sequence[Question],
    *,
    seed: int,
    samples: int = 1,
    skip: int = 0,
    rows: int = 32,
    top: int = 0,
    on_token: OnToken | None = None,
    guidances: Sequence[Guidance] = (),
    **sampling: Any,
) -> Iterator[Comparison]:
    """The patient alone beside the guided patient: a comparison per turn of every question and sample, in this order.

    ``guidances`` replace the assistant's own: every conversation is then compared with each of them in turn. What the
    patient says alone is decoded once for all.

    Sample i of a question has seed + i. Each side has a conversation of its own: its second turn follows its own first
    answer. ``rows`` conversations are decoded together; what is said does not depend on it. The first ``skip``
    comparisons are left out, those of whole conversations without answering them. The seconds of an answer are those of
    its batch divided by the answers in it.
    """
    # One snapshot for all: the record states the settings, so they must not change on the way.
    guidances, how = guidances or [assistant.guidance], assistant.sampling.replace(**sampling, seed=None)
    planned = [(question, seed + sample) for question, sample in product(questions, range(samples))]
    begin = 0
    while begin < len(planned) and skip >= (count := len(guidances) * len(planned[begin][0].turns)):
        skip -= count
        begin += 1
    for start in range(begin, len(planned), rows):
        chunk = planned[start : start + rows]
        alone = _conversations(assistant, chunk, None, how, top, on_token)
        guided = [_conversations(assistant, chunk, guidance, how, top, on_token) for guidance in guidances]
        for row, (question, own) in enumerate(chunk):
            for guidance, said in zip(guidances, guided, strict=True):
                described = guidance.to_dict() | how.replace(seed=own).model_dump()
                turns = zip(question.turns, alone[row], said[row], strict=True)
                for turn, (asked, one, other) in enumerate(turns, start=1):
                    if skip:
                        skip -= 1
                        continue
                    metrics = _metrics(assistant.doctor_names, *one, *other)
                    prompt = asked if isinstance(asked, str) else list(asked)
                    yield Comparison(prompt, described, one[0], other[0], metrics, question.id, turn, own - seed + 1)


def _conversations(
    assistant: "LLMdoctor",
    chunk: Sequence[tuple[Question, int]],
    guidance: Guidance | None,
    sampling: Sampling,
    top: int,
    on_token: OnToken | None,
) -> list[Said]:
    """What one side says; without ``guidance``, the patient alone."""
    side: Speaker = "patient" if guidance is None else "guided"
    histories: list[list[Message]] = [[] for _ in chunk]
    said: list[Said] = [[] for _ in chunk]
    for turn in range(max(len(question.turns) for question, _ in chunk)):
        rows = [i for i, (question, _) in enumerate(chunk) if turn < len(question.turns)]
        for i in rows:
            asked = chunk[i][0].turns[turn]
            histories[i] += [Message(role="user", content=asked)] if isinstance(asked, str) else asked
        began = time.perf_counter()
        answers = assistant.answer_all(
            [list(histories[i]) for i in rows],
            guided=guidance is not None,
            guidance=guidance,
            seed=[chunk[i][1] for i in rows],
            top=top,
            on_token=on_token and (lambda token: on_token(side, token)),
            **sampling.model_dump(exclude={"seed"}),
        )
        seconds = (time.perf_counter() - began) / len(rows)
        for i, answer in zip(rows, answers, strict=True):
            said[i].append((answer, seconds))
            histories[i].append(Message(role="assistant", content=answer.text))
    return said


def _metrics(
    doctors: Sequence[str], alone: Answer, alone_seconds: float, guided: Answer, guided_seconds: float
) -> Mapping[str, Any]:
    flips, kl, length = sum(t.flip for t in guided.tokens), sum(t.kl for t in guided.tokens), len(guided.tokens)
    return {
        "flips": flips,
        "flip_rate": flips / length,
        "kl": kl,
        "kl_per_token": kl / length,
        "mean_values": {name: sum(t.values[name] for t in guided.tokens) / length for name in doctors},
        "patient_tokens": len(alone.tokens),
        "guided_tokens": length,
        "patient_seconds": alone_seconds,
        "guided_seconds": guided_seconds,
    }
