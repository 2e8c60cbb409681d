"""Stage 1: preference pairs -> the patient's log-probabilities of every response token under every face."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from llmdoctor import __version__
from llmdoctor.data import fingerprint, read_pairs
from llmdoctor.errors import DataError, LoadError, UsageError
from llmdoctor.faces import end_of_turn, prompt_ids, response_ids, with_system
from llmdoctor.models import Patient, SplitLM, not_numbers
from llmdoctor.profile import DataSettings
from llmdoctor.store import (
    LOCK,
    SCHEMA_VERSION,
    atomic_path,
    ensure_replaceable,
    file_checksum,
    locked,
    read_json,
    read_shard,
    require_checksum,
    shard_path,
    shard_paths,
    write_json,
    write_shard,
)
from llmdoctor.types import FacePair, Floats, Message, PairScores, PreferencePair, Side, SkippedRecord, TokenScores

SHARD_PAIRS = 256
_WINDOW_PAIRS = 64  # pairs whose responses are sorted by length and scored together
_HEAD_FLOATS = 1 << 24  # logits held at a time: 64 MiB of float32
_UNFINISHED = "unfinished.json"  # what the shards were made from, until meta.json says it
_CHECKSUM = ".sha256"  # beside every shard, until meta.json says it
_CHECKSUM = ".sha256"  # beside every complete shard, until then
_Item = TypeVar("_Item")


def extract(
    patient: Patient,
    data: DataSettings,
    faces: Mapping[str, FacePair],
    output: Path,
    *,
    limit: int | None = None,
    strict: bool = False,
    batch_tokens: int = 16384,
    on_skip: Callable[[SkippedRecord], None] | None = None,
) -> Iterator[PairScores]:
    """Score the pairs of ``data`` and store them in the rewards folder ``output``, yielding each pair as it is scored.

    The generator must be run to its end: meta.json is written last, and ``RewardsFolder(output)`` opens the result.
    Stopped earlier, killed even, it leaves complete shards; run again with the same arguments it scores what is missing
    and ends with the folder of a run that was never stopped.
    ``batch_tokens`` bounds the padded tokens of one forward. A conversation longer than the context loses its oldest
    turns; a pair whose last turn does not fit either is skipped.

    Raises UsageError (no faces, a bad limit, a folder that is not ours or that another run writes to), DataError
    (nothing usable), LoadError (``output`` holds the rewards of another patient, of other faces or of other data, or a
    damaged shard), StorageError.
    """
    if not faces:
        raise UsageError("extract needs at least one face pair; the profile's 'faces' section is empty")
    for name, value in {"limit": limit, "batch_tokens": batch_tokens}.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} must be 1 or more; got {value}")
    identity: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "patient": {"model": patient.name, "fingerprint": patient.fingerprint},
        "tokenizer": {"fingerprint": patient.vocabulary.fingerprint, "size": patient.vocabulary.size},
        "faces": {name: {"positive": face.positive, "negative": face.negative} for name, face in faces.items()},
        "dataset": {
            **data.model_dump(),
            "fingerprint": fingerprint(data.source, split=data.split, label=data.label),
            "limit": limit,
        },
    }
    with locked(output):
        try:
            yield from _extract(patient, data, faces, output, identity, limit, strict, batch_tokens, on_skip)
        except BaseException:
            if not shard_paths(output):  # nothing was gained: leave nothing
                _discard(output)
            raise


def _extract(
    patient: Patient,
    data: DataSettings,
    faces: Mapping[str, FacePair],
    output: Path,
    identity: dict[str, Any],
    limit: int | None,
    strict: bool,
    batch_tokens: int,
    on_skip: Callable[[SkippedRecord], None] | None,
) -> Iterator[PairScores]:
    checksums = _resume(output, identity)
    if checksums is None:
        return
    skips: list[SkippedRecord] = []

    def skip(record: SkippedRecord) -> None:
        skips.append(record)
        if strict:
            raise DataError(f"{data.source} line {record.line}: {record.reason} (--strict)")
        if on_skip:
            on_skip(record)

    scorer = _Scorer(patient, faces, batch_tokens)
    _begin(output, identity, patient)
    pairs = read_pairs(data.source, split=data.split, label=data.label, limit=limit, strict=strict, on_skip=skip)
    prepared = filter(None, (scorer.prepare(pair, skip) for pair in pairs))
    for index, shard in enumerate(_chunks(prepared, SHARD_PAIRS)):
        path = shard_path(output, index)
        if path.name in checksums:
            continue
        scored: list[PairScores] = []
        for window in _chunks(iter(shard), _WINDOW_PAIRS):
            scored.extend(scorer.score(window))
            yield from scored[-len(window) :]
        write_shard(output, index, scored, tuple(faces))
        checksums[path.name] = file_checksum(path)
        write_json(path.with_suffix(_CHECKSUM), checksums[path.name])
    shards = shard_paths(output)
    if not shards:
        raise DataError(f"{data.source}: no pair can be used; the first was skipped: {skips[0].reason}")
    statistics = describe((pair for path in shards for pair in read_shard(path, tuple(faces))), tuple(faces))
    counts = {key: statistics.pop(key) for key in ("pairs", "tokens")}
    meta = {
        **identity,
        "llmdoctor_version": __version__,
        "counts": {**counts, "skipped": len(skips), "truncated_prompts": scorer.truncated},
        "skipped": dict(Counter(record.reason for record in skips)),
        "statistics": statistics,
        "shards": {path.name: checksums[path.name] for path in shards},
    }
    write_json(output / "meta.json", meta)
    _tidy(output)


def describe(pairs: Iterable[PairScores], faces: Sequence[str]) -> dict[str, Any]:
    """Counts, and for every face pair how much the two faces differ and how often the difference agrees with the label.

    ``mean_abs_gap`` is in nats a token; ``share_positive`` is the share of tokens the positive face likes better;
    ``agreement`` the share of pairs whose chosen response has the greater sum of gaps.
    """
    counted = tokens = 0
    absolute, positive, agreed = (dict.fromkeys(faces, 0.0) for _ in range(3))
    for pair in pairs:
        counted += 1
        tokens += len(pair.chosen.response_ids) + len(pair.rejected.response_ids)
        for face in faces:
            chosen, rejected = (side.positive[face] - side.negative[face] for side in (pair.chosen, pair.rejected))
            absolute[face] += float(np.abs(chosen).sum() + np.abs(rejected).sum())
            positive[face] += int((chosen > 0).sum() + (rejected > 0).sum())
            agreed[face] += float(chosen.sum() > rejected.sum())
    per_face = {
        face: {
            "mean_abs_gap": round(absolute[face] / tokens, 6),
            "share_positive": round(positive[face] / tokens, 6),
            "agreement": round(agreed[face] / counted, 6),
        }
        for face in faces
    }
    return {"pairs": counted, "tokens": tokens, "faces": per_face}


@dataclass(frozen=True, slots=True)
class _Response:
    """One response ready to be scored: its prompt without a face, and under every face (positive, then negative)."""

    pair_id: str
    side: Side
    prompt: list[int]
    faced: list[list[int]]
    response: list[int]

    @property
    def length(self) -> int:
        return max(map(len, self.faced)) + len(self.response)


class _Scorer:
    """Runs the patient over batches of responses, every face of one response in the same forward."""

    def __init__(self, patient: Patient, faces: Mapping[str, FacePair], batch_tokens: int) -> None:
        self.patient, self.batch_tokens = patient, batch_tokens
        self.names = tuple(faces)
        self.systems = [face.positive for face in faces.values()] + [face.negative for face in faces.values()]
        self.lm = SplitLM.of(patient.model)
        self.size = patient.vocabulary.size
        self.valid = patient.vocabulary.valid(patient.model.device)
        self.end_id = end_of_turn(patient.tokenizer, patient.eos_ids)
        self.truncated = 0

    def prepare(
        self, pair: PreferencePair, skip: Callable[[SkippedRecord], None]
    ) -> tuple[_Response, _Response] | None:
        """Tokenise a pair under every face; the oldest turns go when the context is too short; None if it stays so."""
        tokenizer = self.patient.tokenizer
        chosen, rejected = (response_ids(tokenizer, text, self.end_id) for text in (pair.chosen, pair.rejected))
        room = self.patient.context - max(len(chosen), len(rejected))
        messages: list[Message] | None = list(pair.prompt)
        while messages:
            try:
                neutral = prompt_ids(tokenizer, messages)
                faced = [prompt_ids(tokenizer, with_system(messages, system)) for system in self.systems]
            except DataError as error:
                skip(SkippedRecord(int(pair.id), str(error)))
                return None
            if max(map(len, faced)) <= room:
                break
            messages = _without_oldest_turn(messages)
        if not messages:
            skip(SkippedRecord(int(pair.id), f"longer than the patient's context of {self.patient.context} tokens"))
            return None
        self.truncated += len(messages) < len(pair.prompt)
        return (
            _Response(pair.id, "chosen", neutral, faced, chosen),
            _Response(pair.id, "rejected", neutral, faced, rejected),
        )

    def score(self, pairs: Sequence[tuple[_Response, _Response]]) -> list[PairScores]:
        """Score a window of pairs, in batches of like length; the result is in the order given."""
        responses = [response for pair in pairs for response in pair]
        order = sorted(range(len(responses)), key=lambda i: -responses[i].length)
        scores: list[TokenScores | None] = [None] * len(responses)
        while order:
            rows = max(1, self.batch_tokens // (len(self.systems) * responses[order[0]].length))
            batch, order = order[:rows], order[rows:]
            for i, result in zip(batch, self._score_batch([responses[i] for i in batch]), strict=True):
                scores[i] = result
        return [PairScores(*both) for both in zip(scores[::2], scores[1::2], strict=True)]  # type: ignore[arg-type]

    @torch.inference_mode()
    def _score_batch(self, batch: list[_Response]) -> list[TokenScores]:
        device, faces = self.patient.model.device, len(self.systems)
        sequences = [torch.tensor(faced + r.response) for r in batch for faced in r.faced]
        ids_R_L = pad_sequence(sequences, batch_first=True).to(device)
        lengths = torch.tensor([len(s) for s in sequences], device=device)
        mask_R_L = (torch.arange(ids_R_L.shape[1], device=device) < lengths[:, None]).long()
        hidden_R_L_H = self.lm.hidden(ids_R_L, mask_R_L)
        # the hidden state before each response token, response after response, all 2F faces side by side: [2F, N, H]
        hidden_F_N_H = torch.cat(
            [
                torch.stack(
                    [
                        hidden_R_L_H[i * faces + f, (p := len(faced)) - 1 : p - 1 + len(r.response)]
                        for f, faced in enumerate(r.faced)
                    ]
                )
                for i, r in enumerate(batch)
            ],
            dim=1,
        )
        targets_N = torch.tensor([token for r in batch for token in r.response], device=device)
        chunk = max(1, _HEAD_FLOATS // (faces * self.size))
        pieces = [
            self._score_positions(hidden, targets)
            for hidden, targets in zip(hidden_F_N_H.split(chunk, dim=1), targets_N.split(chunk), strict=True)
        ]
        own_F_N, others_F_N, other_ids_N = (torch.cat(part, dim=-1).cpu().numpy() for part in zip(*pieces, strict=True))
        if np.isnan(own_F_N).any():  # would silently become a reward of 0
            raise LoadError(not_numbers(f"the log-probs of the patient {self.patient.name}"))
        results, start = [], 0
        for r in batch:
            span = slice(start, start := start + len(r.response))
            own, other = own_F_N[:, span], others_F_N[:, span]
            results.append(
                TokenScores(
                    r.pair_id,
                    r.side,
                    np.array(r.prompt, dtype=np.int32),
                    np.array(r.response, dtype=np.int32),
                    *self._by_face(own),
                    other_ids_N[span].astype(np.int32),
                    *self._by_face(other),
                )
            )
        return results

    def _score_positions(
        self, hidden_F_N_H: torch.Tensor, targets_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs of the targets [2F, N], of the positive faces' favourite other token [2F, N], and its id [N]."""
        logits = self.lm.logits(hidden_F_N_H)[..., : self.size].float()
        norm_F_N = logits.logsumexp(dim=-1)
        own = targets_N.expand(len(norm_F_N), -1)[..., None]
        liking_N_V = (logits[: len(self.names)] - norm_F_N[: len(self.names), :, None]).mean(dim=0)
        liking_N_V.scatter_(1, targets_N[:, None], -torch.inf)
        if self.valid is not None:
            liking_N_V.masked_fill_(~self.valid, -torch.inf)
        other_N = liking_N_V.argmax(dim=-1)
        other = other_N.expand(len(norm_F_N), -1)[..., None]
        return logits.gather(2, own)[..., 0] - norm_F_N, logits.gather(2, other)[..., 0] - norm_F_N, other_N

    def _by_face(self, rows_F_T: Floats) -> tuple[dict[str, Floats], dict[str, Floats]]:
        rows = np.ascontiguousarray(rows_F_T)
        half = len(self.names)
        return dict(zip(self.names, rows[:half], strict=True)), dict(zip(self.names, rows[half:], strict=True))


