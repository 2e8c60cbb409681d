"""Adds the probe's rewards to a finished rewards folder: three passes of the patient, and the fits between them.

    rewards-00000.parquet --patient--> states-00000.safetensors  --fit--> probe.safetensors
                          --patient--> moments-00000.safetensors --fit--> forecast.safetensors
                          --patient--> probe-00000.safetensors

The first pass keeps the mean state of every response in a few layers, in float16: 2 x layers x width x 2 bytes per
pair, 23 kB for 10 layers of a model 576 wide and 143 kB for one 3584 wide. The second one keeps what a regression on
the states of the middle layer needs: about width x width x 4 bytes for every shard. The third one keeps two numbers for
each token. All see the prompt without a face; none keeps the states of single tokens, as many times as large as their
means as a response has tokens. ``probe.json`` is written last.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor

from llmdoctor.errors import LoadError, UsageError
from llmdoctor.files import atomic_path, file_checksum, locked, write_json
from llmdoctor.models import Patient, not_numbers, shared_by_processes
from llmdoctor.records import Floats, Message, PairScores, Side, TokenScores
from llmdoctor.tensors import read_tensors
from llmdoctor.text import conversation, end_of_turn, prompt_ids, response_ids
from llmdoctor.token_rewards.encode import EncodedPair, EncodedResponse
from llmdoctor.token_rewards.folder import PROBE_META, RewardsFolder, credit_path, read_shard, shard_paths
from llmdoctor.token_rewards.probe import Moments, Probe, advantages, fit, fold_of, middle, require_pairs
from llmdoctor.token_rewards.processes import team
from llmdoctor.token_rewards.rows import PatientRows, Unit, chunks
from llmdoctor.token_rewards.scoring import fitting_batch_tokens

_LAYERS = 10
_WINDOW_PAIRS = 64  # pairs whose responses are sorted by length and read together
_DIRECTIONS, _FORECAST = "probe.safetensors", "forecast.safetensors"


def kept_layers(count: int) -> tuple[int, ...]:
    """Up to ten of a model's layers, evenly from the first quarter to the last; the embedding would be 0."""
    return tuple(sorted({round(layer) for layer in np.linspace(max(1, count / 4), count, min(_LAYERS, count))}))


class StateReader:
    """Reads the patient's states behind every token of responses, each divided by its root mean square.

    Without their size the states of all layers and models are alike and fit into float16. Raises LoadError for a
    patient that gives no states.
    """

    def __init__(self, patient: Patient, layers: Sequence[int] = (), batch_tokens: int | None = None) -> None:
        count = getattr(patient.model.config.get_text_config(), "num_hidden_layers", None)
        if not count:
            raise LoadError(f"the patient {patient.name} does not say how many layers it has: a probe needs its states")
        self.layers = tuple(layers) or kept_layers(count)
        self._patient = patient
        self._rows = PatientRows(patient, batch_tokens or fitting_batch_tokens(patient))

    def means(self, pairs: Sequence[PairScores]) -> NDArray[np.float16]:
        """The mean state of every response, chosen and rejected in turn [2P, D, H]."""
        return np.stack(self.read(pairs, lambda states_D_S_H, _: states_D_S_H[:, 1:].mean(dim=1).half().numpy()))

    def moments(self, pairs: Sequence[PairScores], probe: Probe) -> Moments:
        """Those of the middle layer, summed over all responses, with the values of every fit of the probe."""
        total: Moments | None = None  # one for every response would fill the memory

        def include(states_D_S_H: Tensor, _: int) -> None:
            nonlocal total
            held_D_S_H = states_D_S_H.numpy()
            own = Moments.of(held_D_S_H[middle(self.layers)], probe.values(held_D_S_H[:, 1:]))
            total = own if total is None else total + own

        self.read(pairs, include)
        assert total is not None  # a window has a pair
        return total

    def rewards(
        self, pairs: Sequence[PairScores], probe: Probe, forecast_K_X: Floats, folds: Sequence[int | None]
    ) -> list[tuple[Floats, Floats]]:
        """r_t of every response under directions "probe" and "advantage", chosen and rejected in turn.

        Each pair's are by the fit without its fold.
        """

        def of(states_D_S_H: Tensor, pair: int) -> tuple[Floats, Floats]:
            held_D_S_H, fold = states_D_S_H.numpy(), folds[pair]
            own_T = probe.rewards(held_D_S_H[:, 1:], fold)
            forecast_X = forecast_K_X[0 if fold is None else 1 + fold]
            return own_T, advantages(own_T * probe.tokens, held_D_S_H[middle(self.layers)], forecast_X)

        return self.read(pairs, of)

    def read(self, pairs: Sequence[PairScores], use: Any) -> list[Any]:
        """``use(states [D, S, H], index of the pair)`` of every response, in the order of the pairs.

        The states are those behind the prompt and behind each of the T tokens: S = T + 1.
        """
        encoded = [_encoded(pair, str(number)) for number, pair in enumerate(pairs)]

        @torch.inference_mode()
        def run(batch: Sequence[Unit]) -> list[tuple[str, Side, Any]]:
            out = self._rows.forward([(unit[0].prompt, unit) for unit in batch], output_hidden_states=True)
            if out.hidden_states is None or len(out.hidden_states) <= max(self.layers):
                raise LoadError(
                    f"the patient {self._patient.name} gives no hidden states, which a probe needs: train on faces "
                    "(direction gap or fitted)"
                )
            results: list[tuple[str, Side, Any]] = []
            for row, unit in enumerate(batch):
                start = prompt = len(unit[0].prompt)
                for response in unit:
                    stop = start + len(response.response)
                    places = [prompt - 1, *range(start, stop)]
                    # the layers of a model that is spread over several GPUs have their states where they are
                    held = [out.hidden_states[d][row, places].float().cpu() for d in self.layers]
                    states_D_S_H = torch.stack(held)
                    states_D_S_H *= states_D_S_H.square().mean(dim=-1, keepdim=True).rsqrt()
                    if states_D_S_H.isnan().any():
                        raise LoadError(not_numbers(f"the states of the patient {self._patient.name}"))
                    results.append((response.pair_id, response.side, use(states_D_S_H, int(response.pair_id))))
                    start = stop
            return results

        found = {(pair, side): value for pair, side, value in self._rows.in_batches(encoded, 1, run)}
        return [found[response.pair_id, response.side] for pair in encoded for response in pair]


