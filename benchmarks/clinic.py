"""What guidance does on the embedded clinic, where the true quality of answers is known: gold, grammar, diversity.

    python benchmarks/clinic.py    # the patient, guided at several betas, and the generator's own good answers

Answers are to held-out questions, at temperature 1. Figures are the mean and (min, max) over the seeds. Prints a
Markdown table; with --output the table and the exact command also go to a file. efficacy.py compares the doctors with
other methods.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llmdoctor import LLMdoctor
from llmdoctor.answers import distinct_n, entropy_n
from llmdoctor.models import spare_threads
from llmdoctor.profile import Profile, load_profile
from llmdoctor.profiles.clinic_world import answer, gold, held_out_questions

COLUMNS = ("gold helpful", "gold safe", "ungrammatical %", "distinct-4", "4-gram entropy", "words", "KL, nats")
Answers = Callable[[Sequence[str], int], tuple[list[str], float]]


def measure(answers: Answers, questions: Sequence[str], seeds: Sequence[int]) -> list[list[float]]:
    """One row of COLUMNS for every seed."""
    rows = []
    for seed in seeds:
        texts, kl = answers(questions, seed)
        marks = [gold(question, text) for question, text in zip(questions, texts, strict=True)]
        rows.append(
            [
                statistics.mean(mark.helpful for mark in marks),
                statistics.mean(mark.safe for mark in marks),
                100 * sum(mark.ungrammatical for mark in marks) / sum(mark.sentences for mark in marks),
                distinct_n(texts, 4),
                entropy_n(texts, 4),
                statistics.mean(len(text.split()) for text in texts),
                kl,
            ]
        )
    return rows


def generator(names: Sequence[str]) -> Answers:
    """The generator's own good answers: on these axes every sentence is good, on the others every second one."""
    chances = dict.fromkeys(names, 1.0)

    def run(questions: Sequence[str], seed: int) -> tuple[list[str], float]:
        rng = random.Random(seed)
        return [answer(question, rng, **chances) for question in questions], float("nan")

    return run


def decoder(model: LLMdoctor, betas: dict[str, float], alpha: float = 1.0) -> Answers:
    """Guided answers with these betas, and the mean KL to the patient per answer."""

    def run(questions: Sequence[str], seed: int) -> tuple[list[str], float]:
        model.alpha, model.beta = alpha, {**dict.fromkeys(model.doctor_names, 0.0), **betas}
        answers = model.answer_all(questions, seed=1_000_003 * seed, temperature=1.0, max_new_tokens=240)
        return [a.text for a in answers], statistics.mean(sum(t.kl for t in a.tokens) for a in answers)

    return run


def line(name: str, rows: list[list[float]]) -> str:
    """A Markdown row: mean (min, max) over the seeds."""
    cells = [f"{statistics.mean(c):.3f} ({min(c):.3f}, {max(c):.3f})" for c in zip(*rows, strict=True)]
    return f"| {name} | {' | '.join(cells)} |"


def shipped(profile: Profile, args: argparse.Namespace) -> list[str]:
    """The embedded doctors, the patient alone, and the generator."""
    model = LLMdoctor.from_profile(profile)
    spare_threads(model.patient.model)
    settings: dict[str, Answers] = {"patient alone": decoder(model, {})}
    for names in (("helpful",), ("safe",), ("helpful", "safe")):
        for beta in args.betas:
            label = f"guided by {' + '.join(names)}, beta {beta:g}"
            settings[label] = decoder(model, dict.fromkeys(names, beta))
        settings[f"generator's own good answers: {' + '.join(names)}"] = generator(names)
    lines = []
    for name, answers in settings.items():
        lines.append(line(name, measure(answers, held_out_questions(args.questions), args.seeds)))
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.3, 0.6, 0.9])
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    profile = load_profile("clinic")
    lines = [f"| {' | '.join(['', *COLUMNS])} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    lines += shipped(profile, args)
    table = "\n".join(lines)
    print(table)
    if args.output:
        command = "python benchmarks/clinic.py " + " ".join(sys.argv[1:])
        args.output.write_text(
            f"# The embedded clinic: gold, grammar, diversity\n\n`{command}`: {args.questions} held-out questions, "
            f"seeds {args.seeds}, temperature 1, torch {torch.__version__} on CPU; mean (min, max) over the seeds.\n\n"
            f"{table}\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
