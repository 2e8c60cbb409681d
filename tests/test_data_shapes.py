"""The shapes of preference data sets, as their cards state them, and what must not get lost on the way to a pair."""

import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from llmdoctor.cli.main import app
from llmdoctor.errors import DataError, LoadError, UsageError
from llmdoctor.models import load_patient
from llmdoctor.profile import load_profile
from llmdoctor.records import FacePair, PairShape, PreferencePair, SkippedRecord
from llmdoctor.schema import checked
from llmdoctor.settings import DataSettings
from llmdoctor.text import prompt_ids
from llmdoctor.token_rewards.extract import extract
from llmdoctor.token_rewards.folder import RewardsFolder
from llmdoctor.token_rewards.pairs import read_pairs, read_prompts, shuffled
from llmdoctor.token_rewards.shapes import CHOSEN, RATED, shapes

REAL = Path(__file__).parents[2] / "shared" / "data"
USER, GOOD, BAD = (
    {"role": r, "content": c} for r, c in [("user", "Why?"), ("assistant", "Yes."), ("assistant", "No.")]
)
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = PreferencePair("1", (USER,), "Yes.", "No.")
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "tea"}}}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*records: Any, name: str = "pairs.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    def table(*records: dict[str, str], name: str = "pairs.csv") -> Path:
        text = io.StringIO()
        writer = csv.DictWriter(text, records[0], delimiter="\t" if ".tsv" in name else ",")
        writer.writeheader()
        writer.writerows(records)
        data = text.getvalue().encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return tmp_path / name

    return table


def read(source: str | Path, **how: Any) -> tuple[list[PreferencePair], list[SkippedRecord], list[PairShape]]:
    skipped: list[SkippedRecord] = []
    found: list[PairShape] = []
    return list(read_pairs(source, on_skip=skipped.append, on_shape=found.append, **how)), skipped, found


def skip_reason(write: Callable[..., Path], record: Any, **how: Any) -> str:
    """Why this record is skipped, beside a good one."""
    columns = how.get("columns") or {}
    good = {
        columns.get(key, key): value for key, value in (("prompt", "Why?"), ("chosen", "Yes."), ("rejected", "No."))
    }
    pairs, skipped, _ = read(write(record, good), **how)
    assert [pair.id for pair in pairs] == ["2"], pairs
    (skip,) = skipped
    assert skip.line == 1
    return skip.reason


# --- the data sets ---------------------------------------------------------------------------------------------------


def completion(
    text: str, score: float | None, fine: float | None = None, ratings: tuple[str, ...] = ("3", "3")
) -> dict[str, Any]:
    """One of openbmb/UltraFeedback's completions."""
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    return {
        "annotations": {a: {"Rating": r, "Rationale": "..."} for a, r in zip(aspects, ratings, strict=False)},
        "custom_system_prompt": "Answer truthfully.",
        "principle": "honesty",
        "model": "alpaca-7b",
        "response": text,
        "critique": "...",
        "overall_score": score,
        "fine-grained_score": fine,
    }


ULTRA = {"source": "sharegpt", "instruction": "Why?", "models": ["a", "b"], "correct_answers": ["None"]}
BINARIZED = {
    "prompt": "Why?",
    "prompt_id": "ab12",
    "chosen": [USER, GOOD],
    "rejected": [USER, BAD],
    "messages": [USER, GOOD],
    "score_chosen": 8.5,
    "score_rejected": 6.0,
}
STEER = {"prompt": "Why?", "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1}
STEER_PREFERENCE = {
    "split": "train",
    "prompt": "Why?",
    "response_1": "Yes.",
    "response_2": "No.",
    "preference_strength": -2,
    "preference_statement": "@Response 1 is better.",
    "preference_elaboration": "...",
}
SHP = {
    "post_id": "x",
    "domain": "askbaking",
    "history": "Why?",
    "human_ref_A": "Yes.",
    "human_ref_B": "No.",
    "labels": 1,
}
SHP |= {"score_A": 9, "score_B": 3, "score_ratio": 3.0}
NECTAR = {
    "prompt": "\n\nHuman: Why?\n\nAssistant: ",
    "answers": [
        {"answer": "Perhaps.", "model": "gpt-3.5-turbo", "rank": 2.0},
        {"answer": "No.", "model": "llama", "rank": 7.0},
        {"answer": " Yes.", "model": "gpt-4", "rank": 1.0},
    ],
    "turns": 1,
    "num_responses": 3,
    "source": ["sharegpt"],
    "good_natured": True,
}
ORCA = {"system": "", "input": "Why?", "chosen": "Yes.", "rejected": "No.", "generations": ["Yes.", "No."]}
ORCA |= {"order": ["chosen", "rejected"], "rating": [9.0, 7.0], "status": "unchanged", "chosen_score": 9.0}
DISTILABEL = {"instruction": "Why?", "generations": ["Perhaps.", "Yes.", "No."], "ratings": ["3", "5", "1"]}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Why?"}],
    "chosen": {"from": "gpt", "value": "Yes."},
    "rejected": {"from": "gpt", "value": "No."},
}
ALPACA = {"instruction": "Why?", "input": "", "output_1": "No.", "output_2": "Yes.", "preference": 1.93}
ALPACA |= {"generator_1": "text_davinci_003", "generator_2": "mine", "annotator": "weighted_alpaca_eval_gpt4_turbo"}
ARENA = {
    "question_id": "q",
    "model_a": "alpaca-13b",
    "model_b": "koala-13b",
    "winner": "model_b",
    "conversation_a": [USER, BAD],
    "conversation_b": [USER, GOOD],
    "turn": 1,
    "language": "English",
}
KAGGLE = {
    "id": 1,
    "model_a": "gpt-4",
    "model_b": "koala",
    "prompt": '["Why?"]',
    "response_a": '["Yes."]',
    "response_b": '["No."]',
    "winner_model_a": 1,
    "winner_model_b": 0,
    "winner_tie": 0,
}
OPENAI = {
    "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [GOOD],
    "non_preferred_output": [BAD],
}


