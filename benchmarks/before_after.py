"""Did a change make decoding slower? Runs `decode.py` of an older checkout and of this one alternately.

    git worktree add ../before REVISION                      # with an environment in which its llmdoctor is installed
    python benchmarks/before_after.py ../before --python ../before/.venv/bin/python --rounds 3 -- \
        --models clinic,stories --batch 1,8,32 --repeats 3 --threads 1 --clock cpu --cache outputs/bench-models

Each round runs both checkouts, in the opposite order of the round before. Both get the arguments after ``--``. The
table has, for every row of `decode.py`, the speed after the change divided by the speed before it: first in tokens per
second, then relative to ``patient.generate``. Each checkout measures that in the same process, so the second figure
depends less on what else the machine is doing. Figures are medians over the rounds (least–greatest).

Finished runs are kept in ``--log``; the same command continues from there.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def measured(tree: Path, python: str, arguments: list[str]) -> dict[str, list[float]]:
    """For every row "models | batch | way": tokens per second, and the speed relative to ``patient.generate``."""
    command = [python, "benchmarks/decode.py", *arguments]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} in {tree} failed:\n{done.stderr.strip()[-2000:]}")
    found = {}
    for line in done.stdout.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 6 and cells[1].isdigit() and cells[4]:
            found[" | ".join(cells[:3])] = [float(cell.split(" ")[0]) for cell in cells[3:5]]
    if not found:
        raise SystemExit(f"{' '.join(command)} in {tree} printed no table:\n{done.stdout[-2000:]}")
    return found


def table(runs: list[dict]) -> list[str]:
    """Markdown rows of the rounds in which both checkouts have run."""
    sides: dict[int, dict[str, dict[str, list[float]]]] = defaultdict(dict)
    for run in runs:
        sides[run["round"]][run["side"]] = run["rows"]
    both = [side for side in sides.values() if len(side) == 2]
    lines = [
        "| models | batch | way | after / before, tokens per second | after / before, times patient.generate |",
        "|---|---|---|---|---|",
    ]
    for row in both[0]["after"] if both else ():
        pairs = [(side["before"][row], side["after"][row]) for side in both if row in side["before"]]
        if pairs and "generate" not in row.split(" | ")[2]:
            cells = [spread([after[i] / before[i] for before, after in pairs]) for i in (0, 1)]
            lines.append(f"| {row} | {cells[0]} | {cells[1]} |")
    return lines


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout of the older revision")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the older checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--log", type=Path, default=Path("outputs/before-after.jsonl"), help="finished runs")
    parser.add_argument("--output", type=Path, help="write the table there too")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:end])
    args.arguments = given[end + 1 :]
    runs = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log.is_file() else []
    runs = [run for run in runs if run["arguments"] == args.arguments]
    trees = {"before": (args.before, args.python), "after": (HERE, sys.executable)}
    args.log.parent.mkdir(parents=True, exist_ok=True)
    for number in range(args.rounds):
        for side in ("before", "after") if number % 2 == 0 else ("after", "before"):
            if any((run["round"], run["side"]) == (number, side) for run in runs):
                continue
            print(f"round {number + 1} of {args.rounds}: {side}", file=sys.stderr, flush=True)
            rows = measured(*trees[side], args.arguments)
            runs.append({"round": number, "side": side, "arguments": args.arguments, "rows": rows})
            with args.log.open("a") as log:
                log.write(json.dumps(runs[-1]) + "\n")
    lines = [f"`python {' '.join(sys.argv)}`", "", *table(runs)]
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
