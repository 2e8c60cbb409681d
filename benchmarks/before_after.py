"""Did a change make decoding slower? An older checkout and this one answer the same prompts in turn.

    git worktree add ../before REVISION                      # with an environment in which its llmdoctor is installed
    python benchmarks/before_after.py ../before --python ../before/.venv/bin/python --models clinic,stories

Both checkouts stay loaded, each in a process of its own, and answer one batch at a time: before, after, after, before,
and so on, on the reference path and on the speculative one. The noise of a shared machine lasts longer than an answer,
so it falls on both alike. Times are each process's CPU time, on one thread. Figures are medians of the ratios within
one turn, with their quartiles; "noise" is the older checkout against itself, from one turn to the next.

The drafting of a turn is that of one conversation, as an app would have it: its controller goes on learning.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
PATHS = ("reference", "speculative")

# Runs in either checkout: it uses what their `decode.py` have in common. One JSON line per answered batch.
WORKER = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, "benchmarks")
import decode as bench, torch, transformers
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
name, cache, tokens = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
case = {
    "clinic": lambda: bench.clinic("cpu", ("helpful", "safe")),
    "clinic-one": lambda: bench.clinic("cpu", ("helpful",)),
    "stories": lambda: bench.stories("cpu", cache, 90),
    "qwen": lambda: bench.qwen("cpu", cache, 120),
}[name]()
how, ways = bench.Sampling(max_new_tokens=tokens), {}
out, sys.stdout = sys.stdout, sys.stderr
print("ready", file=out, flush=True)
for line in sys.stdin:
    path, size, turn = json.loads(line)
    if (path, size) not in ways:
        ways[path, size] = bench.ours(case, how, bench.Counting() if path == "speculative" else None)
    prompts = [case[3][(turn * size + i) % len(case[3])] for i in range(size)]
    began = time.process_time()
    count = ways[path, size](prompts, turn)
    print(json.dumps([count, time.process_time() - began]), file=out, flush=True)
"""


class Checkout:
    """A process that answers batches with the code of one checkout."""

    def __init__(self, tree: Path, python: str, model: str, cache: Path, tokens: int) -> None:
        self._tree = tree
        command = [python, "-c", WORKER, model, str(cache.resolve()), str(tokens)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self._tree} ended with {self._process.wait()}: see its message above")
        return line

    def seconds_per_token(self, path: str, size: int, turn: int) -> float:
        """CPU seconds of one batch divided by its tokens."""
        assert self._process.stdin is not None
        print(json.dumps([path, size, turn]), file=self._process.stdin, flush=True)
        count, seconds = json.loads(self._read())
        return float(seconds) / int(count)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def turns(sides: dict[str, Checkout], size: int, count: int) -> dict[str, list[float]]:
    """Seconds per token by "side path", one for each turn; the first turn, which warms up, is left out."""
    found: dict[str, list[float]] = defaultdict(list)
    for turn in range(count + 1):
        order = ("before", "after") if turn % 2 else ("after", "before")
        for path in PATHS:
            for side in order:
                seconds = sides[side].seconds_per_token(path, size, turn)
                if turn:
                    found[f"{side} {path}"].append(seconds)
    return found


def ratio(over: list[float], under: list[float]) -> str:
    """The median of the ratios, with their quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(over, under, strict=True)], n=4)
    return f"{middle:.3f} ({low:.2f}–{high:.2f})"


def rows(model: str, size: int, found: dict[str, list[float]]) -> list[str]:
    """Speeds: the inverse of the seconds."""
    lines = []
    for path in PATHS:
        before, after = found[f"before {path}"], found[f"after {path}"]
        gains = [ratio(found[f"{side} reference"], found[f"{side} speculative"]) for side in ("before", "after")]
        drafting = gains if path == "speculative" else ["", ""]
        cells = [ratio(before, after), ratio(before[:-1], before[1:]), *drafting]
        lines.append(f"| {model} | {size} | {path} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout of the older revision")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the older checkout")
    parser.add_argument("--models", default="clinic", help="of clinic, clinic-one, stories, qwen; with commas")
    parser.add_argument("--batch", default="1,8,32", help="batch sizes, with commas")
    parser.add_argument("--tokens", type=int, default=80, help="longest answer")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--cache", type=Path, default=Path("outputs/bench-models"), help="where trained models are")
    parser.add_argument("--output", type=Path, help="write the table there too")
    args = parser.parse_args()
    if args.turns < 3:
        parser.error("--turns: quartiles of the noise need at least 3 turns")
    lines = [
        f"`python {' '.join(sys.argv)}`",
        "",
        "| models | batch | path | speed after / before | noise | drafting over reference, before | after |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for model in args.models.split(","):
        trees = {"before": (args.before, args.python), "after": (HERE, sys.executable)}
        sides = {side: Checkout(*tree, model, args.cache, args.tokens) for side, tree in trees.items()}
        for size in map(int, args.batch.split(",")):
            lines += (new := rows(model, size, turns(sides, size, args.turns)))
            print("\n".join(new), flush=True)
        for side in sides.values():
            side.close()
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