def _without_oldest_turn(messages: list[Message]) -> list[Message] | None:
    """The conversation from its second user turn on, its system prompt kept; None when there is only one."""
    system = [m for m in messages if m["role"] == "system"]
    turns = [m for m in messages if m["role"] != "system"]
    later = [i for i, m in enumerate(turns) if m["role"] == "user" and i > 0]
    return [*system, *turns[later[0] :]] if later else None


def _resume(output: Path, identity: dict[str, Any]) -> dict[str, str] | None:
    """Name and checksum of the shards that stand already; None when the folder is complete.

    Raises LoadError when what the folder holds is not of this run, or a shard is damaged.
    """
    name = next((name for name in ("meta.json", _UNFINISHED) if (output / name).is_file()), None)
    if name is None:
        if any(item.name != LOCK for item in output.iterdir()):
            ensure_replaceable(output, "meta.json")
        return {}
    held = read_json(output / name)
    held = held if isinstance(held, dict) else {}
    for key, wanted in identity.items():
        if held.get(key) != wanted:
            raise LoadError(
                f"{output} holds the rewards of another run: its {key} is "
                f"{_difference(held.get(key), wanted)}. Choose another output folder, or delete this one"
            )
    if name == "meta.json":
        listed = held["shards"]  # a plain list in folders of version 0.1.0
        checksums = listed if isinstance(listed, dict) else {name: file_checksum(output / name) for name in listed}
    else:
        marks = {path.name: path.with_suffix(_CHECKSUM) for path in shard_paths(output)}
        checksums = {shard: read_json(mark) for shard, mark in marks.items() if mark.is_file()}  # else killed between
    standing = {shard: checksum for shard, checksum in checksums.items() if (output / shard).is_file()}
    for shard, checksum in standing.items():
        require_checksum(output / shard, checksum)
    if name == "meta.json" and standing == checksums:
        _tidy(output)
        return None
    return standing


