"""Measures of a set of answers that need no judge: length, variety, repetition, distance from the patient.

Every number comes as an `Estimate` with its 95% interval. What varies is the prompts: answers to one prompt resemble
each other, so they count as one group, and the interval is over groups.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

from llmdoctor.records import Answer, Estimate

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")
_SHORTEST_SENTENCE = 3  # words: "Yes." and "1." may come again
_Z = 1.959963984540054  # half the width of a 95% interval, in standard errors
# Student's t, 97.5%, for 1 to 10 degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def measures(answers: Sequence[Answer], groups: Sequence[Hashable] | None = None) -> dict[str, Estimate]:
    """What `text_measures` finds, and what the tokens tell.

    ``groups`` names the prompt of every answer; by default each answer has a prompt of its own. ``tokens`` is the
    length of an answer. ``kl_per_token`` is KL(guided || patient), ``patient_logprob`` and, by doctor,
    ``NAME_logprob`` are the log-probs of the tokens under each model, all in nats per token. ``changed`` is the share
    of places where guidance changed the likeliest token, in [0, 1]; ``unfinished`` the share of answers cut by the
    length limit.
    """
    lengths = [len(answer.tokens) for answer in answers]
    doctors = answers[0].tokens[0].doctor_logprobs if answers and answers[0].tokens else {}

    def per_token(values: Iterable[float]) -> Estimate:
        return rate(list(values), lengths, groups)

    return {
        "tokens": rate(lengths, groups=groups),
        "kl_per_token": kl_per_token(answers, groups),
        "patient_logprob": per_token(sum(token.patient_logprob for token in answer.tokens) for answer in answers),
        **{
            f"{name}_logprob": per_token(
                sum(token.doctor_logprobs[name] for token in answer.tokens) for answer in answers
            )
            for name in doctors
        },
        "changed": per_token(sum(token.flip for token in answer.tokens) for answer in answers),
        "unfinished": rate([not answer.finished for answer in answers], groups=groups),
        **text_measures([answer.text for answer in answers], groups),
    }


def kl_per_token(answers: Sequence[Answer], groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean KL(guided || patient) of a token, in nats."""
    totals = [sum(token.kl for token in answer.tokens) for answer in answers]
    return rate(totals, [len(answer.tokens) for answer in answers], groups)


def text_measures(texts: Sequence[str], groups: Sequence[Hashable] | None = None) -> dict[str, Estimate]:
    """Lengths, repetition and variety; all but ``words`` are in [0, 1].

    ``repeated_sentences`` is the share of sentences that come again, ``repeating`` the share of answers with one.
    """
    repeated = [repeated_sentences(text) for text in texts]
    return {
        "words": rate([len(text.split()) for text in texts], groups=groups),
        "repeated_sentences": rate([again for again, _ in repeated], [count for _, count in repeated], groups),
        "repeating": rate([again > 0 for again, _ in repeated], groups=groups),
        "distinct_2": distinct_estimate(texts, 2, groups),
        "distinct_4": distinct_estimate(texts, 4, groups),
    }


def rate(
    totals: Sequence[float], counts: Sequence[float] | None = None, groups: Sequence[Hashable] | None = None
) -> Estimate:
    """sum(totals) / sum(counts), with ``counts`` of 1 the mean, and its 95% interval over groups.

    KL per token, for example, has an answer's KL as total and its tokens as count: every token weighs the same. The
    interval is Student's t of the linearised ratio. It is nan for a single group; all is nan if there is nothing to
    count.
    """
    sums: dict[Hashable, list[float]] = {}
    for i, total in enumerate(totals):
        group = sums.setdefault(i if groups is None else groups[i], [0.0, 0.0])
        group[0] += total
        group[1] += 1.0 if counts is None else counts[i]
    size, number = sum(count for _, count in sums.values()), len(sums)
    if not size:
        return Estimate(math.nan, math.nan, math.nan)
    value = sum(total for total, _ in sums.values()) / size
    if number < 2:
        return Estimate(value, math.nan, math.nan)
    spread = sum((total - value * count) ** 2 for total, count in sums.values()) * number / (number - 1)
    return _around(value, math.sqrt(spread) / size, number)


