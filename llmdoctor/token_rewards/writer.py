"""A rewards folder while extract writes it: what a stopped run has left, and what the finished folder says of itself.

Until ``meta.json`` is written, ``unfinished.json`` says what the shards were made from, and every shard has its
checksum in a file beside it.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmdoctor import __version__
from llmdoctor.artefacts import Artefact
from llmdoctor.errors import DataError, LoadError
from llmdoctor.files import LOCK, atomic_path, ensure_replaceable, file_checksum, read_json, write_json
from llmdoctor.records import PairScores, SkippedRecord
from llmdoctor.token_rewards.folder import (
    SCHEMA_VERSION,
    read_shard,
    require_checksum,
    shard_paths,
    write_shard,
)
from llmdoctor.token_rewards.summary import FaceDifferences

_META, _UNFINISHED = "meta.json", "unfinished.json"
_CHECKSUM = ".sha256"


class RewardsWriter:
    """Writes the rewards folder ``path``. ``identity`` is what its rewards are made from, as meta.json states it."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity = {"schema_version": SCHEMA_VERSION, **identity}
        self.faces = tuple(identity["faces"])

    def resume(self) -> dict[str, str] | None:
        """Names and checksums of the shards that an earlier run has finished; None when the whole folder is finished.

        Raises LoadError when the folder holds the rewards of something else, or a damaged shard, and UsageError when it
        is not a rewards folder.
        """
        if not shard_paths(self.path):  # a run that ended before its first shard must not block another one
            self.discard()
        held = self._held()
        if held is None:
            if any(item.name != LOCK for item in self.path.iterdir()):
                ensure_replaceable(self.path, _META)
            return {}
        self._require_same(held)
        checksums = self._checksums(held)
        standing = {name: checksum for name, checksum in checksums.items() if (self.path / name).is_file()}
        for name, checksum in standing.items():
            require_checksum(self.path / name, checksum)
        if "shards" in held and standing == checksums:
            self._tidy()
            return None
        return standing

    def stored_batch_tokens(self) -> int | None:
        """The batch size of the run that the folder holds, if any."""
        return (self._held() or {}).get("batch_tokens")

    def begin(self, batch_tokens: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Say what the folder is made from, and add the tokenizer that reads its token ids."""
        write_json(self.path / _UNFINISHED, {**self.identity, "batch_tokens": batch_tokens})
        if not (self.path / "tokenizer").is_dir():
            with atomic_path(self.path / "tokenizer") as temporary:
                tokenizer.save_pretrained(temporary)

    def write(self, index: int, pairs: Sequence[PairScores]) -> None:
        """Add a shard and its checksum."""
        shard = write_shard(self.path, index, pairs, self.faces)
        write_json(shard.with_suffix(_CHECKSUM), file_checksum(shard))

    def finish(
        self, batch_tokens: int, checksums: dict[str, str], skips: Sequence[SkippedRecord], truncated: int
    ) -> None:
        """Write meta.json. ``checksums`` are those of the shards that `resume` found. Raises DataError without shards.

        ``truncated`` is how many prompts were cut.
        """
        shards = shard_paths(self.path)
        if not shards:
            source = self.identity["dataset"]["source"]
            raise DataError(f"{source}: no pair can be used; the first was skipped: {skips[0].reason}")
        counted = FaceDifferences(self.faces)
        pairs = tokens = 0
        for pair in (pair for shard in shards for pair in read_shard(shard, self.faces)):
            counted.add(pair)
            pairs += 1
            tokens += len(pair.chosen.response_ids) + len(pair.rejected.response_ids)
        skipped_lines: dict[str, list[int]] = {}
        for record in skips:
            skipped_lines.setdefault(record.reason, []).append(record.line)
        meta = {
            **self.identity,
            "batch_tokens": batch_tokens,
            "llmdoctor_version": __version__,
            "counts": {
                "pairs": pairs,
                "tokens": tokens,
                "skipped": len(skips),
                "truncated_prompts": truncated,
            },
            "skipped": dict(Counter(record.reason for record in skips)),
            "skipped_lines": skipped_lines,
            "statistics": {"faces": {face.name: face.statistics() for face in counted.result()}},
            "shards": {
                shard.name: checksums.get(shard.name) or read_json(shard.with_suffix(_CHECKSUM)) for shard in shards
            },
        }
        write_json(self.path / _META, meta)
        self._tidy()

    def discard(self) -> None:
        """Take back `begin`, unless the folder is finished."""
        if (self.path / _UNFINISHED).is_file() and not (self.path / _META).is_file():
            self._tidy()
            shutil.rmtree(self.path / "tokenizer", ignore_errors=True)

    def _held(self) -> dict[str, Any] | None:
        """What the folder says that it is made from; None when it says nothing."""
        for name in (_META, _UNFINISHED):
            if (self.path / name).is_file():
                held: dict[str, Any] = read_json(self.path / name, Artefact)
                return held
        return None

    def _require_same(self, held: dict[str, Any]) -> None:
        for key, wanted in self.identity.items():
            if held.get(key) != wanted:
                raise LoadError(
                    f"{self.path} holds the rewards of another run: its {key} is "
                    f"{_difference(held.get(key), wanted)}. Choose another output folder, or delete this one"
                )

    def _checksums(self, held: dict[str, Any]) -> dict[str, str]:
        """The checksum of every shard, by name."""
        if "shards" in held:
            listed = held["shards"]
            # A plain list in folders of version 0.1.0: take them as they are.
            return listed if isinstance(listed, dict) else {n: file_checksum(self.path / n) for n in listed}
        # A shard without one was written by a run that was killed just then: it is made again.
        marks = {shard.name: shard.with_suffix(_CHECKSUM) for shard in shard_paths(self.path)}
        return {name: read_json(mark) for name, mark in marks.items() if mark.is_file()}

    def _tidy(self) -> None:
        """Remove what only an unfinished folder needs."""
        for path in [self.path / _UNFINISHED, *self.path.glob(f"rewards-*{_CHECKSUM}")]:
            path.unlink(missing_ok=True)


def _difference(held: Any, wanted: Any) -> str:
    """The first entry that differs, in words."""
    if isinstance(held, dict) and isinstance(wanted, dict):
        key = next(key for key in [*wanted, *held] if held.get(key) != wanted.get(key))
        return f"{key} {held.get(key)!r}, and this run's is {wanted.get(key)!r}"
    return f"{held!r}, and this run's is {wanted!r}"
