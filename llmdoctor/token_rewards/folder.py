"""The rewards folder: what stage 1 writes and stage 2 reads.

It holds ``meta.json`` (written last), ``rewards-00000.parquet``, ... and ``tokenizer/``; with a probe also what
`llmdoctor.token_rewards.states` describes, ``probe.json`` last. A shard has two rows per
preference pair, chosen then rejected, with the two log-probs of every token under every face pair. ``meta.json`` holds
the sha256 of every shard; until it is written, ``rewards-00000.sha256``, ... do.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from llmdoctor.artefacts import REWARDS_VERSION, ProbeMeta, RewardsMeta
from llmdoctor.errors import LoadError, VersionError
from llmdoctor.files import atomic_path, file_checksum, present, read_json, require_regular, user_path
from llmdoctor.harmless import first_line
from llmdoctor.records import Floats, PairScores, Side, TokenScores
from llmdoctor.tensors import read_tensors
from llmdoctor.token_rewards.formula import ADVANTAGE, PROBE
from llmdoctor.token_rewards.sources import require_unpackable

SCHEMA_VERSION = REWARDS_VERSION
PROBE_META = "probe.json"
_SIDES: tuple[Side, Side] = ("chosen", "rejected")
_ROWS_AT_A_TIME = 64
_ID_COLUMNS = ("prompt_ids", "response_ids", "alternative_ids")
_SCORE_COLUMNS = ("positive", "negative", "alternative_positive", "alternative_negative")


def shard_paths(folder: Path) -> list[Path]:
    """The complete shards of a rewards folder, in order."""
    return sorted(path for path in folder.glob("rewards-*.parquet") if re.fullmatch(r"rewards-\d+\.parquet", path.name))


def shard_path(folder: Path, index: int) -> Path:
    """The path of shard number ``index`` of a rewards folder."""
    return folder / f"rewards-{index:05d}.parquet"


def credit_path(folder: Path, index: int) -> Path:
    """The path of the probe's token rewards for shard number ``index``."""
    return folder / f"probe-{index:05d}.safetensors"


def require_checksum(path: Path, checksum: str) -> None:
    """Raise LoadError, naming the file, when its bytes do not have this sha256."""
    if file_checksum(path) != checksum:
        raise LoadError(
            f"{path} is damaged: its bytes do not match their checksum. Delete it and run the same extract command "
            "again, which makes only what is missing"
        )


def write_shard(folder: Path, index: int, pairs: Sequence[PairScores], faces: Sequence[str]) -> Path:
    """Write ``pairs`` as shard number ``index`` of a rewards folder, atomically. Raises StorageError."""
    rows = [scores for pair in pairs for scores in (pair.chosen, pair.rejected)]
    ids, logprobs = pa.list_(pa.int32()), pa.list_(pa.float32())
    columns: dict[str, pa.Array] = {
        "pair_id": pa.array([row.pair_id for row in rows], pa.string()),
        "side": pa.array([row.side for row in rows], pa.string()),
        "prompt_ids": pa.array([row.prompt_ids for row in rows], ids),
        "response_ids": pa.array([row.response_ids for row in rows], ids),
        "alternative_ids": pa.array([row.alternative_ids for row in rows], ids),
    }
    for face in faces:
        columns[f"positive.{face}"] = pa.array([row.positive[face] for row in rows], logprobs)
        columns[f"negative.{face}"] = pa.array([row.negative[face] for row in rows], logprobs)
        columns[f"alternative_positive.{face}"] = pa.array([row.alternative_positive[face] for row in rows], logprobs)
        columns[f"alternative_negative.{face}"] = pa.array([row.alternative_negative[face] for row in rows], logprobs)
    path = shard_path(folder, index)
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")
    return path