def parts(message: dict[str, str]) -> dict[str, Any]:
    """The message as arena-human-preference-140k writes it."""
    part = {"type": "text", "text": message["content"], "image": None, "mimeType": None}
    return {"role": message["role"], "content": [part]}


WHOLE = {
    "UltraFeedback": [ULTRA | {"completions": [completion("Eh.", 6), completion("No.", 2), completion("Yes.", 8)]}],
    "UltraFeedback fine": [ULTRA | {"completions": [completion("No.", None, 2.25), completion("Yes.", None, 4.5)]}],
    "UltraFeedback ratings": [
        ULTRA
        | {"completions": [completion("No.", None, None, ("2", "N/A")), completion("Yes.", None, None, ("3", "5"))]}
    ],
    "chosen and rejected H4": [BINARIZED],
    "chosen and rejected dpo-mix": [
        {"dataset": "x", "chosen": [USER, GOOD], "rejected": [USER, BAD], "chosen_rating": 5.0, "rejected_rating": 4.5}
    ],
    "chosen and rejected argilla": [
        {
            "source": "x",
            "prompt": "Why?",
            "chosen": [USER, GOOD],
            "chosen-rating": 5.0,
            "chosen-model": "a",
            "rejected": [USER, BAD],
            "rejected-rating": 3.0,
        }
    ],
    "chosen and rejected orca": [ORCA],
    "chosen and rejected ShareGPT": [SHAREGPT],
    "chosen and rejected UltraInteract": [
        {"trajectory": [{"from": "user", "value": "Why?"}], "chosen": "Yes.", "rejected": "No."}
    ],
    "chosen and rejected parts": [{"prompt": [parts(USER)], "chosen": [parts(GOOD)], "rejected": [parts(BAD)]}],
    "Argilla responses": [
        {
            "instruction": "Why?",
            "chosen_response": "Yes.",
            "rejected_response": "No.",
            "chosen_avg_rating": 5.0,
            "rejected_avg_rating": 4.75,
        }
    ],
    "OpenAI preferences": [OPENAI],
    "PKU-SafeRLHF": [
        {"prompt": "Why?", "response_0": "No.", "response_1": "Yes.", "better_response_id": 1, "safer_response_id": 0}
    ],
    "HelpSteer2 preferences": [STEER_PREFERENCE],
    "HelpSteer3": [
        {
            "domain": "general",
            "language": "english",
            "context": [USER],
            "response1": "No.",
            "response2": "Yes.",
            "overall_preference": 1,
        }
    ],
    "SHP": [SHP],
    "AlpacaEval": [ALPACA],
    "Chatbot Arena conversations": [ARENA],
    "Chatbot Arena conversations parts": [
        ARENA | {"conversation_a": [parts(USER), parts(BAD)], "conversation_b": [parts(USER), parts(GOOD)]}
    ],
    "Chatbot Arena responses": [KAGGLE],
    "Chatbot Arena responses winner": [
        {"id": 1, "prompt": "Why?", "response_a": "No.", "response_b": "Yes.", "winner": "model_b", "language": "en"}
    ],
    "Nectar": [NECTAR],
    "distilabel": [DISTILABEL],
    "distilabel rating": [{"input": "Why?", "generations": ["No.", "Yes."], "rating": [6.0, 9.0]}],
    "HelpSteer2": [STEER | {"response": "No.", "helpfulness": 1}, STEER | {"response": "Yes.", "helpfulness": 3}],
}


