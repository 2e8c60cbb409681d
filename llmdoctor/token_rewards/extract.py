"""Stage 1: preference pairs -> the patient's log-probabilities of every response token under every face."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from llmdoctor import __version__
from llmdoctor.errors import DataError, LLMDoctorError, LoadError, UsageError
from llmdoctor.files import LOCK, atomic_path, ensure_replaceable, file_checksum, locked, read_json, write_json
from llmdoctor.models import Patient, SplitLM, not_numbers
from llmdoctor.records import FacePair, Floats, Message, PairScores, PreferencePair, Side, SkippedRecord, TokenScores
from llmdoctor.settings import DataSettings
from llmdoctor.text import end_of_turn, prompt_ids, response_ids, with_system
from llmdoctor.token_rewards.folder import (
    SCHEMA_VERSION,
    read_shard,
    require_checksum,
    shard_path,
    shard_paths,
    write_shard,
)
from llmdoctor.token_rewards.pairs import fingerprint, read_pairs, shuffled

SHARD_PAIRS = 256
_WINDOW_PAIRS = 64  # pairs whose responses are sorted by length and scored together
_HEAD_FLOATS = 1 << 24  # logits held at a time: 64 MiB of float32
_HEAD_ROWS, _HEAD_BLOCK = 256, 4096  # on a CPU: 4 MiB
_SHARED_REACH = 4096  # longest row with a mask of its own, which is quadratic in the length
_CPU_BATCH, _LEAST_BATCH, _GREATEST_BATCH = 4096, 2048, 65536  # tokens of a forward when none are given
_UNFINISHED = "unfinished.json"  # what the shards were made from, until meta.json says it
_CHECKSUM = ".sha256"  # beside every shard, until meta.json says it
_Item = TypeVar("_Item")


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
) -> Iterator[PairScores]:
    """Score the pairs of ``data`` and store them in the rewards folder ``output``, yielding each pair as it is scored.

    The generator must be run to its end: meta.json is written last, and ``RewardsFolder(output)`` opens the result.
    Stopped earlier, killed even, it leaves complete shards; run again with the same arguments it scores what is missing
    and ends with the folder of a run that was never stopped.
    ``batch_tokens`` bounds the padded tokens of one forward: None takes what the device's free memory allows, or what a
    stopped run took, since log-probs depend on the batches in their last bits. A batch for which memory does not
    suffice is halved, again and again, and so are those after it.

    Started in several processes by ``accelerate launch`` or ``torchrun``, each scores (and yields) its share of the
    shards of 256 pairs, and the folder, which all must see, is that of one process with as many threads.

    ``limit`` counts the pairs that are scored; with a seed in ``shuffle`` they come in an order that it decides. A
    prompt longer than the context is cut from the left, its oldest turns first, then the beginning of the last one
    (meta.json counts these); a response is never cut: a pair whose responses leave no room is skipped.

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
        "dtype": str(patient.model.dtype).removeprefix("torch."),
        "tokenizer": {"fingerprint": patient.vocabulary.fingerprint, "size": patient.vocabulary.size},
        "faces": {name: {"positive": face.positive, "negative": face.negative} for name, face in faces.items()},
        "dataset": {
            **data.model_dump(),
            "fingerprint": fingerprint(data.source, split=data.split, label=data.label),
            "limit": limit,
            **({} if shuffle is None else {"shuffle": shuffle}),
        },
    }
    with _team() as team, locked(output) if team.rank == 0 else nullcontext():
        try:
            yield from _extract(
                patient, data, faces, output, identity, limit, shuffle, strict, batch_tokens, on_skip, team
            )
        except BaseException:
            if team.rank == 0 and not shard_paths(output):  # nothing was gained: leave nothing
                _discard(output)
            raise


