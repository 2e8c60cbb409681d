"""Which behaviours the preferences reward, how surely, and whether that predicts pairs the fit has not seen.

The fit is that of direction "fitted" (`llmdoctor.token_rewards.fit`); the paper (arXiv 2601.10416) has one face pair
and nothing like it. It costs no training: only the log-probs that extract has stored. Where the folder has a probe
(`llmdoctor.token_rewards.probe`), it stands beside the faces, and the diagnosis says which of them to train on.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdoctor.answers import wilson
from llmdoctor.errors import DataError, UsageError
from llmdoctor.records import Estimate, PairScores
from llmdoctor.settings import RewardSettings
from llmdoctor.token_rewards.fit import Doubles, bradley_terry, deviations, features, newton, shares
from llmdoctor.token_rewards.formula import ADVANTAGE, PROBE, face_names

_Z = 1.959963984540054  # half the width of a 95% interval, in standard errors
_EXAMPLES = 3
_MAX_FACES = 16  # the shares need every subset of the face pairs
_FEW_PAIRS = 100


@dataclass(frozen=True, slots=True)
class Example:
    """A pair and what one face pair contributes to its prediction: w_j x_pj, in log-odds of the preferred answer."""

    pair_id: str
    contribution: float


@dataclass(frozen=True, slots=True)
class FaceDiagnosis:
    """How much one behaviour weighs in the labels.

    ``weight`` is w_j: log-odds per unit of summed signed importance, the factor of direction "fitted". ``standardised``
    is the same per standard deviation of x_j among these pairs (``scale``, taken about zero), so that behaviours can be
    compared. ``share`` in [0, 1] is the part of the explained preference that is due to this face pair; ``agreement``
    the part of the pairs whose preferred answer shows more of the behaviour (ties count half). ``best`` and ``worst``
    are the pairs that it explains best and contradicts most.
    """

    name: str
    weight: Estimate
    standardised: Estimate
    scale: float
    share: float
    agreement: float
    best: tuple[Example, ...]
    worst: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Which behaviours a set of preferences rewards, how surely, and whether that predicts held-out pairs.

    ``accuracy``, ``length_accuracy`` and ``combined_accuracy`` are the parts of held-out pairs that are predicted from
    the face pairs, from the lengths of the answers alone, and from both (ties count half; ``chance`` is 0.5).
    ``beyond_length`` is ``accuracy`` - ``length_accuracy``, ``added_to_length`` ``combined_accuracy`` -
    ``length_accuracy``; ``longer_preferred`` is the part of the pairs whose preferred answer has more tokens.
    ``explains`` says whether the face pairs explain anything; ``verdict`` sums it all up in words.

    With a probe, ``probe_accuracy`` is the part of the pairs that the sum of its rewards predicts, each by a fit that
    has not seen its prompt, and ``joint_accuracy`` that of a fit over faces and probe; ``probe_beyond_faces`` and
    ``probe_beyond_length`` are differences, as above. ``train_on`` is the direction to choose for these pairs:
    "advantage" (of the probe's two rewards the better one on human labels, see docs/benchmarks.md), "fitted" (of the
    faces, and of the probe where it is one of them), or "" where nothing predicts them.
    """

    pairs: int
    faces: tuple[FaceDiagnosis, ...]
    accuracy: Estimate
    length_accuracy: Estimate
    combined_accuracy: Estimate
    beyond_length: Estimate
    added_to_length: Estimate
    longer_preferred: float
    chance: float
    explains: bool
    verdict: str
    settings: dict[str, Any]
    probe_accuracy: Estimate | None = None
    joint_accuracy: Estimate | None = None
    probe_beyond_faces: Estimate | None = None
    probe_beyond_length: Estimate | None = None
    train_on: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return asdict(self)