def data_set(name: str) -> str:
    """The shape that an entry of ``WHOLE`` is an example of: the longest name that its own begins with."""
    return max((shape.name for shape in shapes(None, None) if name.startswith(shape.name)), key=len)


@pytest.mark.parametrize("name", WHOLE)
def test_every_data_set_says_the_same(write, tmp_path, name):
    """As JSON lines and, with its nulls, as Parquet; and the shape says which data set it is and what was read."""
    path = write(*WHOLE[name])
    pq.write_table(pa.Table.from_pylist([*WHOLE[name]]), tmp_path / "pairs.parquet")
    for source in (path, tmp_path / "pairs.parquet"):
        pairs, skipped, (shape,) = read(source)
        assert (pairs, skipped) == ([PAIR], [])
        assert shape.name == data_set(name)
        assert set(shape.columns) <= WHOLE[name][0].keys()
        assert str(shape).startswith(f"pairs read as {shape.name} ({', '.join(shape.columns)}): ")
        assert "\n" not in str(shape)


def test_the_data_sets_are_those_of_the_table_the_help_and_the_page():
    known = {shape.name for shape in shapes(None, None)}
    assert known == set(map(data_set, WHOLE))
    shown = " ".join(CliRunner().invoke(app, ["extract", "--help"], env={"COLUMNS": "200"}).stdout.split())
    page = " ".join((Path(__file__).parents[1] / "docs" / "data.md").read_text().split())
    for name in known:
        assert name in shown, name
        assert name in page, name


def test_no_two_shapes_of_the_table_can_be_mistaken_for_each_other():
    for shape in RATED:
        assert not any(set(other.columns) <= set(shape.columns) for other in (*CHOSEN, *RATED) if other is not shape)


TIES = {
    "a tie: score_chosen equals score_rejected": BINARIZED | {"score_chosen": 6.0},
    "a tie: chosen-rating equals rejected-rating": {
        "prompt": "Why?",
        "chosen": "Yes.",
        "rejected": "No.",
        "chosen-rating": 4,
        "rejected-rating": 4.0,
    },
    "score_chosen is below score_rejected: the rejected answer is the better one": BINARIZED | {"score_rejected": 9},
    "chosen-rating is below rejected-rating: the rejected answer is the better one": {
        **{"prompt": "Why?", "chosen": "Yes.", "rejected": "No."},
        **{"chosen-rating": "3", "rejected-rating": "10"},
    },
    "a tie: status says so": ORCA | {"status": "tie", "rating": [9.0, 9.0]},
    "a tie: all answers are rated alike": ULTRA | {"completions": [completion("Yes.", 6), completion("No.", 6)]},
    "a tie": STEER_PREFERENCE | {"preference_strength": 0},
    "fewer than two rated answers to this prompt": ULTRA | {"completions": [completion("Yes.", 6)]},
    "preference_strength is no number from -3 to 3": STEER_PREFERENCE | {"preference_strength": -100},
    "labels is neither 0 nor 1": SHP | {"labels": 2},
    "winner is neither model_a, model_b nor a tie": ARENA | {"winner": "gpt-4"},
    "preference is neither 0 nor a number from 1 to 2": ALPACA | {"preference": 0.9},
    "not as many answers as prompts": KAGGLE | {"response_a": '["Yes.", "Sure."]'},
    "a message without role and content": KAGGLE | {"response_a": "[null]"},
    "2 generations, but 1 ratings": DISTILABEL | {"generations": ["a", "b"], "ratings": [1]},
    "answers is not the list that was expected": NECTAR | {"answers": {"text": ["Yes."]}},
    "a list in a text that is not JSON": NECTAR | {"answers": "[{'answer': array([1])"},
    "prompts differ": ARENA | {"conversation_a": [USER, BAD, USER, BAD], "conversation_b": [USER, GOOD, USER, GOOD]},
}


@pytest.mark.parametrize("reason", TIES)
def test_ties_and_what_is_not_rated_are_skipped_with_the_reason(write, reason):
    assert skip_reason(write, TIES[reason]) == reason