def _extract(
    patient: Patient,
    data: DataSettings,
    faces: Mapping[str, FacePair],
    output: Path,
    identity: dict[str, Any],
    limit: int | None,
    shuffle: int | None,
    strict: bool,
    batch_tokens: int | None,
    on_skip: Callable[[SkippedRecord], None] | None,
    team: "_Team",
) -> Iterator[PairScores]:
    def open_folder() -> tuple[dict[str, str] | None, int]:
        checksums = _resume(output, identity)
        tokens = batch_tokens or _stored_batch_tokens(output) or fitting_batch_tokens(patient)
        if checksums is not None:
            _begin(output, {**identity, "batch_tokens": tokens}, patient)
        return checksums, tokens

    checksums, tokens = team.of_the_first(open_folder)
    if checksums is None:
        return
    skips: list[SkippedRecord] = []

    def skip(record: SkippedRecord) -> None:
        skips.append(record)
        if strict:
            raise DataError(f"{data.source} line {record.line}: {record.reason} (--strict)")
        if on_skip:
            on_skip(record)

    scorer = _Scorer(patient, faces, tokens)
    pairs = read_pairs(data.source, split=data.split, label=data.label, strict=strict, on_skip=skip)
    if shuffle is not None:
        pairs = shuffled(pairs, shuffle)
    prepared = islice(filter(None, (scorer.prepare(pair, skip) for pair in pairs)), limit)
    for index, shard in enumerate(_chunks(prepared, SHARD_PAIRS)):
        path = shard_path(output, index)
        if path.name in checksums or index % team.size != team.rank:
            continue
        scored: list[PairScores] = []
        for window in _chunks(iter(shard), _WINDOW_PAIRS):
            scored.extend(scorer.score(window))
            yield from scored[-len(window) :]
        write_shard(output, index, scored, tuple(faces))
        write_json(path.with_suffix(_CHECKSUM), file_checksum(path))
    team.wait()
    if team.rank == 0:
        _finish(output, {**identity, "batch_tokens": tokens}, tuple(faces), checksums, skips, scorer.truncated)
    team.wait()


def _finish(
    output: Path,
    identity: dict[str, Any],
    faces: tuple[str, ...],
    checksums: dict[str, str],
    skips: Sequence[SkippedRecord],
    truncated: int,
) -> None:
    """Write meta.json; ``checksums`` are those of the shards that stood before this run."""
    shards = shard_paths(output)
    if not shards:
        source = identity["dataset"]["source"]
        raise DataError(f"{source}: no pair can be used; the first was skipped: {skips[0].reason}")
    statistics = describe((pair for path in shards for pair in read_shard(path, faces)), faces)
    counts = {key: statistics.pop(key) for key in ("pairs", "tokens")}
    meta = {
        **identity,
        "llmdoctor_version": __version__,
        "counts": {**counts, "skipped": len(skips), "truncated_prompts": truncated},
        "skipped": dict(Counter(record.reason for record in skips)),
        "skipped_lines": {
            reason: [record.line for record in skips if record.reason == reason]
            for reason in dict.fromkeys(record.reason for record in skips)
        },
        "statistics": statistics,
        "shards": {path.name: checksums.get(path.name) or read_json(path.with_suffix(_CHECKSUM)) for path in shards},
    }
    write_json(output / "meta.json", meta)
    _tidy(output)


@dataclass(frozen=True, slots=True)
class _Team:
    """The processes of one run: each scores every ``size``-th shard; the first opens and finishes the folder."""

    rank: int = 0
    size: int = 1

    def of_the_first(self, make: Callable[[], _Item]) -> _Item:
        """What ``make`` gives in the first process, or the error that it raises there, in all of them."""
        if self.size == 1:
            return make()
        made: list[Any] = [None, None]
        if self.rank == 0:
            try:
                made[0] = make()
            except LLMDoctorError as error:
                made[1] = error
        with _others_may_fail():
            torch.distributed.broadcast_object_list(made)
        if made[1] is not None:
            raise made[1]
        return made[0]  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            with _others_may_fail():
                torch.distributed.barrier()