def share(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of values in [0, 1], with Wilson's 95% interval: it has a width also where all values are alike.

    The interval is that of as many values as there are groups. All is nan if there are no values.
    """
    if not values:
        return Estimate(math.nan, math.nan, math.nan)
    return wilson(sum(values) / len(values), len(set(groups)) if groups is not None else len(values))


def wilson(share: float, number: int) -> Estimate:
    """Wilson's 95% interval of a share of ``number`` cases."""
    centre = (share + _Z**2 / (2 * number)) / (1 + _Z**2 / number)
    half = _Z / (1 + _Z**2 / number) * math.sqrt(share * (1 - share) / number + _Z**2 / (4 * number**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def distinct_estimate(texts: Sequence[str], n: int = 4, groups: Sequence[Hashable] | None = None) -> Estimate:
    """`distinct_n` with its 95% interval: the jackknife over groups. It is nan for a single group.

    Compare sets of the same size only: the more text, the fewer of its n-grams are new.
    """
    by_group: dict[Hashable, Counter[tuple[str, ...]]] = {}
    for i, text in enumerate(texts):
        by_group.setdefault(i if groups is None else groups[i], Counter()).update(_ngrams([text], n))
    whole: Counter[tuple[str, ...]] = Counter()
    for counts in by_group.values():
        whole.update(counts)
    kinds, total, number = len(whole), whole.total(), len(by_group)
    value = kinds / total if total else 0.0
    if number < 2:
        return Estimate(value, math.nan, math.nan)
    without = []
    for counts in by_group.values():
        rest = total - counts.total()
        lost = sum(whole[ngram] == count for ngram, count in counts.items())
        without.append((kinds - lost) / rest if rest else 0.0)
    mean = sum(without) / number
    return _around(value, math.sqrt((number - 1) / number * sum((x - mean) ** 2 for x in without)), number)


def distinct_n(answers: Sequence[str], n: int = 4) -> float:
    """The share of distinct word n-grams among all word n-grams of the answers; 0 if there are none."""
    counts = _ngrams(answers, n)
    return len(counts) / counts.total() if counts else 0.0


def entropy_n(answers: Sequence[str], n: int = 4) -> float:
    """Entropy, in nats, of the distribution of word n-grams over all answers."""
    counts = _ngrams(answers, n)
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values())


def repeated_sentences(text: str) -> tuple[int, int]:
    """How many sentences say word for word what an earlier one said, and how many there are.

    Case and white space do not count. Sentences of fewer than three words are left out.
    """
    sentences = [" ".join(words).casefold() for words in map(str.split, _SENTENCE_END.split(text))]
    sentences = [sentence for sentence in sentences if sentence.count(" ") >= _SHORTEST_SENTENCE - 1]
    return len(sentences) - len(set(sentences)), len(sentences)


def estimates_to_dict(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """As plain values: {"tokens": {"value": 41.0, "low": 38.2, "high": 43.8}}."""
    return {name: {"value": e.value, "low": e.low, "high": e.high} for name, e in estimates.items()}


def _ngrams(texts: Iterable[str], n: int) -> Counter[tuple[str, ...]]:
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.split()
        counts.update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return counts


def _around(value: float, error: float, number: int) -> Estimate:
    """The 95% interval of a value whose standard error comes from ``number`` groups."""
    freedom = number - 1
    if freedom <= len(_T):
        t = _T[freedom - 1]
    else:  # Cornish and Fisher: right to three digits from 11 degrees of freedom on
        t = 1.95996 + 2.3723 / freedom + 2.8225 / freedom**2 + 2.556 / freedom**3
    return Estimate(value, value - t * error, value + t * error)