@pytest.mark.parametrize("spelt", ["{[]: 1}", "{{}}", "{{}: 1}"])
def test_a_text_that_spells_what_cannot_be_skips_the_record(write, spelt):
    """Python cannot build it: that was a traceback, and the end of the run."""
    assert skip_reason(write, NECTAR | {"answers": spelt}) == "a list in a text that is not JSON"


def test_a_second_prompt_that_is_a_word_of_the_first_is_not_dropped(write):
    """As a part of a word, or of a line, it was taken for said already."""
    whole = {"prompt": "Is this a fruit?", "chosen": "Yes.", "rejected": "No."}
    reason = skip_reason(write, whole | {"instruction": "a"})
    assert "instruction" in reason
    for said in ("Is this a fruit?", " Is this a fruit?\n"):
        assert len(read(write(whole | {"instruction": said}))[0]) == 1


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)", "both_bad"])
def test_no_winner_is_a_tie(write, winner):
    assert skip_reason(write, ARENA | {"winner": winner}) == "a tie"
    assert skip_reason(write, KAGGLE | {"winner_model_a": 0, "winner_tie": 1}) == "a tie"
    for preference in (1.5, 0):
        assert skip_reason(write, ALPACA | {"preference": preference}) == "a tie"


def test_the_other_answer_wins_where_the_label_says_so(write):
    other = [
        (STEER_PREFERENCE | {"preference_strength": 3}),
        (SHP | {"labels": 0}),
        (ALPACA | {"preference": 1.0}),
        (ARENA | {"winner": "model_a"}),
        (KAGGLE | {"winner_model_a": 0, "winner_model_b": 1}),
    ]
    assert [(pair.chosen, pair.rejected) for pair in read(write(*other))[0]] == [("No.", "Yes.")] * len(other)


def test_a_file_of_several_shapes_says_each_once(write):
    pairs, skipped, found = read(write(SHP, NECTAR, SHP, NECTAR, {"text": "x"}))
    assert ([pair.id for pair in pairs], [shape.name for shape in found]) == (list("1234"), ["SHP", "Nectar"])
    assert skipped == [SkippedRecord(5, "no preference pair in the columns found: text")]


# --- rows that are one pair ------------------------------------------------------------------------------------------


def rows(*ratings: tuple[str, str, float | None]) -> list[dict[str, Any]]:
    return [STEER | {"prompt": prompt, "response": answer, "helpfulness": score} for prompt, answer, score in ratings]


def test_consecutive_rows_with_one_prompt_are_one_pair_and_its_id_is_the_first_line(write):
    data = rows(
        *[("a", "w", 2), ("a", "x", 4), ("a", "y", 0), ("a", "z", 4)],  # HelpSteer has four to a prompt
        *[("b", "tied", 3), ("b", "too", 3)],
        ("c", "alone", 4),
        *[("d", "no number", None), ("d", "first", 1), ("d", "second", 2)],
        *[("a", "good", 4), ("a", "bad", 1)],  # the first prompt again, not beside it
    )
    pairs, skipped, (shape,) = read(write(*data))
    assert [(pair.id, pair.chosen, pair.rejected) for pair in pairs] == [
        ("1", "x", "y"),
        ("9", "second", "first"),
        ("11", "good", "bad"),
    ]
    assert [(skip.line, skip.reason) for skip in skipped] == [
        (5, "a tie: all answers are rated alike"),
        (7, "fewer than two rated answers to this prompt"),
        (8, "no preference pair in the columns found: prompt, correctness, coherence, complexity, verbosity, response"),
    ]
    assert shape.columns == ("prompt", "response", "helpfulness")
    assert [pair.id for pair in read(write(*data), limit=2)[0]] == ["1", "9"]
    with pytest.raises(DataError, match="line 5: a tie"):
        read(write(*data), strict=True)


def test_a_run_of_rows_ends_where_another_record_comes(write):
    assert [pair.id for pair in read(write(*rows(("a", "x", 1), ("a", "y", 2)), SHP, *rows(("a", "z", 0))))[0]] == [
        "1",
        "3",
    ]


def test_the_turn_marks_of_helpsteer_are_turns(write):
    prompt = "Hi.<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy?"
    (pair,) = read(write(STEER_PREFERENCE | {"prompt": prompt}))[0]
    assert pair.prompt == ({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}, USER)