def _difference(held: Any, wanted: Any) -> str:
    """The first differing entry, in words."""
    if isinstance(held, dict) and isinstance(wanted, dict):
        key = next(key for key in [*wanted, *held] if held.get(key) != wanted.get(key))
        return f"{key} {held.get(key)!r}, and this run's is {wanted.get(key)!r}"
    return f"{held!r}, and this run's is {wanted!r}"


def _begin(output: Path, identity: dict[str, Any], patient: Patient) -> None:
    """Open a rewards folder: what it is made from, and the tokenizer that reads it."""
    write_json(output / _UNFINISHED, identity)
    if not (output / "tokenizer").is_dir():
        with atomic_path(output / "tokenizer") as temporary:
            patient.tokenizer.save_pretrained(temporary)


def _tidy(output: Path) -> None:
    """Remove what only an unfinished folder needs."""
    for path in [output / _UNFINISHED, *output.glob(f"rewards-*{_CHECKSUM}")]:
        path.unlink(missing_ok=True)


def _discard(output: Path) -> None:
    """Take back `_begin`."""
    if (output / _UNFINISHED).is_file() and not (output / "meta.json").is_file():
        _tidy(output)
        shutil.rmtree(output / "tokenizer", ignore_errors=True)


def _chunks(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    while chunk := _take(items, size):
        yield chunk


def _take(items: Iterator[_Item], count: int) -> list[_Item]:
    return list(islice(items, count))
