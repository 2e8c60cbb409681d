"""Guided answers beside the patient's: several guidances in one pass, and the summary of made-up answers by hand."""

from collections.abc import Sequence
from typing import Any

import pytest

from llmdoctor import LLMdoctor
from llmdoctor.comparing import compared
from llmdoctor.evaluation.judge import Judge
from llmdoctor.evaluation.winning import Exchange, summarise
from llmdoctor.records import Answer, Comparison, GuidedToken, Question
from llmdoctor.settings import Guidance

QUESTIONS = [Question("a", ("How can I sleep better?", "What else helps?")), Question("b", ("How do I save money?",))]


@pytest.fixture(scope="module")
def clinic() -> LLMdoctor:
    return LLMdoctor.from_profile("clinic", dtype="float32", beta={"safe": 0.0})


def strengths(clinic: LLMdoctor, *betas: float) -> list[Guidance]:
    return [clinic.guidance.replace(betas={"helpful": beta, "safe": 0.0}) for beta in betas]


def test_several_guidances_are_as_many_runs_but_the_patient_speaks_once(clinic: LLMdoctor) -> None:
    counts = {"patient": 0, "guided": 0}

    def run(guidances: Sequence[Guidance], **how: Any) -> list[Comparison]:
        def on_token(side: str, _token: GuidedToken) -> None:
            counts[side] += 1

        counts.update(patient=0, guided=0)
        return list(compared(clinic, QUESTIONS, seed=5, samples=2, guidances=guidances, on_token=on_token, **how))

    how: dict[str, Any] = {"rows": 3, "max_new_tokens": 6}
    one, three = (run(strengths(clinic, beta), **how) for beta in (1.0, 3.0))
    both = run(strengths(clinic, 1.0, 3.0), **how)
    assert counts["guided"] == sum(len(c.guided.tokens) for c in both)
    assert counts["patient"] == sum(len(c.patient.tokens) for c in one)
    texts = [(c.id, c.sample, c.turn, c.settings["betas"]["helpful"], c.patient.text, c.guided.text) for c in both]
    assert sorted(texts) == sorted(
        (c.id, c.sample, c.turn, c.settings["betas"]["helpful"], c.patient.text, c.guided.text) for c in one + three
    )
    # a conversation's comparisons follow each other, guidance after guidance, turn after turn
    assert list(dict.fromkeys(text[:2] for text in texts)) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert [(t[3], t[2]) for t in texts[:4]] == [(1.0, 1), (1.0, 2), (3.0, 1), (3.0, 2)]
    rest = run(strengths(clinic, 1.0, 3.0), skip=5, **how)
    assert [c.guided.text for c in rest] == [c.guided.text for c in both[5:]]
    assert counts["patient"] == sum(len(c.patient.tokens) for c in one[2:])  # the first conversation is not repeated


def made(id: str, prompt: str, patient: str, guided: str, *, beta: float = 1.0, turn: int = 1) -> Comparison:
    def answer(text: str, kl: float) -> Answer:
        facts = {"position": 0, "id": 1, "patient_logprob": -1.0, "doctor_logprobs": {}, "logprob": -1.0}
        rest = {"values": {}, "flip": False, "kl": kl, "alpha": 1.0, "betas": {}}
        return Answer(text, tuple(GuidedToken(text=word, **facts, **rest) for word in text.split()), True)  # type: ignore[arg-type]

    settings = {"betas": {"helpful": beta}}
    metrics = {"patient_seconds": 2.0, "guided_seconds": 1.0}
    return Comparison(prompt, settings, answer(patient, 0.0), answer(guided, 0.5), metrics, id, turn)


def test_a_summary_worked_by_hand() -> None:
    """The judge counts words. Guided wins on a, loses on b, ties on c: 50%. Scores 2, 3, 1 against 1, 4, 1: gain 0.

    KL per answer is half the words: 1, 1.5, 0.5. The guided side says 6 words in 3 seconds, the patient 6 in 6.
    """
    judge = Judge("words", "scalar", lambda asked: (len(request["answer"].split()) for request in asked))
    comparisons = [made("a", "p", "x", "x y"), made("b", "q", "x y z w", "x y z"), made("c", "r", "x", "y")]
    found = summarise(comparisons, judge)
    (setting,) = found.settings
    assert (found.prompts, found.answers) == (3, 3)
    assert setting.judged is not None
    values = {name: value["value"] for name, value in setting.judged.to_dict().items()}
    assert values == {"win_rate": 0.5, "patient_score": 2.0, "guided_score": 2.0, "gain": 0.0}
    assert setting.measures["kl"].value == 1.0
    assert setting.measures["tokens_per_second"].value == 2.0
    assert found.patient["tokens_per_second"].value == 1.0
    assert found.patient["kl"].value == 0.0


def test_settings_are_told_apart_and_several_turns_are_judged_together() -> None:
    asked: list[Any] = []

    def ask(requests: Any) -> Any:
        asked.extend(requests)
        return iter(["a"] * len(requests))

    comparisons = [
        made("m", "first", "p1", "g1", beta=2.0),
        made("m", "second", "p2", "g2", beta=2.0, turn=2),
        made("m", "first", "p1", "h1", beta=0.5),
        made("m", "second", "p2", "h2", beta=0.5, turn=2),
    ]
    found = summarise(comparisons, Judge("first", "pairwise", ask))
    assert [setting.betas for setting in found.settings] == [{"helpful": 2.0}, {"helpful": 0.5}]
    assert (found.prompts, found.answers) == (1, 2)
    assert len(asked) == 4
    assert asked[0] == {"prompt": ["first", "second"], "a": ["g1", "g2"], "b": ["p1", "p2"]}
    assert Exchange.of(comparisons[:1]) == Exchange("first", "p1", "g1")