def diagnose(
    pairs: Iterable[PairScores],
    faces: Iterable[str],
    settings: RewardSettings,
    *,
    seed: int = 0,
    resamples: int = 1000,
    folds: int = 10,
) -> Diagnosis:
    """Fit the labels of ``pairs`` over ``faces`` (or over ``settings.faces``) and say what that shows, and how surely.

    Pairs are streamed: only their features, lengths and ids are kept. The weights are those of direction "fitted" at
    the same ``settings``, whichever direction these name. The same arguments give the same diagnosis.

    - Weights: 2.5th to 97.5th percentile of ``resamples`` refits, each to convergence, with every pair's count drawn
      from Poisson(1). This is the bootstrap over pairs except that the total varies, which does not change the fit.
    - Accuracies: ``folds``-fold cross-validation over shuffled pairs, with Wilson's interval; differences have the
      interval of the paired mean. The length feature is log(tokens preferred / tokens rejected).
    - Shares: the Shapley value of each face pair in the gain of log-likelihood over chance, in the quadratic
      approximation at the fit (LMG, in the case of least squares): the gain that the face pair brings when it joins the
      others, averaged over all orders of joining. None is negative, and they add up to 1, or are all 0.

    Raises DataError (fewer than 2 pairs, log-probs that are not finite) and UsageError (an unknown face pair, more than
    16 of them, a setting out of range).
    """
    given = tuple(faces)
    names = tuple(name for name in settings.faces or given if name != PROBE)
    if names:
        names = face_names(given, settings.model_copy(update={"faces": names, "direction": "fitted"}))
    if len(names) > _MAX_FACES:
        raise UsageError(f"expected at most {_MAX_FACES} face pairs to diagnose, got {len(names)}: choose some of them")
    if resamples < 1 or folds < 2 or seed < 0:
        raise UsageError(
            f"expected resamples >= 1, folds >= 2 and seed >= 0, got {resamples}, {folds} and {seed}: change them"
        )
    signals = (*names, PROBE) if PROBE in given else names
    x_P_S, lengths_P_2, ids = features(pairs, signals, settings)
    x_P_F = x_P_S[:, : len(names)]
    if len(ids) < 2:
        raise DataError(f"a diagnosis needs at least 2 pairs (some hundreds to say much), got {len(ids)}: extract more")
    diagnosed = _face_diagnoses(x_P_F, names, ids, seed, resamples)
    longer_P = np.log(lengths_P_2[:, 0] / lengths_P_2[:, 1])
    fold_P = np.random.default_rng(seed).permutation(len(ids)) % folds
    by_faces_P, by_length_P, by_both_P = (
        _held_out(x, fold_P) for x in (x_P_F, longer_P[:, None], np.column_stack([x_P_F, longer_P]))
    )
    accuracy = _wilson(by_faces_P)
    used = {"tau": settings.tau, "theta": settings.theta, "eps": settings.eps}
    used |= {"seed": seed, "resamples": resamples, "folds": min(folds, len(ids))}
    found = Diagnosis(
        pairs=len(ids),
        faces=diagnosed,
        accuracy=accuracy,
        length_accuracy=_wilson(by_length_P),
        combined_accuracy=_wilson(by_both_P),
        beyond_length=_paired(by_faces_P - by_length_P),
        added_to_length=_paired(by_both_P - by_length_P),
        longer_preferred=float(_correct(longer_P).mean()),
        chance=0.5,
        explains=accuracy.low > 0.5 and not all(face.weight.covers(0) for face in diagnosed),
        verdict="",
        settings=used,
    )
    if PROBE in given:
        by_probe_P = _correct(x_P_S[:, -1])
        by_all_P = _held_out(x_P_S, fold_P)
        found = replace(
            found,
            probe_accuracy=_wilson(by_probe_P),
            joint_accuracy=_wilson(by_all_P),
            probe_beyond_faces=_paired(by_probe_P - by_faces_P),
            probe_beyond_length=_paired(by_probe_P - by_length_P),
        )
        found = replace(found, train_on=_choice(found, _paired(by_all_P - by_probe_P)))
    elif found.explains:
        found = replace(found, train_on="fitted")
    return replace(found, verdict=_verdict(found))


def _choice(found: Diagnosis, joint_beyond_probe: Estimate) -> str:
    """The direction to train on, where there is a probe: the simplest that nothing surely beats."""
    assert found.probe_accuracy is not None
    assert found.probe_beyond_faces is not None
    assert found.joint_accuracy is not None
    if found.faces and joint_beyond_probe.low > 0 and found.joint_accuracy.low > found.chance:
        return "fitted"
    if found.probe_accuracy.low > found.chance:
        # where both predict equally well the faces are the surer signal: they say what is meant, and prune tokens
        return "fitted" if found.explains and found.probe_beyond_faces.value <= 0 else ADVANTAGE
    return "fitted" if found.explains else ""


def _face_diagnoses(
    x_P_F: Doubles, names: Sequence[str], ids: Sequence[str], seed: int, resamples: int
) -> tuple[FaceDiagnosis, ...]:
    """The weight of every face pair with its bootstrap interval, share, agreement and examples."""
    if not names:
        return ()
    scale_F = deviations(x_P_F)
    z_P_F = x_P_F / scale_F
    weights_F = bradley_terry(x_P_F)
    per_sd_F = weights_F * scale_F
    # A thousandth of a standard deviation is far below the width of an interval.
    resampled_Q_F = newton(z_P_F, np.tile(per_sd_F, (resamples, 1)), seed, tolerance=1e-3)
    low_F, high_F = np.percentile(resampled_Q_F, [2.5, 97.5], axis=0)
    shares_F = shares(z_P_F, per_sd_F)
    return tuple(
        FaceDiagnosis(
            name=name,
            weight=Estimate(float(weights_F[j]), float(low_F[j] / scale_F[j]), float(high_F[j] / scale_F[j])),
            standardised=Estimate(float(per_sd_F[j]), float(low_F[j]), float(high_F[j])),
            scale=float(scale_F[j]) if x_P_F[:, j].any() else 0.0,
            share=float(shares_F[j]),
            agreement=float(_correct(x_P_F[:, j]).mean()),
            best=_examples(ids, -weights_F[j] * x_P_F[:, j], -1.0),
            worst=_examples(ids, weights_F[j] * x_P_F[:, j], 1.0),
        )
        for j, name in enumerate(names)
    )