@contextmanager
def _team() -> Iterator[_Team]:
    """The processes that ``accelerate launch`` or ``torchrun`` started, or this one alone.

    They only exchange a few words, whatever their devices: gloo, with all the time that a shard may take.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield _Team()
        return
    opened = not torch.distributed.is_initialized()
    if opened:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield _Team(torch.distributed.get_rank(), size)
    finally:
        if opened:
            torch.distributed.destroy_process_group()


@contextmanager
def _others_may_fail() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LLMDoctorError(
            "another process of this run has ended: see its message. The same command goes on from here"
        ) from error


def fitting_batch_tokens(patient: Patient) -> int:
    """Padded tokens of one forward that should fit: on CUDA by half of the memory that is free, else 4096.

    A power of two; what a layer holds at a time is a dozen hidden and four feed-forward widths a token.
    """
    device, config = patient.model.device, patient.model.config.get_text_config()
    if device.type != "cuda":
        return _CPU_BATCH
    free, _ = torch.cuda.mem_get_info(device)
    hidden = config.hidden_size
    a_token = (
        12 * hidden + 4 * (getattr(config, "intermediate_size", None) or 4 * hidden)
    ) * patient.model.dtype.itemsize
    fitting = max(1, free // 2 // a_token)
    return min(max(1 << (int(fitting).bit_length() - 1), _LEAST_BATCH), _GREATEST_BATCH)


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


_Unit = tuple[_Response, ...]  # responses that share a row: both of a pair, or one alone


class _Scorer:
    """Runs the patient over batches of responses, every face of one response in the same forward.

    The two responses of a pair stand in one row, [prompt, chosen, rejected], of which the rejected sees the prompt and
    itself at the positions it has without the chosen: a prompt is paid for once a face. Where the model does not
    take such a mask (a probe tells), each response has a row of its own.
    """

    def __init__(self, patient: Patient, faces: Mapping[str, FacePair], batch_tokens: int) -> None:
        self.patient, self.batch_tokens = patient, batch_tokens
        self.names = tuple(faces)
        self.systems = [face.positive for face in faces.values()] + [face.negative for face in faces.values()]
        self.lm = SplitLM.of(patient.model)
        self.size = patient.vocabulary.size
        self.end_id = end_of_turn(patient.tokenizer, patient.eos_ids)
        self.truncated = 0
        self.head_rows, self.head_blocks = self._plan_head()
        self.reach = self._shared_reach()

    def prepare(
        self, pair: PreferencePair, skip: Callable[[SkippedRecord], None]
    ) -> tuple[_Response, _Response] | None:
        """Tokenise a pair under every face, its prompt cut from the left to fit the context; None if skipped."""
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
            excess = max(map(len, faced)) - room
            if excess <= 0:
                break
            messages = _without_oldest_turn(messages) or self._without_first_tokens(messages, excess)
        if not messages:
            reason = f"no room for its answers and a prompt in the patient's context of {self.patient.context} tokens"
            skip(SkippedRecord(int(pair.id), reason))
            return None
        self.truncated += messages != list(pair.prompt)
        return (
            _Response(pair.id, "chosen", neutral, faced, chosen),
            _Response(pair.id, "rejected", neutral, faced, rejected),
        )

    def _without_first_tokens(self, messages: list[Message], count: int) -> list[Message] | None:
        """The conversation without the first ``count`` tokens of its last turn; None when they are all it has."""
        *before, last = messages
        offsets = self.patient.tokenizer(
            last["content"], add_special_tokens=False, return_offsets_mapping=True
        ).offset_mapping
        kept = last["content"][offsets[count][0] :] if count < len(offsets) else ""
        # a token that is part of a character gives no shorter text: then the character goes
        kept = kept if len(kept) < len(last["content"]) else kept[1:]
        return [*before, Message(role=last["role"], content=kept)] if kept.strip() else None

    def score(self, pairs: Sequence[tuple[_Response, _Response]]) -> list[PairScores]:
        """Score a window of pairs, in batches of like length; the result is in the order given.

        A batch that the device has no memory for is halved, and so are those after it.
        """
        units = [unit for pair in pairs for unit in self._units(pair)]
        order = sorted(range(len(units)), key=lambda i: -_length(units[i]))
        scores: dict[tuple[str, Side], TokenScores] = {}
        while order:
            rows = max(1, self.batch_tokens // (len(self.systems) * _length(units[order[0]])))
            batch = [units[i] for i in order[:rows]]
            try:
                results = self._score_batch(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                results = None  # tried again outside, where the failed forward's tensors are no longer held
            if results is None:
                self.batch_tokens = len(self.systems) * _length(batch[0]) * (len(batch) // 2)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            order = order[rows:]
            scores.update(((result.pair_id, result.side), result) for result in results)
        return [PairScores(*(scores[response.pair_id, response.side] for response in pair)) for pair in pairs]

    def _units(self, pair: tuple[_Response, _Response]) -> list[_Unit]:
        """The rows of a pair: one that both responses share, or one each."""
        return [pair] if _length(pair) <= self.reach else [(response,) for response in pair]

    @torch.inference_mode()
    def _score_batch(self, batch: Sequence[_Unit]) -> list[TokenScores]:
        device, faces = self.patient.model.device, len(self.systems)
        hidden_R_L_H = self._hidden([(faced, unit) for unit in batch for faced in unit[0].faced])
        # the hidden state before each response token, response after response, all 2F faces side by side: [2F, N, H]
        row_F_N, position_F_N = [], []
        for i, unit in enumerate(batch):
            start = 0
            for r in unit:
                lengths = torch.tensor([len(faced) for faced in r.faced])[:, None]
                place_F_T = lengths - 1 + start + torch.arange(len(r.response))
                place_F_T[:, :1] = lengths - 1  # the first token follows the prompt
                position_F_N.append(place_F_T)
                row_F_N.append((torch.arange(faces) + i * faces)[:, None].expand_as(place_F_T))
                start += len(r.response)
        hidden_F_N_H = hidden_R_L_H[torch.cat(row_F_N, 1).to(device), torch.cat(position_F_N, 1).to(device)]
        responses = [r for unit in batch for r in unit]
        targets_N = torch.tensor([token for r in responses for token in r.response], device=device)
        pieces = [
            self._score_positions(hidden, targets)
            for hidden, targets in zip(
                hidden_F_N_H.split(self.head_rows, dim=1), targets_N.split(self.head_rows), strict=True
            )
        ]
        own_F_N, others_F_N, other_ids_N = (torch.cat(part, dim=-1).cpu().numpy() for part in zip(*pieces, strict=True))
        if np.isnan(own_F_N).any():  # would silently become a reward of 0
            raise LoadError(not_numbers(f"the log-probs of the patient {self.patient.name}"))
        results, start = [], 0
        for r in responses:
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

    def _hidden(self, rows: Sequence[tuple[list[int], _Unit]]) -> torch.Tensor:
        """What the head reads at every position [R, L, H] of rows that are a prompt and one or two responses."""
        device = self.patient.model.device
        sequences = [torch.tensor(prompt + [t for r in unit for t in r.response]) for prompt, unit in rows]
        ids_R_L = pad_sequence(sequences, batch_first=True).to(device)
        index_L = torch.arange(ids_R_L.shape[1], device=device)
        if all(len(unit) == 1 for _, unit in rows):
            lengths = torch.tensor([len(s) for s in sequences], device=device)
            return self.lm.hidden(ids_R_L, (index_L < lengths[:, None]).long())
        prompts_R_1 = torch.tensor([len(prompt) for prompt, _ in rows], device=device)[:, None]
        # where the second response begins; a row that has one only is padding from there on
        seconds_R_1 = torch.tensor([len(p) + len(unit[0].response) for p, unit in rows], device=device)[:, None]
        second_R_L = index_L >= seconds_R_1
        positions_R_L = torch.where(second_R_L, index_L - seconds_R_1 + prompts_R_1, index_L)
        in_prompt_R_L = index_L < prompts_R_1
        same_R_L_L = second_R_L[:, :, None] == second_R_L[:, None, :]
        seen_R_L_L = (index_L[:, None] >= index_L) & (in_prompt_R_L[:, None, :] | same_R_L_L)
        dtype = self.patient.model.dtype
        mask_R_L_L = torch.zeros(seen_R_L_L.shape, dtype=dtype, device=device)
        mask_R_L_L.masked_fill_(~seen_R_L_L, torch.finfo(dtype).min)
        out = self.lm.backbone(
            input_ids=ids_R_L, attention_mask=mask_R_L_L[:, None], position_ids=positions_R_L, use_cache=False
        )
        return out.last_hidden_state  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _shared_reach(self) -> int:
        """The longest row that two responses may share; 0 where the model does not take the mask that it needs."""
        config = self.patient.model.config.get_text_config()
        if config._attn_implementation not in {"sdpa", "eager"}:
            return 0
        if not set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}:
            return 0
        ids = [i % config.vocab_size for i in range(1, 9)]  # a prompt of 3 tokens, responses of 2 and 3
        sides: tuple[tuple[Side, list[int]], ...] = (("chosen", ids[3:5]), ("rejected", ids[5:8]))
        both = tuple(_Response("", side, ids[:3], [ids[:3]], tokens) for side, tokens in sides)
        try:
            shared = self._hidden([(ids[:3], both)])[0]
        except (TypeError, ValueError, RuntimeError, IndexError):
            return 0
        alone = self._hidden([(ids[:3], (response,)) for response in both])
        expected = torch.cat([alone[0, :5], alone[1, 3:]])
        same = torch.allclose(shared.float(), expected.float(), rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
        # under a 4D mask a sliding window is not applied: no row may be longer than it
        return min(getattr(config, "sliding_window", None) or _SHARED_REACH, _SHARED_REACH) if same else 0

    def _plan_head(self) -> tuple[int, list[tuple[int, int, Callable[[torch.Tensor], torch.Tensor]]]]:
        """How many positions the head takes at a time, and in which parts of the vocabulary (first, last + 1, logits).

        A CPU goes through the vocabulary in blocks that its caches hold; an accelerator takes all of it at once.
        """
        faces, head = len(self.systems), self.patient.model.get_output_embeddings()
        plain = type(head) is nn.Linear and not hasattr(head, "_hf_hook")
        if not plain or head.weight.device.type != "cpu":
            rows = max(1, _HEAD_FLOATS // (faces * self.size))
            return rows, [(0, self.size, lambda hidden: self.lm.logits(hidden)[..., : self.size])]
        spans = [(start, min(start + _HEAD_BLOCK, self.size)) for start in range(0, self.size, _HEAD_BLOCK)]
        rows = max(1, _HEAD_ROWS // faces)
        return rows, [(start, stop, partial(self.lm.logits_of, head, start, stop)) for start, stop in spans]

    def _score_positions(
        self, hidden_F_N_H: torch.Tensor, targets_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs of the targets [2F, N], of the positive faces' favourite other token [2F, N], and its id [N].

        The norm is a running log-sum-exp over the parts of the vocabulary; of a face's mean log-prob, the norm is the
        same for every token, so that the favourite is the token of the greatest mean logit.
        """
        shape = hidden_F_N_H.shape[:2]
        peak_F_N = hidden_F_N_H.new_full(shape, -torch.inf, dtype=torch.float32)
        total_F_N, own_F_N, other_F_N = (torch.zeros_like(peak_F_N) for _ in range(3))
        best_N = torch.full_like(peak_F_N[0], -torch.inf)
        other_N = torch.zeros_like(targets_N)
        for start, stop, logits_of in self.head_blocks:
            logits_F_N_V = self.patient.vocabulary.mask(logits_of(hidden_F_N_H), start)
            place_N = (targets_N - start).clamp(0, stop - start - 1)
            here_N = (targets_N >= start) & (targets_N < stop)
            own_F_N = torch.where(here_N, _at(logits_F_N_V, place_N), own_F_N)
            liking_N_V = logits_F_N_V[: len(self.names)].mean(dim=0)
            kept_N = torch.where(here_N, -torch.inf, _at(liking_N_V[None], place_N)[0])
            liking_N_V.scatter_(1, place_N[:, None], kept_N[:, None])
            most_N, where_N = liking_N_V.max(dim=-1)
            better_N = most_N > best_N
            best_N = torch.maximum(best_N, most_N)
            other_N = torch.where(better_N, where_N + start, other_N)
            other_F_N = torch.where(better_N, _at(logits_F_N_V, where_N), other_F_N)
            higher_F_N = torch.maximum(peak_F_N, logits_F_N_V.amax(dim=-1))
            total_F_N *= (peak_F_N - higher_F_N).exp()
            total_F_N += logits_F_N_V.sub_(higher_F_N[..., None]).exp_().sum(dim=-1)
            peak_F_N = higher_F_N
        norm_F_N = peak_F_N + total_F_N.log()
        return own_F_N - norm_F_N, other_F_N - norm_F_N, other_N

    def _by_face(self, rows_F_T: Floats) -> tuple[dict[str, Floats], dict[str, Floats]]:
        rows = np.ascontiguousarray(rows_F_T)
        half = len(self.names)
        return dict(zip(self.names, rows[:half], strict=True)), dict(zip(self.names, rows[half:], strict=True))


def _length(unit: _Unit) -> int:
    """Tokens of its longest row."""
    return max(map(len, unit[0].faced)) + sum(len(r.response) for r in unit)


def _at(values_F_N_V: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    """One value a position [F, N]."""
    return values_F_N_V.gather(2, ids_N.expand(len(values_F_N_V), -1)[..., None])[..., 0]


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
    if not shard_paths(output):  # a run that got no further than this holds nothing against another
        _discard(output)
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


def _stored_batch_tokens(output: Path) -> int | None:
    held = next((path for name in ("meta.json", _UNFINISHED) if (path := output / name).is_file()), None)
    return read_json(held).get("batch_tokens") if held else None


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