def read_shard(path: Path, faces: Sequence[str], size: int = 0) -> Iterator[PairScores]:
    """Stream the pairs of one shard; ``size`` is that of the vocabulary, if known.

    Raises LoadError when it is damaged, lacks a face, or holds what no patient says: log-probs that are not finite or
    not one per token, ids that are no tokens, an empty response.
    """
    try:
        require_regular(path)
        with pq.ParquetFile(path) as shard:
            require_unpackable(shard)
            rows = (row for batch in shard.iter_batches(_ROWS_AT_A_TIME) for row in _rows(batch, faces, size))
            for chosen, rejected in zip(rows, rows, strict=True):  # one iterator twice: two rows at a time
                if (chosen.side, rejected.side) != _SIDES or chosen.pair_id != rejected.pair_id:
                    raise ValueError(f"the two rows of pair {chosen.pair_id} are not together")
                yield PairScores(chosen, rejected)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _rows(batch: pa.RecordBatch, faces: Sequence[str], size: int) -> Iterator[TokenScores]:
    pair_ids, sides = (_texts(batch, name) for name in ("pair_id", "side"))
    arrays = {name: _numbers(batch, name, size or 1 << 31) for name in _ID_COLUMNS}
    arrays |= {f"{kind}.{face}": _numbers(batch, f"{kind}.{face}", None) for kind in _SCORE_COLUMNS for face in faces}
    for i, (pair_id, side) in enumerate(zip(pair_ids, sides, strict=True)):
        length = len(arrays["response_ids"][i])
        if not length:
            raise ValueError(f"pair {pair_id} has an empty response")
        for name, values in arrays.items():
            alone = name == "alternative_ids" and not faces  # of a probe only: nothing was scored
            if name != "prompt_ids" and not alone and len(values[i]) != length:
                raise ValueError(f"pair {pair_id} has {length} tokens, but {len(values[i])} values in {name}")
        yield TokenScores(
            pair_id=pair_id,
            side=cast(Side, side),
            prompt_ids=arrays["prompt_ids"][i],
            response_ids=arrays["response_ids"][i],
            positive={face: arrays[f"positive.{face}"][i] for face in faces},
            negative={face: arrays[f"negative.{face}"][i] for face in faces},
            alternative_ids=arrays["alternative_ids"][i],
            alternative_positive={face: arrays[f"alternative_positive.{face}"][i] for face in faces},
            alternative_negative={face: arrays[f"alternative_negative.{face}"][i] for face in faces},
        )


def _texts(batch: pa.RecordBatch, name: str) -> list[str]:
    column = batch.column(name)
    if not pa.types.is_string(column.type) or column.null_count:
        raise ValueError(f"column {name} holds {column.type}, expected texts")
    return list(column.to_pylist())


def _numbers(batch: pa.RecordBatch, name: str, size: int | None) -> list[np.ndarray[Any, Any]]:
    """The lists of a column: token ids below ``size``, or finite log-probs where that is None."""
    column = batch.column(name)
    kind = pa.float32() if size is None else pa.int32()
    if column.type != pa.list_(kind) or column.null_count or column.values.null_count:
        raise ValueError(f"column {name} holds {column.type}, expected lists of {kind}")
    values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
    used = values[offsets[0] : offsets[-1]]
    if size is None and not np.isfinite(used).all():
        raise ValueError(f"column {name} holds numbers that are not finite")
    if size is not None and len(used) and not 0 <= used.min() <= used.max() < size:
        raise ValueError(f"column {name} holds ids beyond the {size} tokens of the tokenizer")
    # Copies: Arrow's own memory is read-only, of which torch.from_numpy warns, and a view keeps the whole batch alive.
    return [values[start:stop].copy() for start, stop in pairwise(offsets)]


def _damaged(path: Path, error: Exception) -> LoadError:
    if isinstance(error, KeyError):
        return LoadError(f"cannot read {path}: no column {error}. Delete the folder and run extract again.")
    return LoadError(f"cannot read {path}: {first_line(error)}. Delete it and run the same extract command again.")