def _correct(margins_P: Doubles) -> Doubles:
    """1 where the margin is on the label's side, 0 where it is not, half for a tie."""
    return np.asarray((1 + np.sign(margins_P)) / 2)


def _held_out(x_P_F: Doubles, fold_P: NDArray[np.int64]) -> Doubles:
    """Whether each pair is predicted by the fit on the other folds [P]."""
    correct = np.empty(len(x_P_F))
    for fold in np.unique(fold_P):
        own = fold_P == fold
        correct[own] = _correct(x_P_F[own] @ bradley_terry(x_P_F[~own]))
    return correct


def _wilson(correct_P: Doubles) -> Estimate:
    """The mean of zeros, halves and ones, with Wilson's interval."""
    return wilson(float(correct_P.mean()), len(correct_P))


def _paired(differences_P: Doubles) -> Estimate:
    """The mean of paired differences, with its normal interval."""
    mean = float(differences_P.mean())
    half = _Z * float(differences_P.std(ddof=1)) / math.sqrt(len(differences_P))
    return Estimate(mean, mean - half, mean + half)


def _examples(ids: Sequence[str], order_P: Doubles, sign: float) -> tuple[Example, ...]:
    """The pairs of the least values in ``order_P``, as long as these are below zero; contributions are sign * value."""
    first = np.argsort(order_P, kind="stable")[:_EXAMPLES]
    return tuple(Example(ids[p], sign * float(order_P[p])) for p in first if order_P[p] < 0)


def _verdict(found: Diagnosis) -> str:
    accuracy, length_accuracy, chance = found.accuracy, found.length_accuracy, found.chance
    clear = sorted(
        (face for face in found.faces if not face.weight.covers(0)), key=lambda face: -abs(face.standardised.value)
    )
    length_speaks = length_accuracy.low > chance
    longer = "longer" if found.longer_preferred > 0.5 else "shorter"
    length = f"Length alone predicts {_percent(length_accuracy)} ({longer} answers are preferred)"
    said = []
    if not found.faces:
        pass
    elif not clear and accuracy.low > chance:
        said.append(
            f"No single face is sure to explain the preferences: every weight's interval covers zero, though together "
            f"they predict {_percent(accuracy)} of held-out pairs, where chance is 50%. They may overlap: try fewer."
        )
    elif not found.explains:
        said.append(
            f"These faces do not explain the preferences: they predict {_percent(accuracy)} of held-out pairs, "
            "where chance is 50%, and " + ("every" if not clear else "not every") + " weight's interval covers zero."
        )
        if clear and accuracy.covers(chance):
            said.append(f"A slight effect of {_listed([face.name for face in clear])} may show with more pairs.")
    else:
        for word, sign in (("reward", 1), ("punish", -1)):
            if behaviours := [face for face in clear if face.weight.value * sign > 0]:
                said.append(f"These preferences {word} {_listed([_weighed(face) for face in behaviours])}.")
        said.append(f"The faces predict {_percent(accuracy)} of held-out pairs, where chance is 50%.")
        if length_speaks and found.beyond_length.low <= 0:
            said.append(f"But response length alone explains as much or more: {length[0].lower()}{length[1:]}.")
            if found.added_to_length.low > 0:
                said.append(f"Beside length the faces still add {100 * found.added_to_length.value:.1f} points.")
            else:
                said.append("Beside length the faces add nothing certain: these weights may be length in disguise.")
        elif length_speaks:
            said.append(f"{length}: the faces explain more than that.")
        else:
            said.append(f"Length alone predicts {_percent(length_accuracy)}, no better than chance.")
    if length_speaks and not found.explains:
        said.append(f"{length}.")
    said += _verdict_on_probe(found)
    if found.pairs < _FEW_PAIRS:
        said.append(f"With only {found.pairs} pairs all of this is rough.")
    return " ".join(said)


def _verdict_on_probe(found: Diagnosis) -> list[str]:
    """What the probe adds, and which signal to train on."""
    if found.probe_accuracy is None or found.probe_beyond_length is None:
        return []
    said = [f"The probe of the patient's states predicts {_percent(found.probe_accuracy)} of held-out pairs."]
    if found.train_on == ADVANTAGE:
        said.append("Train on the probe (--direction advantage).")
    elif found.train_on == "fitted":
        said.append("Train on faces and probe together (--direction fitted), or on the faces alone (add --face NAME).")
    else:
        said.append("Nothing here predicts these preferences: more pairs, or other faces, before any training.")
    if found.train_on == ADVANTAGE and found.probe_beyond_length.low <= 0:
        said.append("It does not surely say more than the length of the answers does: watch their length.")
    return said


def _percent(part: Estimate) -> str:
    return f"{100 * part.value:.1f}% ({100 * part.low:.1f} to {100 * part.high:.1f})"


def _weighed(face: FaceDiagnosis) -> str:
    weight = face.weight
    return f"{face.name} (weight {weight.value:+.3g}, {weight.low:+.3g} to {weight.high:+.3g}, share {face.share:.0%})"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
