"""Stage 1: preference pairs -> the patient's log-probabilities of every response token under every face."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llmdoctor.errors import DataError, UsageError
from llmdoctor.files import locked
from llmdoctor.models import Patient, shared_by_processes
from llmdoctor.records import FacePair, PairScores, PairShape, SkippedRecord
from llmdoctor.settings import OF_STATES, DataSettings
from llmdoctor.token_rewards.encode import PairEncoder
from llmdoctor.token_rewards.folder import shard_path, shard_paths
from llmdoctor.token_rewards.pairs import read_pairs, shuffled
from llmdoctor.token_rewards.processes import team
from llmdoctor.token_rewards.rows import chunks
from llmdoctor.token_rewards.scoring import Scorer, fitting_batch_tokens
from llmdoctor.token_rewards.sources import fingerprint
from llmdoctor.token_rewards.writer import RewardsWriter

SHARD_PAIRS = 256
_WINDOW_PAIRS = 64  # pairs whose responses are sorted by length and scored together


def extract(
    patient: Patient,
    data: DataSettings,
    faces: Mapping[str, FacePair],
    output: Path,
    *,
    limit: int | None = None,
    shuffle: int | None = None,
    strict: bool = False,
    batch_tokens: int | None = None,
    on_skip: Callable[[SkippedRecord], None] | None = None,
    on_shape: Callable[[PairShape], None] | None = None,
) -> Iterator[PairScores]:
    """Score the pairs of ``data`` and store them in the rewards folder ``output``, yielding each pair as it is scored.

    The generator must be run to its end: meta.json is written last, and ``RewardsFolder(output)`` opens the result.
    Stopped earlier, even killed, it leaves complete shards; run again with the same arguments it scores what is missing
    and ends with the folder of a run that was never stopped.

    ``batch_tokens`` bounds the padded tokens of one forward. None takes what the device's free memory allows, or what a
    stopped run took, because the last bits of a log-prob depend on its batch. A batch that does not fit the memory is
    halved until it does, and so are those after it.

    Started in several processes by ``accelerate launch`` or ``torchrun``, each scores (and yields) its share of the
    shards of 256 pairs. All of them must see the folder, which is then that of one process with as many threads. If
    they share one patient (``tp_plan``), they score all pairs together, and the first writes them.

    ``limit`` counts the pairs that are scored; with a seed in ``shuffle`` they come in an order that it decides. A
    prompt longer than the context is cut from the left, its oldest turns first, then the beginning of the last one
    (meta.json counts these). A response is never cut: a pair whose responses leave no room for a prompt is skipped.
    Skipped records go to ``on_skip``; with ``strict`` the first one ends the run. How the data hold their pairs goes to
    ``on_shape``.

    Without ``faces`` nothing is scored: the folder holds token ids, for `llmdoctor.token_rewards.states.add_probe`.

    Raises UsageError (a face pair called "probe" or "advantage", a bad limit, a folder that is not a rewards folder or
    that another run writes to), DataError (nothing usable), LoadError (``output`` holds the rewards of another patient,
    of other faces or of other data, or a damaged shard; a tokenizer without an end-of-sequence token; log-probs that
    are not numbers), StorageError.
    """
    _check(faces, limit=limit, batch_tokens=batch_tokens)
    writer = RewardsWriter(output, _identity(patient, data, faces, limit, shuffle))
    skips = _Skips(data.source, strict, on_skip)
    together = shared_by_processes(patient.model)
    with team() as processes, locked(output) if processes.first else nullcontext():
        try:
            done, tokens = processes.from_first(lambda: _open(writer, patient, batch_tokens))
            if done is None:  # finished by an earlier run
                return
            encoder, scorer = PairEncoder(patient, faces), Scorer(patient, faces, tokens)
            pairs = read_pairs(**data.model_dump(), strict=strict, on_skip=skips, on_shape=on_shape)
            if shuffle is not None:
                pairs = shuffled(pairs, shuffle)
            # Every process encodes every pair, so that all agree on which pairs a shard holds.
            encoded = islice(filter(None, (encoder.encode(pair, skips) for pair in pairs)), limit)
            for index, shard in enumerate(chunks(encoded, SHARD_PAIRS)):
                mine = together or index % processes.size == processes.rank
                if not mine or shard_path(output, index).name in done:
                    continue
                scored: list[PairScores] = []
                for window in chunks(iter(shard), _WINDOW_PAIRS):
                    scored += (results := scorer.score(window))
                    yield from results
                if processes.first or not together:
                    writer.write(index, scored)
            processes.wait()
            if processes.first:
                writer.finish(tokens, done, skips.records, encoder.truncated)
            processes.wait()
        except BaseException:
            if processes.first and not shard_paths(output):  # nothing was gained: leave nothing behind
                writer.discard()
            raise


def _check(faces: Mapping[str, FacePair], **counts: int | None) -> None:
    if taken := OF_STATES.intersection(faces):
        name = min(taken)
        raise UsageError(f"no face pair may be called {name!r}, which is a reward of the probe: choose another name")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} must be 1 or more; got {value}")


def _open(writer: RewardsWriter, patient: Patient, batch_tokens: int | None) -> tuple[dict[str, str] | None, int]:
    """The finished shards with their checksums (None when nothing is left to do), and the batch size of this run."""
    done = writer.resume()
    tokens = batch_tokens or writer.stored_batch_tokens() or fitting_batch_tokens(patient)
    if done is not None:
        writer.begin(tokens, patient.tokenizer)
    return done, tokens


def _identity(
    patient: Patient, data: DataSettings, faces: Mapping[str, FacePair], limit: int | None, shuffle: int | None
) -> dict[str, Any]:
    """What decides the numbers of a run: a folder may only be continued where all of it is the same."""
    dataset = {
        **data.model_dump(),
        "fingerprint": fingerprint(data.source, split=data.split, label=data.label),
        "limit": limit,
    }
    if shuffle is not None:
        dataset["shuffle"] = shuffle
    if data.columns is None:  # as in folders that were made before there was such a setting
        del dataset["columns"]
    return {
        "patient": {
            "model": patient.name,
            "fingerprint": patient.fingerprint,
            **({"quantization": patient.quantization} if patient.quantization else {}),
        },
        "dtype": str(patient.model.dtype).removeprefix("torch."),
        "tokenizer": {"fingerprint": patient.vocabulary.fingerprint, "size": patient.vocabulary.size},
        "faces": {name: {"positive": face.positive, "negative": face.negative} for name, face in faces.items()},
        "dataset": dataset,
    }


@dataclass(slots=True)
class _Skips:
    """Keeps the records that are skipped and passes them on; DataError for the first one when ``strict``."""

    source: str
    strict: bool
    on_skip: Callable[[SkippedRecord], None] | None
    records: list[SkippedRecord] = field(default_factory=list)

    def __call__(self, record: SkippedRecord) -> None:
        self.records.append(record)
        if self.strict:
            raise DataError(f"{self.source} line {record.line}: {record.reason} (--strict)")
        if self.on_skip:
            self.on_skip(record)