def _encoded(pair: PairScores, number: str) -> EncodedPair:
    def side(scores: TokenScores) -> EncodedResponse:
        prompt = scores.prompt_ids.tolist()
        if not prompt:
            raise LoadError(f"pair {scores.pair_id} has an empty prompt: run extract again")
        return EncodedResponse(number, scores.side, prompt, [prompt], scores.response_ids.tolist())

    return side(pair.chosen), side(pair.rejected)


def add_probe(patient: Patient, folder: Path, *, batch_tokens: int | None = None) -> Iterator[None]:
    """Fit a probe to the pairs of the rewards folder ``folder`` and store every token's reward under it.

    Yields once for each pair of each of the three passes, and must be run to its end; run again after a stop it goes on
    from the last finished shard. Several processes share the shards, as in `extract`. A folder that has its probe is
    left as it is, unless a file of it is damaged or missing: that is made again.

    Raises LoadError (no finished rewards folder, another patient, a patient without states, states that are not
    numbers), DataError (fewer than 20 pairs), UsageError (another run writes there), StorageError.
    """
    rewards = RewardsFolder(folder)
    if rewards.meta["patient"]["fingerprint"] != patient.fingerprint:
        raise LoadError(
            f"the rewards in {folder} were drawn from the patient {rewards.meta['patient']['model']}, not from "
            f"{patient.name}: a probe of another patient's states would not fit them"
        )
    if rewards.probe is not None:
        wanted = rewards.probe["files"].items()
        damaged = [folder / name for name, checksum in wanted if not _holds(folder / name, checksum)]
        if not damaged:
            return
        for path in (folder / PROBE_META, *damaged):  # what is missing is made again
            path.unlink(missing_ok=True)
        rewards = RewardsFolder(folder)
    require_pairs(len(rewards))
    shards = shard_paths(folder)
    with team() as processes, locked(folder) if processes.first else nullcontext():
        # one number for all: processes that share a patient must make the same batches
        tokens = processes.from_first(lambda: batch_tokens or fitting_batch_tokens(patient))
        reader = StateReader(patient, batch_tokens=tokens)
        together = shared_by_processes(patient.model)  # then all read every shard, and the first writes
        own = [index for index in range(len(shards)) if together or index % processes.size == processes.rank]
        writes = processes.first or not together
        for index in own:
            if not _states_path(folder, index).is_file():
                means = []
                for window in chunks(read_shard(shards[index], rewards.faces), _WINDOW_PAIRS):
                    means.append(reader.means(window))
                    yield from (None for _ in window)
                if writes:
                    _save(_states_path(folder, index), {"means": np.concatenate(means)})
        processes.wait()
        found = processes.from_first(lambda: _fit(folder, rewards, reader.layers))
        probe = Probe.load(folder / _DIRECTIONS)
        for index in own:
            if not _moments_path(folder, index).is_file():
                parts = []
                for window in chunks(read_shard(shards[index], rewards.faces), _WINDOW_PAIRS):
                    parts.append(reader.moments(window, probe))
                    yield from (None for _ in window)
                if writes:
                    whole = reduce(add, parts)
                    _save(_moments_path(folder, index), {"gram": whole.gram_X_X, "right": whole.right_K_X})
        processes.wait()
        forecast_K_X = processes.from_first(
            lambda: _forecast([_moments_path(folder, i) for i in range(len(shards))], probe)
        )
        for index in own:
            if not credit_path(folder, index).is_file():
                values = []
                for window in chunks(read_shard(shards[index], rewards.faces), _WINDOW_PAIRS):
                    folds = [found["folds"][pair.chosen.pair_id] for pair in window]
                    values += reader.rewards(window, probe, forecast_K_X, folds)
                    yield from (None for _ in window)
                if writes:
                    shares, changes = map(np.concatenate, zip(*values, strict=True))
                    _save(credit_path(folder, index), {"rewards": shares, "advantages": changes})
        processes.wait()
        if processes.first:
            report = {key: value for key, value in found.items() if key != "folds"}
            files = [path(folder, i) for path in (_states_path, _moments_path, credit_path) for i in range(len(shards))]
            files += [folder / _DIRECTIONS, folder / _FORECAST]
            write_json(folder / PROBE_META, {**report, "files": {path.name: file_checksum(path) for path in files}})
        processes.wait()


