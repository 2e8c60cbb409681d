"""What a training run reports while it goes on, and the summary and the picture that remain of it."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmdoctor.artefacts import ProgressFile
from llmdoctor.files import read_json, write_json


class Losses(NamedTuple):
    """The mean losses of a batch: ``loss`` is SubTB + lambda * value."""

    loss: float
    subtb: float
    value: float


class Distance(NamedTuple):
    """The loss of a batch of `llmdoctor.training.shrink`: KL per token, nats."""

    loss: float


Row = TypeVar("Row", Losses, Distance)


class Progress(TrainerCallback, Generic[Row]):
    """Collects the losses of every optimiser step and reports each step to ``on_step``.

    ``row`` is the kind of losses that a batch has. ``on_step`` gets the step, the last step, the losses and the tokens
    per second. ``interrupted``, once set, ends the run with a checkpoint after the step that is being taken.
    """

    def __init__(self, row: type[Row], on_step: Callable[[int, int, Row, float], None] | None) -> None:
        self.on_step: Callable[[int, int, Row, float], None] | None = on_step
        self._row: type[Row] = row
        self.history: list[Row] = []
        self.evaluations: list[dict[str, float]] = []
        self.tokens = 0
        self.interrupted = False
        self._micro_batches: list[Row] = []  # of the optimiser step that is being taken
        self._tokens_before = 0  # of the runs that this one continues
        self._started = time.monotonic()

    def save(self, folder: Path) -> None:
        """Write the progress so far into a checkpoint."""
        write_json(
            folder / "progress.json",
            {"history": self.history, "evaluations": self.evaluations, "tokens": self.tokens},
        )

    def restore(self, folder: Path) -> None:
        """Go on from the progress in a checkpoint."""
        held = read_json(folder / "progress.json", ProgressFile)
        self.history = [self._row(*row) for row in held["history"]]
        self.evaluations = held["evaluations"]
        self.tokens = self._tokens_before = held["tokens"]

    def add(self, losses: Row, tokens: int) -> None:
        """Count one micro-batch with ``tokens`` response tokens."""
        self._micro_batches.append(losses)
        self.tokens += tokens

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock for tokens per second."""
        self._started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record and report an optimiser step; its losses are the means over its micro-batches."""
        columns = zip(*self._micro_batches, strict=True)
        self.history.append(self._row(*(sum(column) / len(column) for column in columns)))
        self._micro_batches.clear()
        if self.on_step:
            speed = (self.tokens - self._tokens_before) / max(time.monotonic() - self._started, 1e-9)
            self.on_step(state.global_step, state.max_steps, self.history[-1], speed)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def summary(self) -> dict[str, Any]:
        """Tokens seen, the losses averaged over the first and the last tenth of the run, the last evaluation."""
        tenth = math.ceil(len(self.history) / 10)

        def mean(rows: Sequence[Row]) -> dict[str, float]:
            columns = zip(self._row._fields, zip(*rows, strict=True), strict=True)
            return {name: round(sum(column) / len(column), 6) for name, column in columns}

        held_out = {"held_out": self.evaluations[-1]} if self.evaluations else {}
        ends = {"first": mean(self.history[:tenth]), "last": mean(self.history[-tenth:])}
        return {"tokens": self.tokens, **ends, **held_out}


def draw_losses(history: Sequence[Losses], evaluations: Sequence[dict[str, float]], path: Path) -> None:
    """Draw the run as an SVG: both losses by step, their running mean over 5% of the run, and the evaluations."""
    import matplotlib
    from matplotlib.figure import Figure

    window = max(1, len(history) // 20)
    steps = range(1, len(history) + 1)
    names = {"subtb": "SubTB", "value": "value loss"} | ({"reward_accuracy": "reward accuracy"} if evaluations else {})
    figure = Figure(figsize=(7, 2.4 * len(names)), layout="constrained")
    for axes, (key, name) in zip(figure.subplots(len(names), sharex=True), names.items(), strict=True):
        if key in Losses._fields:
            losses = [getattr(row, key) for row in history]
            means = [statistics.fmean(losses[max(0, end - window) : end]) for end in steps]
            axes.plot(steps, losses, color="0.8", linewidth=0.8)
            axes.plot(steps, means, color="tab:blue", label=f"mean of {window} steps")
        if evaluations:
            held_out = [evaluation[f"eval_{key}"] for evaluation in evaluations]
            evaluated = [evaluation["step"] for evaluation in evaluations]
            axes.plot(evaluated, held_out, "o-", color="tab:orange", markersize=3, label="held out")
        axes.set_ylabel(name)
        axes.legend(frameon=False)
    axes.set_xlabel("step")
    # a fixed salt for element ids and no date: the same run gives the same bytes; text stays text
    with matplotlib.rc_context({"svg.hashsalt": "llmdoctor", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