def test_rows_are_streamed(tmp_path):
    with (tmp_path / "rows.jsonl").open("w") as file:
        for score in range(3000):
            file.write(json.dumps(rows(("a", f"{score} " + "x" * 10_000, score))[0]) + "\n")
    tracemalloc.start()
    (pair,) = read(tmp_path / "rows.jsonl")[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (pair.chosen[:5], pair.rejected[:2]) == ("2999 ", "0 ")
    assert peak < 2_000_000


# --- nothing gets lost -----------------------------------------------------------------------------------------------

TEXTS = {"chosen": "Yes.", "rejected": "No."}
LISTS = {"chosen": [GOOD], "rejected": [BAD]}
INSIDE = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
BEFORE = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"system": "Be brief.", "question": "Why?"} | TEXTS, [SYSTEM, USER]),  # Intel/orca_dpo_pairs
        ({"system_prompt": "Be brief.", "prompt": [USER]} | LISTS, [SYSTEM, USER]),
        ({"system": "Be brief.", "prompt": [SYSTEM, USER]} | LISTS, [SYSTEM, USER]),
        ({"system": "Be brief."} | INSIDE, [SYSTEM, USER]),
        ({"system": "Be brief."} | SHAREGPT, [SYSTEM, USER]),
        ({"system": ""} | INSIDE, [USER]),
        (
            {"prompt": [SYSTEM, USER], "chosen": [BAD, USER, GOOD], "rejected": [BAD, USER, BAD]},
            [SYSTEM, USER, BAD, USER],
        ),
        ({"prompt": [SYSTEM, USER]} | INSIDE, [SYSTEM, USER]),
        ({"prompt": [USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, [SYSTEM, USER]),
        ({"prompt": "Hi.", "chosen": [*BEFORE, USER, GOOD], "rejected": [*BEFORE, USER, BAD]}, [*BEFORE, USER]),
        ({"prompt": " Why?\n"} | INSIDE, [USER]),
        (
            {"instruction": "Sum up.", "input": "It rains."} | TEXTS,
            [{"role": "user", "content": "Sum up.\n\nIt rains."}],
        ),
        ({"prompt": "Why?", "question": "Why?", "history": []} | TEXTS, [USER]),
        ({"messages": [SYSTEM, *BEFORE, USER]} | LISTS, [SYSTEM, *BEFORE, USER]),
    ],
)
def test_all_of_the_prompt_is_kept(write, record, prompt):
    pairs, skipped, _ = read(write(record))
    assert skipped == []
    assert pairs == [PreferencePair("1", tuple(prompt), "Yes.", "No.")]


DIFFERS = "the prompt beside the answers differs from the one inside them"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "Who?"} | INSIDE, DIFFERS),
        ({"prompt": [USER, GOOD, USER, BAD, {"role": "user", "content": "What?"}]} | INSIDE, DIFFERS),
        (
            {
                "prompt": "Who?",
                "chosen": "\n\nHuman: Why?\n\nAssistant: a",
                "rejected": "\n\nHuman: Why?\n\nAssistant: b",
            },
            DIFFERS,
        ),
        (
            {"system": "Be long.", "prompt": [SYSTEM, USER]} | LISTS,
            "the system prompt beside the conversation differs from the one inside it",
        ),
        (
            {"system": "a", "system_prompt": "b", "prompt": "Why?"} | TEXTS,
            "'system' and 'system_prompt' do not hold one system prompt",
        ),
        ({"system": ["a"], "prompt": "Why?"} | TEXTS, "'system' do not hold one system prompt"),
        ({"prompt": "Why?", "tools": [CALL]} | TEXTS, "'tools' cannot be kept: only texts are read"),
        ({"prompt": "Why?", "images": ["a.png"]} | TEXTS, "'images' cannot be kept: only texts are read"),
        (OPENAI | {"input": {"messages": [USER], "tools": [CALL]}}, "'tools' cannot be kept: only texts are read"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image"}]}]} | LISTS,
            "a message with a part of type 'image': only texts are read",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "reasoning", "text": "Hm."}]}]} | LISTS,
            "a message with a part of type 'reasoning': only texts are read",
        ),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD | {"tool_calls": [CALL]}]},
            "an answer calls a tool, and is no text",
        ),
        (
            {"prompt": [USER, {"role": "assistant", "tool_calls": [{"id": 1}]}]} | LISTS,
            "a tool call without the name of a function",
        ),
    ],
)
def test_what_cannot_be_kept_skips_the_record(write, record, reason):
    assert skip_reason(write, record) == reason


