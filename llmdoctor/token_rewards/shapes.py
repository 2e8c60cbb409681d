"""What one record says: a preference pair or a prompt, in whichever common shape it comes.

A shape is recognised by its columns. `CHOSEN` name the better answer outright and come first; `RATED` need a look at a
label or at scores. The prompt is in a column beside the answers (`_PROMPTS`) or inside them.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from llmdoctor.records import Message, PairShape, PreferencePair, Question
from llmdoctor.token_rewards.sources import Cells, Unusable
from llmdoctor.token_rewards.turns import (
    NOTHING,
    ends_with_user,
    from_cells,
    opened,
    parsed,
    prompt_messages,
    refuse_unread,
    says_no_more,
    split,
    system_names,
    system_text,
)

Columns = dict[str, Any]

DEFAULT_LABEL = "better_response_id"
NEEDED = "prompt + chosen + rejected, or the columns of a data set that `llmdoctor extract --help` lists"
NAME_THEM = "name them with --columns chosen=A,rejected=B[,prompt=C,system=D]"
_PROMPTS = ("prompt", "conversations", "messages", "trajectory", "instruction", "question", "query")
_MORE_PROMPTS = ("input", "context", "history")  # beside another one these add to it
QUESTIONS = ("prompt", "turns", *(name for name in _PROMPTS if name != "prompt"), "conversation")
_IDS = ("question_id", "prompt_id", "id")
_SCORES = (
    *(("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("rating_chosen", "rating_rejected")),
    *(("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating")),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
_WINNERS = {"model_a": 1, "model_b": -1, "tie": 0, "tie (bothbad)": 0, "both_bad": 0, "bothbad": 0}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, tokenizers cannot read it


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to write a pair: ``read`` finds the better and the worse answer where a record has all ``columns``.

    ``prompt`` are the columns that hold it; None looks for the usual names. A shape that the user has ``named`` reads
    these and ``system``, and looks at no others. Of a shape with ``rows``, consecutive records with one prompt are one
    pair: `merged` has put their best and worst answer into a list.
    """

    name: str
    columns: tuple[str, ...]
    rule: str
    read: Callable[[Columns], tuple[object, object]]
    prompt: tuple[str, ...] | None = None
    system: tuple[str, ...] = ()
    rows: bool = False
    named: bool = False


# --- which answer is better ------------------------------------------------------------------------------------------


def _number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _label(columns: Columns, name: str, low: float, high: float) -> float:
    number = _number(columns[name])
    if number is None or not low <= number <= high:
        raise Unusable(f"{name} is no number from {low:g} to {high:g}")
    return number


def _chosen(chosen: str, rejected: str) -> Callable[[Columns], tuple[object, object]]:
    """The two columns as they are named, unless their scores do not say that the chosen answer is better."""

    def read(columns: Columns) -> tuple[object, object]:
        for better, worse in _SCORES:
            scores = _number(columns.get(better)), _number(columns.get(worse))
            if scores[0] is None or scores[1] is None:
                continue
            if scores[0] == scores[1]:
                raise Unusable(f"a tie: {better} equals {worse}")
            if scores[0] < scores[1]:
                raise Unusable(f"{better} is below {worse}: the rejected answer is the better one")
        if columns.get("status") == "tie":  # distilabel-intel-orca-dpo-pairs
            raise Unusable("a tie: status says so")
        return columns[chosen], columns[rejected]

    return read


def _either(
    first: str, second: str, verdict: Callable[[Columns], float], answer: Callable[[Columns, str], object] | None = None
) -> Callable[[Columns], tuple[object, object]]:
    """The first column is the better answer where ``verdict`` is positive, the second where it is negative."""

    def read(columns: Columns) -> tuple[object, object]:
        better = verdict(columns)
        if not better:
            raise Unusable("a tie")
        names = (first, second) if better > 0 else (second, first)
        chosen, rejected = (answer(columns, name) if answer else columns[name] for name in names)
        return chosen, rejected

    return read


def _binary(name: str, better_first: int) -> Callable[[Columns], float]:
    def verdict(columns: Columns) -> float:
        if (number := _number(columns[name])) not in (0, 1):
            raise Unusable(f"{name} is neither 0 nor 1")
        return 1 if number == better_first else -1

    return verdict