def _holds(path: Path, checksum: str) -> bool:
    return path.is_file() and file_checksum(path) == checksum


def _states_path(folder: Path, index: int) -> Path:
    return folder / f"states-{index:05d}.safetensors"


def _moments_path(folder: Path, index: int) -> Path:
    return folder / f"moments-{index:05d}.safetensors"


def _save(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def _forecast(paths: Sequence[Path], probe: Probe) -> Floats:
    """f and c for the values of every fit of the probe [K, X], fitted to the moments of all shards and written."""
    wide, fits = probe.whole_D_H.shape[1] + 1, 1 + len(probe.without_D_H)

    def read(path: Path) -> Moments:
        try:
            held = read_tensors(path, ("gram", "right"))
            own = Moments(held["gram"].numpy(), held["right"].numpy())
            if own.gram_X_X.shape != (wide, wide) or own.right_K_X.shape != (fits, wide):
                raise ValueError("it is of another probe")
        except (LoadError, ValueError, TypeError) as error:
            raise LoadError(f"cannot read {path}: {error}. Delete it and run again") from error
        return own

    forecast_K_X = reduce(add, map(read, paths)).solve()  # one after another: all at once would fill the memory
    _save(paths[0].with_name(_FORECAST), {"forecast": forecast_K_X})
    return forecast_K_X


def _fit(folder: Path, rewards: RewardsFolder, layers: Sequence[int]) -> dict[str, Any]:
    """Fit the probe and write it. What probe.json says of it, and the fold of every pair by id."""
    ids, prompts, lengths = [], [], []
    for pair in rewards:
        ids.append(pair.chosen.pair_id)
        prompts.append(pair.chosen.prompt_ids)
        lengths += [len(pair.chosen.response_ids), len(pair.rejected.response_ids)]
    try:
        paths = [_states_path(folder, i) for i in range(len(shard_paths(folder)))]
        means = np.concatenate([read_tensors(path, ("means",))["means"].numpy() for path in paths])
        if means.ndim != 3 or means.shape[:2] != (2 * len(ids), len(layers)):
            raise ValueError(f"they are those of {len(means) // 2} other pairs or of other layers")
    except (LoadError, ValueError, TypeError) as error:
        raise LoadError(
            f"cannot read the states in {folder}: {error}. Delete states-*.safetensors and run again"
        ) from error
    fold_P = fold_of(prompts)
    probe, margins_P = fit(means[0::2], means[1::2], fold_P, layers, float(np.mean(lengths)))
    probe.save(folder / _DIRECTIONS)
    return {
        "layers": list(layers),
        "ridge": probe.ridges[0],
        "held_out_accuracy": round(float((1 + np.sign(margins_P)).mean() / 2), 6),
        "bytes_per_pair": int(2 * means[0].nbytes),
        "folds": dict(zip(ids, fold_P.tolist(), strict=True)),
    }


def probe_answer(patient: Patient, probe: Probe, prompt: str | Sequence[Message], answer: str) -> Floats:
    """r_t of every token of ``answer`` to ``prompt`` under the probe of all pairs [T], the end of turn included.

    Their sum times ``probe.tokens`` / T is R(answer). Raises UsageError (an empty answer, a probe of another patient's
    states), DataError (a chat template that refuses), LoadError.
    """
    if not answer:
        raise UsageError("expected an answer to look at, got an empty text")
    config, width = patient.model.config.get_text_config(), probe.whole_D_H.shape[1]
    if config.hidden_size != width or max(probe.layers) > config.num_hidden_layers:
        raise UsageError(
            f"the probe reads layers {', '.join(map(str, probe.layers))} with states of {width} numbers; the patient "
            f"{patient.name} has {config.num_hidden_layers} layers of {config.hidden_size}: it was fitted to another"
        )
    tokenizer = patient.tokenizer
    asked = np.array(prompt_ids(tokenizer, conversation(prompt)), dtype=np.int32)
    ids = np.array(response_ids(tokenizer, answer, end_of_turn(tokenizer, patient.eos_ids)), dtype=np.int32)
    scores = TokenScores("", "chosen", asked, ids, {}, {}, ids, {}, {})
    pair = PairScores(scores, replace(scores, side="rejected"))
    reader = StateReader(patient, probe.layers)
    found: list[Floats] = reader.read([pair], lambda states_D_S_H, _: probe.rewards(states_D_S_H.numpy()[:, 1:]))
    return found[0]