@pytest.mark.parametrize(
    ("record", "first", "second"),
    [
        ({"question": "Why?", "instruction": "Who?"} | TEXTS, "instruction", "question"),
        ({"prompt": "Why?", "context": "It rains."} | TEXTS, "prompt", "context"),
        ({"conversations": [USER], "history": "x"} | LISTS, "conversations", "history"),
    ],
)
def test_two_prompts_are_told_apart_by_the_user(write, record, first, second):
    reason = skip_reason(write, record)
    assert reason.startswith(
        f"'{first}' and '{second}' may both be the prompt (found {', '.join(record)}): name them with --columns"
    )
    columns = {"chosen": "chosen", "rejected": "rejected", "prompt": second}
    if isinstance(record["chosen"], str):
        assert read(write(record), columns=columns)[0][0].prompt == ({"role": "user", "content": record[second]},)


def test_two_shapes_are_told_apart_by_the_user(write):
    reason = skip_reason(write, SHP | DISTILABEL | {"history": None})
    assert reason.startswith("columns of SHP and of distilabel (found ")
    assert "name them with --columns chosen=A,rejected=B" in reason


# --- tools -----------------------------------------------------------------------------------------------------------

TOOL = {"role": "tool", "content": '{"price": 3}', "tool_call_id": "c1"}
ASKED = {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "c1"}]}
TOOLED = [{"role": "developer", "content": "Use tools."}, USER, ASKED, TOOL]


def test_turns_of_tools_are_kept(write):
    spelt = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"what": "tea"}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [spelt]}  # OpenAI: no content, arguments in JSON
    (pair,) = read(write({"prompt": [*TOOLED[:2], asked, TOOL | {"tool_calls": None}]} | LISTS))[0]
    assert pair == PreferencePair("1", tuple(TOOLED), "Yes.", "No.")
    assert list(shuffled([pair], 1)) == [pair]
    turns = [("human", "Why?"), ("function_call", json.dumps(CALL["function"])), ("observation", TOOL["content"])]
    (pair,) = read(write(SHAREGPT | {"conversations": [{"from": who, "value": said} for who, said in turns]}))[0]
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert pair.prompt == (USER, called, {"role": "tool", "content": TOOL["content"]})


FACES = {"kind": FacePair("Be kind.", "Be rude.")}
TOOL_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | tojson if m.role == 'tool' else m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "<|end|>{% endfor %}<|assistant|>"
)


@pytest.mark.parametrize(
    ("template", "dropped"),
    [
        (TOOL_TEMPLATE, None),
        (
            TOOL_TEMPLATE.replace("{{ call.function.name }}", ""),
            "the model's chat template refuses this conversation: it drops the tool-calling turn",
        ),
        (
            TOOL_TEMPLATE.replace(
                "{{ m.content | tojson if m.role == 'tool' else m.content }}", "{{ m.content if m.role != 'tool' }}"
            ),
            "it drops the tool turn",
        ),
        (
            TOOL_TEMPLATE.replace("<|{{ m.role }}|>", "{{ raise_exception('no ' + m.role) if m.role == 'developer' }}"),
            "no developer",
        ),
        (TOOL_TEMPLATE.replace("arguments | tojson", "arguments + 1"), "unsupported operand"),
        (None, "no chat template"),
    ],
)
def test_turns_that_the_chat_template_drops_skip_the_record(write, tiny_model, copied, tmp_path, template, dropped):
    patient = load_patient(copied(tiny_model()))
    patient.tokenizer.chat_template = template
    data = DataSettings(source=str(write({"prompt": TOOLED} | LISTS, {"prompt": "Why?"} | TEXTS)))
    skipped: list[SkippedRecord] = []
    pairs = list(extract(patient, data, FACES, tmp_path / "out", on_skip=skipped.append))
    if dropped is None:
        assert ([pair.chosen.pair_id for pair in pairs], skipped) == (["1", "2"], [])
        said = patient.tokenizer.decode(pairs[0].chosen.prompt_ids)
        assert all(part in said for part in ("Use tools.", "Why?", 'find{"what": "tea"}', json.dumps(TOOL["content"])))
    else:
        assert [pair.chosen.pair_id for pair in pairs] == ["2"]
        assert [skip.line for skip in skipped] == [1]
        assert dropped in skipped[0].reason


def test_cutting_old_turns_keeps_the_developers(write, tiny_model, tmp_path):
    patient = load_patient(tiny_model())
    long = [{"role": "user", "content": "x " * 200}, BAD, USER]
    data = DataSettings(source=str(write({"prompt": [TOOLED[0], *long]} | LISTS)))
    (pair,) = extract(patient, data, FACES, tmp_path / "out")
    said = patient.tokenizer.decode(pair.chosen.prompt_ids)
    assert said == "<|developer|>Use tools.<|end|><|user|>Why?<|end|><|assistant|>"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real inputs are not at {REAL}")