class RewardsFolder:
    """A finished rewards folder, opened for reading; iterating streams its `PairScores`.

    Raises LoadError for a folder that is absent, unfinished or damaged. A shard whose bytes are not what extract wrote
    is refused by name before its first pair.
    """

    path: Path
    meta: dict[str, Any]
    faces: tuple[str, ...]
    probe: dict[str, Any] | None  # what probe.json says; None for a folder without a probe

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self.meta = _read_meta(self.path)
        self.faces = tuple(self.meta["faces"])
        self.probe = read_json(self.path / PROBE_META, ProbeMeta) if present(self.path / PROBE_META) else None
        shards = self.meta["shards"]
        self._shards = [self.path / name for name in shards]
        self._unchecked = {self.path / name: sum for name, sum in shards.items()} if isinstance(shards, dict) else {}
        self._checked: set[Path] = set()
        self._pairs = sum(_count_rows(shard, self.faces) for shard in self._shards) // 2

    def __len__(self) -> int:
        return self._pairs

    @property
    def signals(self) -> tuple[str, ...]:
        """What rewards can be drawn from: the face pairs, and the probe if there is one."""
        return (*self.faces, PROBE) if self.probe is not None else self.faces

    def __iter__(self) -> Iterator[PairScores]:
        for index, shard in enumerate(self._shards):
            if checksum := self._unchecked.get(shard):
                require_checksum(shard, checksum)
                del self._unchecked[shard]  # training reads it many times: checking it once is enough
            pairs = read_shard(shard, self.faces, self.meta["tokenizer"].get("size", 0))
            yield from pairs if self.probe is None else _with_probe(pairs, self._credits(index))

    def _credits(self, index: int) -> dict[str, Floats]:
        """The probe's rewards of all tokens of one shard, response after response, by name."""
        path = credit_path(self.path, index)
        assert self.probe is not None
        if path not in self._checked:
            require_checksum(path, str(self.probe["files"].get(path.name)))
            self._checked.add(path)
        held = read_tensors(path, ("rewards",))
        # those of "advantage" are missing from a folder of an older version
        credits = {name: held[key] for name, key in ((PROBE, "rewards"), (ADVANTAGE, "advantages")) if key in held}
        for one in credits.values():
            if one.ndim != 1 or one.dtype != torch.float32 or len(one) != len(credits[PROBE]):
                raise LoadError(f"cannot read {path}: expected a list of float32, got {one.dtype} {[*one.shape]}")
        return {name: one.numpy() for name, one in credits.items()}


def _with_probe(pairs: Iterator[PairScores], credits: dict[str, Floats]) -> Iterator[PairScores]:
    """The pairs, each response with its part of the probe's rewards."""
    start, rewards = 0, credits[PROBE]
    for pair in pairs:
        parts = []
        for side in (pair.chosen, pair.rejected):
            stop = start + len(side.response_ids)
            own: dict[str, Any] = {name: one[start:stop].copy() for name, one in credits.items()}
            parts.append(replace(side, **own))
            start = stop
        if stop > len(rewards):
            break
        yield PairScores(*parts)
    if start != len(rewards):
        raise LoadError(
            f"the probe has {len(rewards)} rewards for a shard of other tokens: delete {PROBE_META} and run extract "
            "again"
        )


def _read_meta(folder: Path) -> dict[str, Any]:
    if not (present(folder) and folder.is_dir()):
        raise LoadError(f"no rewards folder at {folder}: run `llmdoctor extract --output {folder}` first")
    path = folder / "meta.json"
    if not path.is_file():
        if shard_paths(folder):
            raise LoadError(f"{folder} has no meta.json, extract has not finished: run the same extract command again")
        raise LoadError(f"{folder} is not a rewards folder: expected meta.json and rewards-00000.parquet in it")
    try:
        return dict(read_json(path, RewardsMeta))
    except VersionError:
        raise  # running extract again would replace what a later version made
    except LoadError as error:
        raise LoadError(f"{error}: run extract again") from error


def _count_rows(shard: Path, faces: Sequence[str]) -> int:
    try:
        require_regular(shard)
        with pq.ParquetFile(shard) as file:
            columns = set(file.schema_arrow.names)
            lacking = [face for face in faces if not {f"positive.{face}", f"negative.{face}"} <= columns]
            if lacking:
                raise ValueError(f"it holds no log-probs for face pair {lacking[0]!r}")
            return int(file.metadata.num_rows)
    except FileNotFoundError as error:
        raise LoadError(
            f"{shard} is missing although meta.json names it: run the same extract command again"
        ) from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damaged(shard, error) from error