def _alpaca_preference(columns: Columns) -> float:
    preference = _label(columns, "preference", 0, 2)
    if 0 < preference < 1:  # a probability, of which of the two nobody says
        raise Unusable("preference is neither 0 nor a number from 1 to 2")
    return 1.5 - preference if preference else 0  # 0 was once written for a tie


def _winner(columns: Columns) -> float:
    winner = _WINNERS.get(str(columns["winner"]))
    if winner is None:
        raise Unusable("winner is neither model_a, model_b nor a tie")
    return winner


def _winner_flags(columns: Columns) -> float:
    return _label(columns, "winner_model_a", 0, 1) - _label(columns, "winner_model_b", 0, 1)


def _best_and_worst(answers: Iterable[object], scores: Iterable[object]) -> tuple[object, object]:
    """The first of the best and the first of the worst of the answers that have a score."""
    numbered = [(_number(score), answer) for answer, score in zip(answers, scores, strict=False)]
    rated = [(number, answer) for number, answer in numbered if number is not None]
    if len(rated) < 2:
        raise Unusable("fewer than two rated answers to this prompt")
    best, worst = max(rated, key=lambda one: one[0]), min(rated, key=lambda one: one[0])
    if best[0] == worst[0]:
        raise Unusable("a tie: all answers are rated alike")
    return best[1], worst[1]


def _list(columns: Columns, name: str, kind: type | tuple[type, ...] = object) -> list[Any]:
    items = parsed(columns[name])
    if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
        raise Unusable(f"{name} is not the list that was expected")
    return items


def _ultrafeedback(columns: Columns) -> tuple[object, object]:
    completions = _list(columns, "completions", dict)
    answers = [one.get("response") for one in completions]
    measures = [[one.get(name) for one in completions] for name in ("overall_score", "fine-grained_score")]
    measures.append([_mean_rating(one.get("annotations")) for one in completions])
    known = (scores for scores in measures if sum(_number(score) is not None for score in scores) > 1)
    return _best_and_worst(answers, next(known, ()))


def _mean_rating(annotations: object) -> float | None:
    aspects = annotations.values() if isinstance(annotations, dict) else ()
    ratings = [_number(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, dict)]
    given = [rating for rating in ratings if rating is not None]
    return sum(given) / len(given) if given else None


def _nectar(columns: Columns) -> tuple[object, object]:
    answers = _list(columns, "answers", dict)
    ranks = [_number(one.get("rank")) for one in answers]
    scores = [None if rank is None else -rank for rank in ranks]
    return _best_and_worst([one.get("answer") for one in answers], scores)


def _generations(ratings: str) -> Callable[[Columns], tuple[object, object]]:
    def read(columns: Columns) -> tuple[object, object]:
        answers, scores = _list(columns, "generations"), _list(columns, ratings)
        if len(answers) != len(scores):
            raise Unusable(f"{len(answers)} generations, but {len(scores)} {ratings}")
        return _best_and_worst(answers, scores)

    return read


def _helpsteer(columns: Columns) -> tuple[object, object]:
    # `merged` leaves a row without a number alone
    if not (isinstance(columns["response"], list) and isinstance(columns["helpfulness"], list)):
        raise Unusable("helpfulness is not a number")
    return _best_and_worst(columns["response"], columns["helpfulness"])


