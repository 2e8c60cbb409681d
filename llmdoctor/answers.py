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


def measures(
    answers: Sequence[Answer], groups: Sequence[Hashable] | None = None, seconds: Sequence[float] | None = None
) -> dict[str, Estimate]:
    """What `text_measures` finds, and what the tokens tell.

    ``groups`` names the prompt of every answer; by default each answer has a prompt of its own. ``tokens`` is the
    length of an answer. ``kl_per_token`` is KL(guided || patient) and ``kl`` its sum over an answer;
    ``patient_logprob`` and, by doctor, ``NAME_logprob`` are the log-probs of a token under each model; all in nats.
    ``changed`` is the share of places where guidance changed the likeliest token, in [0, 1], and surely 0 where no
    doctor had a beta above 0; ``unfinished`` the share of answers cut by the length limit. ``tokens_per_second`` is
    there if the answers' ``seconds`` are given.
    """
    lengths = [len(answer.tokens) for answer in answers]
    doctors = answers[0].tokens[0].doctor_logprobs if answers and answers[0].tokens else {}

    def per_token(values: Iterable[float]) -> Estimate:
        return rate(list(values), lengths, groups)

    return {
        "tokens": rate(lengths, groups=groups),
        "kl_per_token": kl_per_token(answers, groups),
        "kl": rate([sum(token.kl for token in answer.tokens) for answer in answers], groups=groups),
        "patient_logprob": per_token(sum(token.patient_logprob for token in answer.tokens) for answer in answers),
        **{
            f"{name}_logprob": per_token(
                sum(token.doctor_logprobs[name] for token in answer.tokens) for answer in answers
            )
            for name in doctors
        },
        "changed": _changed(answers, groups),
        "unfinished": share([not answer.finished for answer in answers], groups),
        **text_measures([answer.text for answer in answers], groups),
        **({"tokens_per_second": _speed(lengths, seconds)} if seconds is not None else {}),
    }


def _changed(answers: Sequence[Answer], groups: Sequence[Hashable] | None) -> Estimate:
    if not any(beta for answer in answers for token in answer.tokens for beta in token.betas.values()):
        return Estimate(0.0, 0.0, 0.0)  # by definition: further answers would not change it
    flips = [sum(token.flip for token in answer.tokens) for answer in answers]
    return share(flips, groups, [len(answer.tokens) for answer in answers])


def _speed(lengths: Sequence[int], seconds: Sequence[float]) -> Estimate:
    """Without an interval: answers share the time of their batch, so they do not tell how sure it is."""
    return Estimate(rate(lengths, seconds).value, math.nan, math.nan)


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
        "repeated_sentences": share([again for again, _ in repeated], groups, [count for _, count in repeated]),
        "repeating": share([again > 0 for again, _ in repeated], groups),
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


def share(
    values: Sequence[float], groups: Sequence[Hashable] | None = None, counts: Sequence[float] | None = None
) -> Estimate:
    """sum(values) / sum(counts) in [0, 1], with Wilson's 95% interval: it has a width also where all cases are alike.

    Without ``counts`` every value is a share itself, and there are as many cases as groups. With them a value is how
    many of so many cases, such as the tokens of an answer, and cases of a group resemble each other: the interval is
    that of as many independent cases as would have the standard error that `rate` finds over groups (Korn and
    Graubard, 1998). All is nan if there is nothing to count; with ``counts`` the interval is nan for a single group.
    """
    if counts is None:
        if not values:
            return Estimate(math.nan, math.nan, math.nan)
        return wilson(sum(values) / len(values), len(set(groups)) if groups is not None else len(values))
    found = rate(values, counts, groups)
    if math.isnan(found.low):
        return found
    if not 0 < found.value < 1:
        return wilson(found.value, len(set(groups)) if groups is not None else len(values))
    half = found.high - found.value
    cases = found.value * (1 - found.value) * (_Z / half) ** 2 if half else math.inf
    return wilson(found.value, min(cases, sum(counts)))


def share_difference(
    first: Sequence[float], second: Sequence[float], groups: Sequence[Hashable] | None = None
) -> Estimate:
    """share(first) - share(second) of the same cases in [-1, 1], with Newcombe's 95% interval for paired shares.

    That is method 10 of Newcombe (1998). It joins the two Wilson intervals by the correlation of the cases, so it does
    not pass -1 or 1. A correlation above 0 is corrected for continuity: few cases that agree do not make it certain.
    """
    a, b = share(first, groups), share(second, groups)
    n = len(first)
    product = n * sum(x * y for x, y in zip(first, second, strict=True)) - sum(first) * sum(second)
    spreads = (math.sqrt(max(0.0, n * sum(x * x for x in cases) - sum(cases) ** 2)) for cases in (first, second))
    spread = math.prod(spreads)
    together = (max(product - n / 2, 0.0) if product > 0 else product) / spread if spread else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 + other**2 - 2 * together * one * other))

    value = a.value - b.value
    low = value - reach(a.value - a.low, b.high - b.value)
    return Estimate(value, low, value + reach(a.high - a.value, b.value - b.low))


def wilson(share: float, number: float) -> Estimate:
    """Wilson's 95% interval of a share of ``number`` cases."""
    centre = (share + _Z**2 / (2 * number)) / (1 + _Z**2 / number)
    half = _Z / (1 + _Z**2 / number) * math.sqrt(share * (1 - share) / number + _Z**2 / (4 * number**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def distinct_estimate(texts: Sequence[str], n: int = 4, groups: Sequence[Hashable] | None = None) -> Estimate:
    """`distinct_n` with its 95% interval in [0, 1]: the jackknife over groups, on the scale of log-odds.

    It is nan for a single group, and where every n-gram is distinct: nothing then tells how sure that is. All is nan
    where no text has n words.
    Compare sets of the same size only: the more text, the fewer of its n-grams are new.
    """
    by_group: dict[Hashable, Counter[tuple[str, ...]]] = {}
    for i, text in enumerate(texts):
        by_group.setdefault(i if groups is None else groups[i], Counter()).update(_ngrams([text], n))
    whole: Counter[tuple[str, ...]] = Counter()
    for counts in by_group.values():
        whole.update(counts)
    kinds, total, number = len(whole), whole.total(), len(by_group)
    value = kinds / total if total else math.nan
    if number < 2 or not 0 < value < 1:
        return Estimate(value, math.nan, math.nan)
    without = []
    for counts in by_group.values():
        rest = total - counts.total()
        lost = sum(whole[ngram] == count for ngram, count in counts.items())
        without.append((kinds - lost) / rest if rest else 0.0)
    mean = sum(without) / number
    error = math.sqrt((number - 1) / number * sum((x - mean) ** 2 for x in without))
    odds = _around(math.log(value / (1 - value)), error / (value * (1 - value)), number)
    return Estimate(value, *(1 / (1 + math.exp(-x)) for x in (odds.low, odds.high)))


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
