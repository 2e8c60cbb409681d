"""The frozen records that pass from stage to stage, and the letters that name tensor shapes.

    PreferencePair -> PairScores -> TokenRewards -> doctor -> GuidedToken -> screen

A tensor's name ends with the letters of its axes: ``logits_B_T_V`` is [rows, tokens, vocabulary].

    B  rows of a batch                       V  ids of the vocabulary
    T  tokens of a response, or of a feed    H  what a model's head reads (hidden width)
    L  positions of a row, slots of a cache  F  face pairs
    K  drafted tokens; the last K of a feed  P  pairs: of responses, or of states to compare
    J  places of a round, K + 1              S  system prompts, 2F: the positive faces, then the negative ones
    N  states of a response, T + 1           D  layers whose states are kept
                                             R  rows of a forward, where B of them are scored or in use
    M  positions of all rows, one behind     C  slots of a static cache
       the other                             Q  refits of a bootstrap

All log-probabilities are natural logarithms.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
Side = Literal["chosen", "rejected"]
Speaker = Literal["patient", "guided"]
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


class Message(TypedDict):
    """One turn of a conversation, in the shape chat templates take.

    ``tool_calls`` are an assistant's, {"type": "function", "function": {"name", "arguments": {...}}} each, and
    ``tool_call_id`` and ``name`` say what a tool's turn answers.
    """

    role: Role
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked in one conversation: user turns, each asked once the one before it is answered (MT-Bench has two).

    The first turn is a text, or messages that end with a user turn. ``id`` is the record's own, else its line;
    no two questions of a file have the same. ``fields`` are the record's other columns, as they are.

    >>> Question("81", ("Write a poem about tea.", "Now make it rhyme."), {"question_id": 81, "category": "writing"})
    """

    id: str
    turns: tuple[str | list[Message], ...]
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FacePair:
    """Two system prompts for the same patient: the behaviour wanted, and its opposite."""

    positive: str
    negative: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A conversation that ends with a user turn (or a tool's), and two answers of which people preferred the first.

    ``id`` is the line of its record; where several rows gave the pair, of the first.

    >>> PreferencePair("7", ({"role": "user", "content": "Is tea good?"},), chosen="Yes, it is.", rejected="No.")
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class PairShape:
    """How pairs were found: the data set whose shape it is, the columns that were read, and what decided.

    ``unused`` names the columns that the first of these pairs has beside them.
    """

    name: str
    columns: tuple[str, ...]
    rule: str
    unused: str = ""

    def __str__(self) -> str:
        read = f"pairs read as {self.name} ({', '.join(self.columns)}): {self.rule}"
        return f"{read}; not used: {self.unused}" if self.unused else read


@dataclass(frozen=True, slots=True)
class SkippedRecord:
    """A record that could not be used: 1-based line (or row) number, and why."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Stage 1's result for one response: what the patient thinks of each token under every face.

    ``prompt_ids`` [L] is the prompt without any face; ``response_ids`` [T] ends with the end-of-turn token.
    ``positive[name]`` and ``negative[name]`` [T] are log pi(y_t | face, x, y_<t). ``alternative_ids`` [T] is, for each
    position, the token other than y_t that the positive faces like best (mean log-prob over the face pairs), with its
    own log-probs: stage 2 may compare the value of y_t with that of this token after the same prefix. ``probe`` [T] is
    r_t under the probe of the patient's states (`llmdoctor.token_rewards.probe`), where the folder has one, and
    ``advantage`` [T] also counts what the token changes in what the rest of the answer is expected to bring.

    "Yes, it is." under one face pair; the last token is the end of turn:

        pair_id               "7"
        side                  "chosen"
        prompt_ids            [11, 52, 38, 9, 4]
        response_ids          [21, 6, 33, 52, 8, 2]                   Yes , it is . <end>
        positive              {"helpful": [-0.4, -0.3, -1.2, -0.1, -0.2, -0.1]}
        negative              {"helpful": [-2.1, -0.3, -1.3, -0.1, -0.9, -0.1]}
        alternative_ids       [24, 8, 40, 41, 6, 30]                  No . that was , It
        alternative_positive  {"helpful": [-1.6, -2.0, -1.5, -3.1, -2.4, -3.0]}
        alternative_negative  {"helpful": [-0.2, -1.9, -1.4, -3.0, -1.1, -2.9]}
    """

    pair_id: str
    side: Side
    prompt_ids: Ints
    response_ids: Ints
    positive: Mapping[str, Floats]
    negative: Mapping[str, Floats]
    alternative_ids: Ints
    alternative_positive: Mapping[str, Floats]
    alternative_negative: Mapping[str, Floats]
    probe: Floats | None = None
    advantage: Floats | None = None


@dataclass(frozen=True, slots=True)
class PairScores:
    """Both responses of one preference pair, scored: ``chosen.side`` is "chosen", and both have one ``pair_id``."""

    chosen: TokenScores
    rejected: TokenScores


@dataclass(frozen=True, slots=True)
class TokenRewards:
    """One response with its token rewards. ``rewards``, ``gaps`` and ``importance`` are [T].

    ``rewards`` is r_t (in [-1, 1] for one face pair); ``gaps`` is log pi_pos - log pi_neg in nats and ``importance``
    is S_t in [0, 1), both summed over face pairs with the weights that made ``rewards``.

    "Yes, it is." of `TokenScores` with direction gap, tau 1 and theta 0.5 (the mean |gap| is 0.42):

        gaps        [1.7, 0.0, 0.1, 0.0, 0.7, 0.0]    Yes , it is . <end>
        importance  [1.0, 0.0, 0.24, 0.0, 0.93, 0.0]
        rewards     [1.0, 0.0, 0.0, 0.0, 0.93, 0.0]
    """

    scores: TokenScores
    rewards: Floats
    gaps: Floats
    importance: Floats


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95% interval."""

    value: float
    low: float
    high: float

    def covers(self, value: float) -> bool:
        """Whether the value lies in the interval, ends included."""
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have been said at one position, with its natural log-probs at temperature 1.

    ``rank`` and ``patient_rank`` are its places in the whole vocabulary, from 1, by the product and by the patient;
    equally likely tokens share the lowest. 0 in older records.
    """

    id: int
    text: str
    patient_logprob: float
    doctor_logprobs: Mapping[str, float]
    logprob: float
    rank: int = 0
    patient_rank: int = 0


@dataclass(frozen=True, slots=True)
class GuidedToken:
    """One token of an answer with everything a screen can show about it: plain numbers, no tensors.

    ``logprob`` is the product's, ``patient_logprob`` and ``doctor_logprobs[name]`` each model's own; all natural, at
    temperature 1, before any filter. ``values[name]`` is log V(s_t) after this token. ``flip`` says that guidance
    changed the likeliest token here: the product's argmax, before sampling, is not the patient's. ``kl`` is
    KL(product || patient) in nats. ``text`` is the printable piece: it is empty for special tokens and for bytes that
    do not yet complete a character. ``patient_id`` and ``patient_text`` are what the patient alone would say here,
    after the same text: its likeliest token, or, where the answer is followed, its own draw with the same random
    numbers; -1 and "" in older records. ``top`` are as many of the product's likeliest tokens as were asked for, and
    behind them, where they are not among these, the patient's likeliest token and this one.
    """

    position: int
    id: int
    text: str
    patient_logprob: float
    doctor_logprobs: Mapping[str, float]
    logprob: float
    values: Mapping[str, float]
    flip: bool
    kl: float
    alpha: float
    betas: Mapping[str, float]
    top: tuple[Alternative, ...] = ()
    patient_id: int = -1
    patient_text: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values, keys in the order above."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer: its text and its tokens. ``finished`` is False when the length limit cut it."""

    text: str
    tokens: tuple[GuidedToken, ...]
    finished: bool

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {"text": self.text, "tokens": [token.to_dict() for token in self.tokens], "finished": self.finished}


@dataclass(frozen=True, slots=True)
class Versus:
    """One answer more to the prompt of a `Comparison`, with its own settings; ``metrics`` are those of `Comparison`.

    ``name`` says what differs from the guided answer, as ``compare --vs`` takes it.
    """

    name: str
    settings: Mapping[str, Any]
    answer: Answer
    metrics: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {
            "name": self.name,
            "settings": dict(self.settings),
            "answer": self.answer.to_dict(),
            "metrics": dict(self.metrics),
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """The patient alone beside the guided patient, on the same prompt and seed.

    ``settings`` holds alpha, betas, mode, temperature, top_k, top_p, min_p, no_repeat_ngram, max_new_tokens and seed.
    ``metrics`` holds ``flips`` (places of the guided answer where guidance changed the likeliest token), ``flip_rate``,
    ``kl`` (sum over the guided answer, nats), ``kl_per_token``, ``mean_values`` {name: mean log V}, ``patient_tokens``,
    ``guided_tokens``, ``patient_seconds``, ``guided_seconds``. ``id`` is the question's; ``turn`` and ``sample`` count
    from 1. The prompt of a later turn follows, on each side, that side's own answers to the earlier ones. ``vs`` are
    further answers.
    """

    prompt: str | list[Message]
    settings: Mapping[str, Any]
    patient: Answer
    guided: Answer
    metrics: Mapping[str, Any]
    id: str = "1"
    turn: int = 1
    sample: int = 1
    vs: tuple[Versus, ...] = ()

    def columns(self) -> "list[Comparison]":
        """A comparison of two answers for each guided one: this one, and those of ``vs``."""
        each = [replace(self, settings=o.settings, guided=o.answer, metrics=o.metrics, vs=()) for o in self.vs]
        return [replace(self, vs=()), *each]

    def to_dict(self) -> dict[str, Any]:
        """The object that ``compare --json`` prints; ``vs`` only where there are further answers."""
        return {
            "prompt": self.prompt,
            "settings": dict(self.settings),
            "patient": self.patient.to_dict(),
            "guided": self.guided.to_dict(),
            "metrics": dict(self.metrics),
            "id": self.id,
            "turn": self.turn,
            "sample": self.sample,
            **({"vs": [one.to_dict() for one in self.vs]} if self.vs else {}),
        }


@dataclass(frozen=True, slots=True)
class TrainStep:
    """One optimiser step of stage 2, as the progress line shows it.

    ``reward_accuracy`` in [0, 1] is of the last evaluation on held-out pairs; None before the first.
    """

    step: int
    total: int
    loss: float
    subtb: float
    value: float
    tokens_per_second: float
    reward_accuracy: float | None = None