def test_a_real_template_that_drops_such_turns_is_found_out():
    tokenizer = AutoTokenizer.from_pretrained(REAL / "qwen2-tokenizer")  # it knows system, user and assistant alone
    for prompt, dropped in ((TOOLED, "developer"), ([USER, ASKED, TOOL], "tool-calling"), ([USER, GOOD, TOOL], "tool")):
        with pytest.raises(DataError, match=f"chat template refuses this conversation: it drops the {dropped} turn"):
            prompt_ids(tokenizer, prompt)


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.csv.gz", "p.TSV.gz"])
def test_a_table_holds_the_same_pairs_and_ids_are_the_lines_where_they_begin(table, name):
    name = name.replace("TSV", "tsv")
    texts = [TEXTS | {"prompt": 'Why,\n\t"so"?', "n": str(i)} for i in range(3)]
    pairs, skipped, _ = read(table(*texts, name=name))
    assert skipped == []
    assert [pair.id for pair in pairs] == ["2", "4", "6"]
    assert {pair.prompt[0]["content"] for pair in pairs} == {'Why,\n\t"so"?'}


@pytest.mark.parametrize("spell", [json.dumps, repr])
@pytest.mark.parametrize("name", WHOLE)
def test_cells_that_spell_lists_are_read_where_the_shape_has_lists(table, name, spell):
    if name.startswith("OpenAI"):
        pytest.skip("its prompt is an object of many keys, which nobody keeps in a table")
    cells = [{k: v if isinstance(v, str) else spell(v) for k, v in record.items()} for record in WHOLE[name]]
    assert read(table(*cells))[:2] == ([PreferencePair("2", (USER,), "Yes.", "No.")], [])


def test_a_table_in_a_folder_is_read_as_the_table_alone(table, tmp_path):
    """Its cells were texts: JSON was learnt as the answer."""
    answers = [json.dumps([{"id": 1, "role": "assistant", "content": text}]) for text in ("Yes.", "No.")]
    (tmp_path / "data").mkdir()
    path = table({"prompt": "Why?", "chosen": answers[0], "rejected": answers[1]}, name="data/train.csv")
    for source in (path, path.parent):
        (pair,) = read(source)[0]
        assert (pair.chosen, pair.rejected) == ("Yes.", "No.")


def test_texts_of_a_table_that_look_like_json_stay_texts(table):
    record = {"prompt": '["a"]', "chosen": '{"name": "tea"}', "rejected": "[1, 2]"}
    assert read(table(record))[0] == [
        PreferencePair("2", ({"role": "user", "content": '["a"]'},), '{"name": "tea"}', "[1, 2]")
    ]


def test_texts_of_json_lines_that_spell_messages_stay_texts(write):
    spelt = json.dumps([USER, GOOD])
    assert read(write({"prompt": "Write JSON.", "chosen": spelt, "rejected": "No."}))[0][0].chosen == spelt


def test_bad_tables_are_one_clear_line(tmp_path):
    for text, message in (
        ("prompt,chosen,chosen\na,b,c\n", "not a table with a header row (two columns are named 'chosen')"),
        ('prompt,chosen,rejected\n"a\n', "not a table with a header row ("),
        ("Why?,Yes.,No.\nWho?,Me.,You.\n", "no preference pair in the columns found: Why?, Yes., No."),
        ("prompt,chosen,rejected\n", "is empty: expected preference pairs"),
        ("", "is empty: expected preference pairs"),
    ):
        (tmp_path / "p.csv").write_text(text)
        with pytest.raises(DataError) as caught:
            read(tmp_path / "p.csv")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected\na,b\n\nWhy?,Yes.,No.\n" + f"Why?,{'x' * 200_000},No.\n")
    pairs, skipped, _ = read(tmp_path / "p.csv")
    assert [pair.id for pair in pairs] == ["4", "5"]
    assert skipped == [SkippedRecord(2, "2 cells, but the header has 3")]


def test_prompts_may_come_from_a_table(table):
    assert read_prompts(table({"prompt": "Why?"}, {"prompt": json.dumps([USER])})) == ["Why?", [USER]]


# --- named columns ---------------------------------------------------------------------------------------------------

OWN = {"ask": "Why?", "good": "Yes.", "bad": "No.", "sys": "Be brief.", "prompt": "not this one"}
NAMED = {"chosen": "good", "rejected": "bad", "prompt": "ask"}


