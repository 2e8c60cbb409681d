"""Guided answers beside the patient's: the summary of made-up answers, worked by hand."""

from dataclasses import replace
from typing import Any

from llmdoctor.answers import wilson
from llmdoctor.evaluation.judge import Judge
from llmdoctor.evaluation.winning import Exchange, summarise
from llmdoctor.records import Answer, Comparison, GuidedToken


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


def test_samples_of_one_prompt_are_one_case_of_what_a_judge_agrees_on() -> None:
    """A judge that prefers "g" in either order; the answers to "c" are the same, so it is not asked."""

    def ask(requests: Any) -> Any:
        return iter(["a" if request["a"] == "g" else "b" for request in requests])

    comparisons = [
        replace(made(name, "q", "x" if name == "c" else patient, "x" if name == "c" else "g"), sample=sample)
        for name in "abc"
        for sample, patient in enumerate(("p", "q"), start=1)
    ]
    (setting,) = summarise(comparisons, Judge("g", "pairwise", ask)).settings
    assert setting.judged is not None
    assert setting.judged.agreed == wilson(1.0, 2)
    assert setting.judged.win_rate == wilson(2.5 / 3, 3)