def _turn_by_turn(columns: Columns, answer: str) -> object:
    """Of the Arena: prompts and answers, one for each turn, as lists or as lists in JSON; or messages and an answer."""
    prompts, answers = (_texts(columns[name]) for name in ("prompt", answer))
    if all(isinstance(prompt, dict) for prompt in prompts):
        return [*prompts, {"role": "assistant", "content": columns[answer]}]
    if len(prompts) != len(answers):
        raise Unusable("not as many answers as prompts")
    return [
        {"role": role, "content": text}
        for turn in zip(prompts, answers, strict=True)
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _texts(value: object) -> list[object]:
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    return value if isinstance(value, list) else [value]


# --- the table -------------------------------------------------------------------------------------------------------

CHOSEN = (
    Shape("chosen and rejected", ("chosen", "rejected"), "equal scores are ties", _chosen("chosen", "rejected")),
    Shape(
        "Argilla responses",
        ("chosen_response", "rejected_response"),
        "equal ratings are ties",
        _chosen("chosen_response", "rejected_response"),
    ),
    Shape(
        "OpenAI preferences",
        ("input", "preferred_output", "non_preferred_output"),
        "the preferred output is chosen",
        _chosen("preferred_output", "non_preferred_output"),
        prompt=("input",),
    ),
)
_WITH_WINNER = ("prompt", "response_a", "response_b")
RATED = (
    Shape(
        "HelpSteer2 preferences",
        ("response_1", "response_2", "preference_strength"),
        "a strength below 0 prefers response_1",
        _either("response_1", "response_2", lambda c: -_label(c, "preference_strength", -3, 3)),
    ),
    Shape(
        "HelpSteer3",
        ("response1", "response2", "overall_preference"),
        "a preference below 0 is for response1",
        _either("response1", "response2", lambda c: -_label(c, "overall_preference", -3, 3)),
    ),
    Shape(
        "SHP",
        ("human_ref_A", "human_ref_B", "labels"),
        "label 1 prefers A",
        _either("human_ref_A", "human_ref_B", _binary("labels", 1)),
    ),
    Shape(
        "AlpacaEval",
        ("output_1", "output_2", "preference"),
        "a preference below 1.5 is for output_1",
        _either("output_1", "output_2", _alpaca_preference),
    ),
    Shape(
        "Chatbot Arena conversations",
        ("conversation_a", "conversation_b", "winner"),
        "last answers where all before them is the same",
        _either("conversation_a", "conversation_b", _winner, lambda c, name: parsed(c[name])),
    ),
    Shape(
        "Chatbot Arena responses",
        (*_WITH_WINNER, "winner"),
        "last answers where all before them is the same",
        _either("response_a", "response_b", _winner, _turn_by_turn),
        prompt=(),
    ),
    Shape(
        "Chatbot Arena responses",
        (*_WITH_WINNER, "winner_model_a", "winner_model_b"),
        "last answers where all before them is the same",
        _either("response_a", "response_b", _winner_flags, _turn_by_turn),
        prompt=(),
    ),
    Shape(
        "UltraFeedback",
        ("completions",),
        "best against worst by overall_score (else fine-grained_score, else mean rating), without the completions' own "
        "system prompts",
        _ultrafeedback,
    ),
    Shape("Nectar", ("answers",), "best against worst rank", _nectar),
    Shape("distilabel", ("generations", "ratings"), "best against worst rating", _generations("ratings")),
    Shape("distilabel", ("generations", "rating"), "best against worst rating", _generations("rating")),
    Shape(
        "HelpSteer2",
        ("response", "helpfulness"),
        "of consecutive rows with one prompt, most against least helpful; the pair's id is the first row's line",
        _helpsteer,
        rows=True,
    ),
)


def shapes(label: str | None, columns: Mapping[str, str] | None) -> tuple[Shape, ...]:
    """The shapes to look for: all that are known or, with ``columns``, the one that they describe."""
    if columns:
        names = chosen, rejected = (columns["chosen"], columns["rejected"])
        prompt, system = (tuple(filter(None, [columns.get(key)])) for key in ("prompt", "system"))
        read = lambda c: (c[chosen], c[rejected])  # noqa: E731
        return (Shape("named columns", names, "as --columns says", read, prompt, system, named=True),)
    label = label or DEFAULT_LABEL
    safe = ("response_0", "response_1", label)
    verdict = _binary(label, 0)
    return (*CHOSEN, Shape("PKU-SafeRLHF", safe, f"{label} is the better one", _either(*safe[:2], verdict)), *RATED)


# --- from a record to a pair -----------------------------------------------------------------------------------------


def to_pair(id: str, record: object, known: tuple[Shape, ...]) -> tuple[PreferencePair, PairShape]:
    """The pair that a record holds, and how it was found; raises `Unusable` where it holds none."""
    columns, all_names = _columns(record), set(record) if isinstance(record, dict) else set()
    shape = _recognised(columns, known)
    if not shape.named:
        refuse_unread(columns)
    chosen, rejected = shape.read(columns)
    prompt_names, prompt = _prompt(columns, shape)
    read_systems, system = _system(columns, shape)
    if missing := [name for name in shape.system if name not in all_names]:  # null is no system prompt
        raise Unusable(f"missing column {missing[0]!r} (found {_found(columns)})")
    if isinstance(chosen, str) != isinstance(rejected, str) or not all(
        isinstance(answer, str | list | dict) for answer in (chosen, rejected)
    ):
        raise Unusable("answers are neither two texts nor two message lists")
    messages, chosen_text = split(prompt, chosen)
    others, rejected_text = split(prompt, rejected)
    if messages != others:
        raise Unusable("prompts differ")
    if not chosen_text.strip() or not rejected_text.strip():
        raise Unusable("empty answer")
    if chosen_text == rejected_text:
        raise Unusable("both answers are the same")
    messages = ends_with_user(opened(messages, system))
    for name, value in _other_prompts(columns, shape, prompt_names).items():
        if not says_no_more(value, messages, chosen_text, rejected_text):
            first = (*prompt_names, *shape.columns)[0]
            raise Unusable(f"{first!r} and {name!r} may both be the prompt (found {_found(columns)}): {NAME_THEM}")
    try:
        written = json.dumps([messages, chosen_text, rejected_text], ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise Unusable("a tool call that is not JSON") from None
    if _LONE_SURROGATE.search(written):
        raise Unusable("not Unicode: half of a surrogate pair")
    pair = PreferencePair(id, tuple(messages), chosen_text, rejected_text)
    read = dict.fromkeys((*prompt_names, *read_systems, *shape.columns))
    used = {*read, *(name for scores in _SCORES for name in scores if shape in CHOSEN)}
    unused = {name: value for name, value in columns.items() if name not in used and value not in NOTHING}
    return pair, PairShape(shape.name, tuple(read), shape.rule, _found(unused) if unused else "")


def _columns(record: object) -> Columns:
    """The columns of a record that hold something."""
    if isinstance(record, Unusable):
        raise record
    if not isinstance(record, dict):
        raise Unusable("not a JSON object")
    return {key: value for key, value in from_cells(record).items() if value is not None}


def _recognised(columns: Columns, known: tuple[Shape, ...]) -> Shape:
    fitting = [shape for shape in known if columns.keys() >= set(shape.columns)]
    if len(fitting) > 1 and fitting[0] not in CHOSEN:
        raise Unusable(f"columns of {fitting[0].name} and of {fitting[1].name} (found {_found(columns)}): {NAME_THEM}")
    if fitting:
        return fitting[0]
    for shape in known:
        missing = [name for name in shape.columns if name not in columns]
        if (len(missing) == 1 and (shape in CHOSEN or len(shape.columns) > 2)) or len(known) == 1:
            raise Unusable(f"missing column {missing[0]!r} (found {_found(columns)})")
    raise Unusable(f"no preference pair in the columns found: {_found(columns)}")


def _found(columns: Columns) -> str:
    return ", ".join(" ".join(str(name)[:40].split()) for name in [*columns][:20]) or "none"


def _prompt(columns: Columns, shape: Shape) -> tuple[list[str], object]:
    """The columns that hold the prompt, and what they say: None where it has to be inside the answers."""
    if shape.prompt is not None:
        names = list(shape.prompt)
        if missing := [name for name in names if name not in columns]:
            raise Unusable(f"missing column {missing[0]!r} (found {_found(columns)})")
    else:
        names = [name for name in (*_PROMPTS, *_MORE_PROMPTS) if columns.get(name) not in NOTHING]
        names = ["prompt"] if "prompt" in columns else names  # with nothing in it, the prompt is not in the answers
    if names == ["instruction", "input"] and all(isinstance(columns[name], str) for name in names):  # Alpaca
        return names, f"{columns['instruction']}\n\n{columns['input']}"
    return names[:1], columns[names[0]] if names else None


def _other_prompts(columns: Columns, shape: Shape, read: list[str]) -> Columns:
    """The columns that may hold a prompt too, and are not read as it."""
    others = () if shape.named else (*_PROMPTS, *_MORE_PROMPTS)
    return {
        name: columns[name]
        for name in others
        if name not in (*read, *shape.columns) and columns.get(name) not in NOTHING
    }


def _system(columns: Columns, shape: Shape) -> tuple[list[str], str | None]:
    names = [name for name in shape.system if columns.get(name)] if shape.named else system_names(columns)
    return names, system_text(columns, names)


# --- several records for one pair ------------------------------------------------------------------------------------


def merged(records: Iterable[tuple[int, object]], known: tuple[Shape, ...]) -> Iterator[tuple[int, object]]:
    """The records; consecutive ones with the same prompt, in a shape with ``rows``, as one with the first one's line.

    Of such a run only the first of the best rows and the first of the worst are kept at any time.
    """
    by_rows = next((shape for shape in known if shape.rows), None)
    answer, score = by_rows.columns if by_rows else ("", "")

    def helpfulness(row: dict[str, Any]) -> float:
        return float(row[score])

    def run(numbered: tuple[int, object]) -> object:
        line, record = numbered
        if by_rows is None or not isinstance(record, dict) or _number(record.get(score)) is None:
            return line
        try:
            columns = _columns(record)
            shape = _recognised(columns, known)
            if shape is not by_rows:
                return line
            refuse_unread(columns)
            names, prompt = _prompt(columns, shape)
            return prompt, _system(columns, shape)[1], _other_prompts(columns, shape, names)
        except Unusable:
            return line

    for key, rows in groupby(records, run):
        if by_rows is None or isinstance(key, int):
            yield from rows
            continue
        kept: list[dict[str, Any]] = []
        for line, row in rows:
            assert isinstance(row, dict)
            if kept:
                kept = [max(kept[0], row, key=helpfulness), min(kept[-1], row, key=helpfulness)]
            else:
                first, kept = line, [row]
        whole = copy(kept[0])
        whole.update({name: [row[name] for row in kept] for name in (answer, score)})
        yield first, whole


def to_question(line: int, record: object, known: tuple[Shape, ...]) -> tuple[Question, list[str]]:
    """The question that a record asks, and names of what is in it and not used. Raises `Unusable` where it asks none.

    Columns with several user turns as texts (MT-Bench's ``turns``) are asked one after the other. The answer at the end
    of a conversation is left out. A record of `known` pairs without a prompt beside the answers has it inside them.
    """
    if isinstance(record, Unusable):
        raise record
    if not isinstance(record, dict):
        turns, left_out = _turns_of(record)
        return Question(str(line), turns), left_out
    if not record:
        raise Unusable(f"expected a text, or a column such as 'prompt', 'turns' or {_PROMPTS[-2]!r}, found nothing")
    columns = {name: value for name, value in from_cells(record).items() if value not in NOTHING}
    refuse_unread(columns)
    names = [name for name in QUESTIONS if name in columns][:1]
    if not names and isinstance(record, Cells) and len(record) == 1:
        names = list(columns)  # a table of one column needs no name for it
    elif names == ["instruction"] and isinstance(columns["instruction"], str) and isinstance(columns.get("input"), str):
        # Alpaca
        names.append("input")
    unused: list[str] = []
    if names:
        read_systems = system_names(columns)
        system = system_text(columns, read_systems)
        asked = columns[names[0]] if len(names) == 1 else "\n\n".join(columns[name] for name in names)
        turns, unused = _turns_of(parsed(asked) if names == ["turns"] else asked)
        if system:
            turns = (opened(prompt_messages(turns[0]), system), *turns[1:])
        names += read_systems
    elif any(columns.keys() >= set(shape.columns) for shape in known):
        turns = (list(to_pair(str(line), record, known)[0].prompt),)
    else:
        raise Unusable(
            f"expected a text, or a column such as 'prompt', 'turns' or 'instruction', found {_found(record)}"
        )
    own = next((name for name in _IDS if isinstance(columns.get(name), str | int)), None)
    fields = {name: value for name, value in columns.items() if name not in names}
    unused += [str(name) for name in fields if name != own]
    return Question(str(columns[own] if own else line), turns, fields), unused


def _turns_of(asked: object) -> tuple[tuple[str | list[Message], ...], list[str]]:
    """The turns, and what of them is not used."""
    if isinstance(asked, list) and asked and all(isinstance(turn, str) for turn in asked):
        for turn in asked:
            ends_with_user(prompt_messages(turn))
        return tuple(asked), []
    messages = prompt_messages(asked)
    unused = []
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        messages, unused = messages[:-1], ["the answer at the end"]
    ends_with_user(messages)
    return (asked if isinstance(asked, str) and len(messages) == 1 else messages,), unused