def test_named_columns_are_read_and_no_others(write):
    pairs, _, (shape,) = read(write(OWN), columns=NAMED)
    assert pairs == [PAIR]
    assert str(shape) == "pairs read as named columns (ask, good, bad): as --columns says; not used: sys, prompt"
    pairs, _, (shape,) = read(write(OWN, OWN | {"sys": None}), columns=NAMED | {"system": "sys"})
    assert [pair.prompt for pair in pairs] == [(SYSTEM, USER), (USER,)]
    assert shape.columns == ("ask", "sys", "good", "bad")
    inside = {"good": INSIDE["chosen"], "bad": INSIDE["rejected"], "prompt": "not this one"}
    assert read(write(inside), columns={"chosen": "good", "rejected": "bad"})[0] == [PAIR]
    tied = BINARIZED | {"score_chosen": 6.0, "tools": [CALL]}
    assert read(write(tied), columns={"chosen": "chosen", "rejected": "rejected"})[0] == [PAIR]


@pytest.mark.parametrize("key", ["chosen", "rejected", "prompt", "system"])
def test_an_unknown_column_is_one_line_with_the_columns_found(write, key):
    with pytest.raises(DataError) as caught:
        read(write(OWN), columns=NAMED | {key: "typo"})
    assert "missing column 'typo' (found ask, good, bad, sys, prompt)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_setting_is_a_text_or_a_mapping(tmp_path):
    text = "chosen=good,rejected=bad,prompt=ask"
    assert DataSettings(source="x", columns=text).columns == NAMED  # type: ignore[arg-type]
    assert DataSettings(source="x", columns=NAMED).columns == NAMED
    for profile in (text, json.dumps(NAMED)):
        (tmp_path / "p.yaml").write_text(
            f"patient: {{model: m}}\ndata: {{source: x, columns: {profile!s}}}\n".replace(
                ": chosen=", ": 'chosen="
            ).replace("=ask}", "=ask'}")
        )
        assert load_profile(tmp_path / "p.yaml").data == DataSettings(source="x", columns=NAMED)
    for wrong in (
        "chosen=a",
        "chosen=a,rejected",
        "chosen=a,rejected=",
        "chosen=a,rejected=b,answer=c",
        "chosen=a,chosen=b,rejected=c",
        ["a"],
        {"chosen": 1, "rejected": "b"},
    ):
        with pytest.raises(
            UsageError, match=r"columns: expected chosen=A,rejected=B\[,prompt=C,system=D\] with names of columns, got"
        ):
            checked(DataSettings, {"source": "x", "columns": wrong})


def test_named_columns_are_part_of_what_a_rewards_folder_was_made_from(write, tiny_model, tmp_path):
    patient = load_patient(tiny_model())
    source = str(write(OWN | {"chosen": "Sure.", "rejected": "Never."}))
    list(extract(patient, DataSettings(source=source), FACES, tmp_path / "a"))
    assert "columns" not in RewardsFolder(tmp_path / "a").meta["dataset"], "a folder of an earlier version can go on"
    assert list(extract(patient, DataSettings(source=source), FACES, tmp_path / "a")) == []
    with pytest.raises(LoadError, match="columns"):
        list(extract(patient, DataSettings(source=source, columns=NAMED), FACES, tmp_path / "a"))
    found: list[PairShape] = []
    list(extract(patient, DataSettings(source=source, columns=NAMED), FACES, tmp_path / "b", on_shape=found.append))
    assert RewardsFolder(tmp_path / "b").meta["dataset"]["columns"] == NAMED
    assert [shape.name for shape in found] == ["named columns"]


def test_the_command_says_in_one_line_on_stderr_what_was_taken(write, tiny_model, tmp_path):
    arguments = ["extract", "--patient", str(tiny_model()), "--face", "polite", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--data", str(write(*WHOLE["HelpSteer2"]))])
    assert result.exit_code == 0, result.output
    assert result.stderr.count("pairs read as HelpSteer2 (prompt, response, helpfulness): of consecutive rows") == 1
    assert "pairs read as" not in result.stdout
    named = ["--columns", "chosen=good,rejected=bad,prompt=ask", "--output", str(tmp_path / "own")]
    result = CliRunner().invoke(app, [*arguments, "--data", str(write(OWN)), *named])
    assert result.exit_code == 0, result.output
    assert "pairs read as named columns (ask, good, bad)" in result.stderr
    result = CliRunner().invoke(app, [*arguments, "--data", str(write({"text": "x"}))])
    assert result.exit_code != 0
    assert "no preference pair in the columns found: text" in result.stderr
    assert "--columns chosen=A,rejected=B" in result.stderr
