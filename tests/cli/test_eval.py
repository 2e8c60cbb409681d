"""``eval`` as a user runs it, on the clinic; and what ``train`` says at its end."""

import gzip
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from llmdoctor.cli import eval as evaluation
from llmdoctor.cli.evaluation_report import tables, verdict
from llmdoctor.cli.measures_table import MEASURES
from llmdoctor.profile import profile_path
from llmdoctor.profiles.clinic_world import held_out_questions
from llmdoctor.records import Estimate

CLINIC = profile_path("clinic").parent / "clinic"
PROMPTS = held_out_questions(2)
SHORT = ("--max-new-tokens", 16)
JUDGE = """
from llmdoctor.profiles.clinic_world import gold
def helpful(prompt, answer): return gold(prompt, answer).helpful
def better(prompt, a, b): return "a" if helpful(prompt, a) > helpful(prompt, b) else "tie"
"""


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """In the working folder, what the examples of the help name."""
    (tmp_path / "work" / "outputs").mkdir()
    Path("outputs/doctor").symlink_to(CLINIC / "helpful")
    with gzip.open(CLINIC / "pairs.jsonl.gz", "rt") as file:
        Path("held-out.jsonl").write_text("".join(next(file) for _ in range(4)))
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    Path("my_judge.py").write_text(JUDGE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "work"
    sys.modules.pop("my_judge", None)


def test_the_examples_of_the_help_run(run, inputs):
    shown = run("eval", "--help", env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    said = []
    for line in evaluation.EXAMPLES:
        assert line in shown
        done = run(*shlex.split(line), *SHORT, "--label", "better_response_id", "--seed", 1)
        assert done.exit_code == 0, (line, done.output, done.exception)
        said.append(done.stdout)
    pairs, judged, frontier = said
    assert pairs.startswith("patient clinic/patient; doctor helpful (outputs/doctor)\n")
    for name in ("helpful", "untrained base", "patient alone", "the longer answer"):
        assert re.search(rf"^{name} +[\d.]+% \([\d.]+% to [\d.]+%\)", pairs, re.M), pairs
    assert re.search(r"^chance +50.0%", pairs, re.M)
    assert "guided by helpful 0.8" in judged
    assert re.search(r"judge my_judge:better \(pairwise\)\nguided wins +[\d.]+% \(", judged)
    betas = [line.split()[0] for line in frontier.splitlines() if re.match(r"[\d.]+  ", line)]
    assert betas == ["0", "0.5", "1", "2"] * (len(betas) // 4)
    assert len(betas) > 4, "the table does not fit 100 columns"
    page = Path("report.html").read_text()
    assert "KL per answer" in page
    assert page.count('id="setting-') == 4
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page), "the page fetches something"


def test_every_measure_has_one_name_wherever_it_stands(run, inputs):
    """In the tables of compare and eval, in both helps, and with its meaning in docs/evaluate.md."""
    asked = ("--prompts", "prompts.txt", *SHORT, "--seed", 1)
    compared = run("compare", *asked).stdout
    compared = compared[compared.index("2 prompts, 2 answers per column") :]
    evaluated = run("eval", "outputs/doctor", *asked, "--judge", "my_judge:helpful").stdout
    kinds = {key: name.replace("NAME", "helpful") for key, (name, _) in MEASURES.items() if key != "agreed"}
    judged = {"win_rate", "patient_score", "guided_score", "gain"}
    for key, name in kinds.items():
        row = re.compile(rf"^{re.escape(name)}  ", re.M)
        assert row.search(evaluated), name
        assert bool(row.search(compared)) == (key not in judged), name
    for command in ("compare", "eval"):
        shown = " ".join(run(command, "--help", env={"COLUMNS": "80", "TERM": "dumb"}).stdout.split())
        listed = shown[shown.index("Measures: ") :].partition(";")[0].removeprefix("Measures: ").split(", ")
        assert listed == [name for key, (name, _) in MEASURES.items() if key not in {*judged, "agreed"}]
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()
    glossary = re.findall(r"^\| ([^|`]+) \| `(\w+)` \| (.+) \|$", page.replace("\\|", "¦"), re.M)
    assert {key: (name, meaning.replace("¦", "|")) for name, key, meaning in glossary} == MEASURES


def test_a_frontier_goes_on_where_it_was_stopped_and_takes_another_judge(run, inputs):
    asked = ("eval", "outputs/doctor", "--prompts", "prompts.txt", "--betas", "helpful=0,1", *SHORT, "-o", "a.jsonl")
    whole = json.loads(run(*asked, "--seed", 3, "--judge", "my_judge:helpful", "--json").stdout)
    lines = Path("a.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 3 * len(PROMPTS)  # the patient, and two betas
    Path("a.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    again = json.loads(run(*asked, "--judge", "my_judge:helpful", "--json").stdout)

    def numbers(report):
        """All but the speed, and without what a batch of another size rounds differently."""
        sides = [report["answers"]["patient"], *report["answers"]["guided"]]
        found = {f"{i} {name}": e["value"] for i, s in enumerate(sides) for name, e in s["measures"].items()}
        judged = {f"{i} {name}": e["value"] for i, s in enumerate(sides[1:]) for name, e in s["judge"].items()}
        return judged | {name: value for name, value in found.items() if "tokens_per_second" not in name}

    assert numbers(again) == pytest.approx(numbers(whole), abs=1e-4)
    answers = whole["answers"]
    assert (answers["prompts"], answers["answers"]) == (2, 2)
    still, guided = answers["guided"]
    assert (still["betas"], guided["betas"]) == ({"helpful": 0.0}, {"helpful": 1.0})
    assert still["measures"]["kl"]["value"] == 0 < guided["measures"]["kl"]["value"]
    assert still["judge"]["win_rate"]["value"] == 0.5
    assert still["judge"]["gain"]["value"] == 0
    command = f'{sys.executable} -c \'print("\\"b\\"")\''
    other = run(*asked, "--judge", command, "--json")
    assert other.exit_code == 0, other.output
    found = json.loads(other.stdout)["answers"]["guided"][1]["judge"]
    assert (found["win_rate"]["value"], found["agreed"]["value"]) == (0.5, 0.0)  # always the second place


def test_several_doctors_and_prompts_from_stdin(run, inputs):
    how = ("eval", f"a={CLINIC / 'helpful'}", f"b={CLINIC / 'safe'}", "--betas", "b=0,1", *SHORT, "--svg", "p.svg")
    done = run(*how, "--prompts", "-", "--data", "held-out.jsonl", "--json", input=json.dumps([PROMPTS[0]]))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found["preference"]["doctors"]) == {"a", "b"}
    assert found["preference"]["bases"]["a"] == found["preference"]["bases"]["b"]
    assert [s["betas"] for s in found["answers"]["guided"]] == [{"a": 0.8, "b": 0.0}, {"a": 0.8, "b": 1.0}]
    assert {'id="prefers-0"', 'id="setting-1"'} <= set(re.findall(r'id="[a-z]+-\d"', Path("p.svg").read_text()))


@pytest.mark.parametrize(
    ("code", "words", "args"),
    [
        (2, ["--data", "--prompts"], []),
        (2, ["--judge", "--prompts"], ["--data", "x.jsonl", "--judge", "a:b"]),
        (2, ["--betas", "'quack'", "helpful"], ["--prompts", "-", "--betas", "quack=1"]),
        (2, ["--betas", "'much'"], ["--prompts", "-", "--betas", "0,much"]),
        (2, ["beta", "-1"], ["--prompts", "-", "--betas", "0,-1"]),
        (2, ["--judge-kind", "'loud'"], ["--prompts", "-", "--judge", "x", "--judge-kind", "loud"]),
        (2, ["nowhere.jsonl"], ["--data", "nowhere.jsonl"]),
        (2, ["nowhere.txt"], ["--prompts", "nowhere.txt"]),
        (3, ["no doctor at nowhere"], ["nowhere", "--prompts", "-"]),
        (2, ["exit status 4", "broken"], ["--prompts", "-", "--judge", "echo broken >&2; exit 4"]),
        (2, ["expected JSON", "hello"], ["--prompts", "-", "--judge", "echo hello"]),
        (3, ["no_such_module"], ["--prompts", "-", "--judge", "no_such_module:f"]),
        (3, ["no model at ./nowhere"], ["--prompts", "-", "--patient", "./nowhere"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_mistake_is_one_line(code, words, args, fails):
    fails(code, words, "eval", *args, input="Hi?")


def test_train_ends_with_how_it_did_and_what_to_run_next(run, tmp_path, clinic_rewards):
    asked = ("train", "--rewards", clinic_rewards, "--max-steps", 1, "-o", tmp_path / "doctor")
    assert "no pairs were held out: --holdout" in run(*asked).stdout
    done = run(*asked, "--holdout", "0.4", "--fresh").stdout
    found = json.loads((tmp_path / "doctor" / "doctor.json").read_text())["metrics"]
    share, low, high, count = (
        *(found["prefers_chosen"][key] for key in ("value", "low", "high")),
        found["pairs_held_out"],
    )
    shown = (
        f"the doctor prefers the chosen answer in {share:.1%} of {count} held-out pairs (95%: {low:.1%} to {high:.1%}; "
    )
    assert shown in done
    assert f"chance is 50%): it {verdict(Estimate(share, low, high))}\n" in done  # in the words of eval
    assert verdict(Estimate(0.6, 0.52, 0.7)) == "prefers the chosen answer more often than chance"
    assert verdict(Estimate(0.4, 0.3, 0.48)) == "prefers the rejected answer more often than chance"
    assert share == found["held_out"]["eval_reward_accuracy"]
    *_, chat, again = [shlex.split(line) for line in done.splitlines() if line.startswith("  llmdoctor ")]
    assert chat == ["llmdoctor", "chat", "--doctor", str(tmp_path / "doctor")]
    (tmp_path / "PROMPTS").write_text(PROMPTS[0])
    filled = {"PAIRS": CLINIC / "pairs.jsonl.gz", "PROMPTS": tmp_path / "PROMPTS"}
    ran = run(*(filled.get(word, word) for word in again[1:]), *SHORT, "--limit", 3, "--label", "better_response_id")
    assert ran.exit_code == 0, ran.output
    assert "was trained on these very pairs" in ran.stderr


def test_a_lead_whose_interval_covers_0_is_called_unclear():
    """And one that lies above or below 0 is called clear."""

    def estimate(value, low, high):
        return {"value": value, "low": low, "high": high}

    one = dict.fromkeys(("chosen", "shorter", "margin"), estimate(0.7, 0.524, 0.832))
    leads = {"base": estimate(0.233, 0.012, 0.423), "longer": estimate(0.183, -0.075, 0.412)}
    behind = {"base": estimate(-0.2, -0.3, -0.1), "longer": estimate(0.0, -0.1, 0.1)}
    report = {"pairs": 60, "data": "x", "shorter": 9, "skipped": {}, "patient": one, "longer": one}
    report |= {"doctors": {"a": one, "b": one}, "bases": {"a": one, "b": one}, "beyond": {"a": leads, "b": behind}}
    (table,) = tables({"preference": report})
    assert table.notes == (
        "a prefers the chosen answer more often than chance; clearly more often than its base: +23.3 points (+1.2 to "
        "+42.3); not clearly more often than the longer answer: +18.3 points (-7.5 to +41.2)",
        "b prefers the chosen answer more often than chance; clearly less often than its base: -20.0 points (-30.0 to "
        "-10.0); not clearly more often than the longer answer: +0.0 points (-10.0 to +10.0)",
    )


def test_a_doctor_brings_the_patient_that_it_was_trained_for(fails, tmp_path):
    doctor = tmp_path / "doctor"
    doctor.mkdir()
    meta = json.loads((CLINIC / "helpful" / "doctor.json").read_text())
    meta["rewards"] = {"patient": "./elsewhere", "patient_fingerprint": "another"}
    (doctor / "doctor.json").write_text(json.dumps(meta))
    fails(3, ["no model at ./elsewhere"], "eval", doctor, "--prompts", "-", input="Hi?")
    fails(3, ["no model at ./named"], "eval", doctor, "--prompts", "-", "--patient", "./named", input="Hi?")
