"""``compare`` as the place where one works: many prompts, further columns, sweeps, a KL budget, files."""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from llmdoctor import model_source
from llmdoctor.cli import compare, options, terminal
from llmdoctor.cli.kept_run import KeptRun
from llmdoctor.cli.measures_table import text_table
from llmdoctor.profile import load_profile

QUESTION = "How can I sleep better?"
SHORT = ("--max-new-tokens", 4, "--seed", 1)
BETAS = {name: doctor.beta for name, doctor in load_profile("clinic").doctors.items()}


@pytest.fixture(scope="module", autouse=True)
def _models_once():
    """What is loaded stays loaded for the next test."""
    load, loaded = options.load_assistant, {}

    def load_once(profile, **how):
        needed = repr((profile.patient, profile.doctors, profile.decode.mode))
        if needed not in loaded:
            loaded[needed] = load(profile, **how)
        return loaded[needed]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "load_assistant", load_once)
        yield


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "How can I cook rice?", "dataset": "d", "by": "me"}\n'
        '{"question_id": 81, "turns": ["How can I relax?", "So?"]}\n'
    )
    return path


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_many_prompts_in_one_run(run, prompts):
    """Both turns are answered, in every form at once, and the files have their programs' keys."""
    files = ("--html", "a.html", "--markdown", "a.md", "--svg", "a.svg", "--alpaca-eval", "ae", "--mt-bench", "mt")
    result = run("compare", "--prompts", prompts, *SHORT, *files, "--jsonl")
    made = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(one["prompt"], one["id"], one["turn"]) for one in made] == [
        ("How can I cook rice?", "1", 1),
        ("How can I relax?", "81", 1),
        ("So?", "81", 2),
    ]
    assert f"{prompts}: 2 prompts with 3 turns in all; not used: by\n" in result.stderr  # dataset is: by --alpaca-eval
    for path in ("a.html", "a.md", "a.svg"):
        assert made[2]["guided"]["text"].split()[-1] in Path(path).read_text()
    assert json.loads(Path("ae/guided.json").read_text())[0] == {
        "instruction": "How can I cook rice?",
        "output": made[0]["guided"]["text"].strip(),
        "generator": "guided",
        "dataset": "d",
    }
    answered = lines("mt/patient.jsonl")[1]
    assert list(answered) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert answered["question_id"] == 81
    assert answered["choices"] == [{"index": 0, "turns": [one["patient"]["text"].strip() for one in made[1:]]}]


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(run, prompts, monkeypatch):
    """Every ten seconds; here at once. It starts with the first answer of a run, not anew with every batch."""
    command = ("compare", "--prompts", prompts, *SHORT, "--rows", 1)
    assert "Asking" not in run(*command).stderr
    monkeypatch.setattr(terminal, "_PLAIN_INTERVAL", 0.0)
    said = re.findall(r"Asking: (\d+)/6 answers  (\d+) tokens?", run(*command).stderr)
    assert [int(tokens) for _, tokens in said] == list(range(1, 25))
    assert [int(answers) for answers, _ in said] == sorted(int(answers) for answers, _ in said)
    assert "Asking" not in run(*command, "--quiet").stderr


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (b'\xef\xbb\xbf[{"prompt": "How?"}, "Why?"]', ["How?", "Why?"]),
        (b'{"turns": ["How?", "So?"]}\n{"prompt": "Why?"}\n', ["How?", "So?", "Why?"]),
        (b'prompt,note\r\n"How, then?",x\r\n', ["How, then?"]),
        (b'"prompt","note"\n"How?","x"\n', ["How?"]),
        (b"note\tquestion\nx\tHow?\n", ["How?"]),
        (b'"How, prompt?"\n"Why?"\n', ["How, prompt?", "Why?"]),
        (b"How, prompt?\nWhy?\n", ["How, prompt?", "Why?"]),
    ],
)
def test_stdin_may_hold_any_kind_of_prompts(given, asked, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert [turn for question in compare.questions(None, "-", used=()) for turn in question.turns] == asked


def test_progress_counts_one_thing_in_the_singular(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "_level", 0)  # an earlier command may have been quiet
    monkeypatch.setattr(terminal, "_PLAIN_INTERVAL", 0.0)
    for total in (None, 1, 2):
        with terminal.progress("Scoring", total, "pair") as advance:
            advance()
    with terminal.progress("Scoring", None, "pair") as advance:
        advance(done=2)
    assert capsys.readouterr().err.splitlines() == [
        "Scoring: 1 pair",
        "Scoring: 1/1 pair",
        "Scoring: 1/2 pairs",
        "Scoring: 2 pairs",
    ]


def test_answers_of_a_doctor_that_was_replaced_are_not_taken(run, tmp_path):
    """The same command, the same folder, another doctor in it: as after a second training."""
    own = Path(str(load_profile("clinic").doctors["helpful"].checkpoint))
    shutil.copytree(own, "d")
    command = ("compare", "Hi", "--doctor", "x=d", "--max-new-tokens", 3, "--seed", 1, "--output", "a.jsonl")
    assert run(*command).exit_code == 0
    assert "holds all 2 answers already" in run(*command).stderr
    shutil.rmtree("d")
    shutil.copytree(own.parent / "safe", "d")
    refused = run(*command)
    assert refused.exit_code == 2
    assert "a.jsonl holds answers of another command" in refused.stderr


def test_a_stopped_run_goes_on_with_what_had_finished(run, prompts, monkeypatch):
    """It is stopped within a batch; what had finished is in the file, and the rest is the same as without the stop."""
    command = ("compare", "--prompts", prompts, "--max-new-tokens", 4, "--vs", "beta=2")
    whole = json.loads(run(*command, "--seed", 1, "--json").stdout)
    answered = KeptRun.keep

    def stop_after_four(self, key, timed):
        answered(self, key, timed)
        if self.answers == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KeptRun, "keep", stop_after_four)
        stopped = run(*command, "--seed", 1, "--output", "a.jsonl")
        assert stopped.exit_code == 130
        kept = "kept 4 answers in a.jsonl; run the same command again to go on"
        assert stopped.stderr.splitlines()[-2:] == [kept, "interrupted"]
        without = run(*command, "--seed", 1)
        assert (without.exit_code, without.stderr.splitlines()[-1]) == (130, "interrupted")
        assert without.stderr.splitlines()[-2].startswith("nothing was kept: with --output FILE ")
    assert [(one["column"], one["id"], one["turn"]) for one in lines("a.jsonl")[:3]] == [
        ("patient", "1", 1),
        ("patient", "81", 1),
        ("patient", "81", 2),
    ]
    with Path("a.jsonl").open("a") as file:
        file.write('{"id": "81", "column"')  # as a power cut leaves it
    again = run(*command, "--output", "a.jsonl", "--json")
    assert "a.jsonl: going on after 4 answers" in again.stderr
    for mine, other in zip(json.loads(again.stdout)["comparisons"], whole["comparisons"], strict=True):
        assert [mine[side]["text"] for side in ("patient", "guided")] == [
            other[side]["text"] for side in ("patient", "guided")
        ]
        assert mine["vs"][0]["answer"]["text"] == other["vs"][0]["answer"]["text"]
    before = Path("a.jsonl").read_bytes()
    finished = run(*command, "--output", "a.jsonl")
    assert finished.stderr.splitlines()[-1] == "a.jsonl: holds all 9 answers already"
    for other in (("--temperature", 0.5), ("--seed", 2), ("--samples", 2), ("--vs", "beta=3")):
        refused = run(*command, "--output", "a.jsonl", *other)
        assert (refused.exit_code, "give another --output" in refused.stderr) == (2, True)
    assert Path("a.jsonl").read_bytes() == before


@pytest.mark.parametrize("kind", ["html", "svg"])
def test_pictures_are_written(kind, run, tmp_path):
    path = tmp_path / f"answer.{kind}"
    result = run("compare", QUESTION, f"--{kind}", path, "--max-new-tokens", 8)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"wrote {path}\n")
    assert "patient" in path.read_text(encoding="utf-8")


def test_further_columns_say_what_each_would_say_alone(run):
    """A setting, another doctor, another profile: each as if it were the guided side; in JSON by name."""
    helpful = load_profile("clinic").doctors["helpful"].checkpoint
    profile = Path("mine.yaml")
    profile.write_text("extends: clinic\ndecode: {temperature: 0}\n")
    columns = {
        "beta=2 temperature=0.5": ("--beta", 2, "--temperature", 0.5),
        f"doctor={helpful} beta=1": ("--profile", "clinic", "--doctor", helpful, "--beta", 1),
        "profile=mine.yaml": ("--profile", profile),
        "seed=7": ("--seed", 7),
        "mode=product": ("--mode", "product"),
    }
    named = [part for name in columns for part in ("--vs", name)]
    compared = json.loads(run("compare", QUESTION, *SHORT, *named, "--json").stdout)
    assert list(compared)[-1] == "vs"
    assert [one["name"] for one in compared["vs"]] == list(columns)
    for one, alone in zip(compared["vs"], columns.values(), strict=True):
        by_itself = json.loads(run("compare", QUESTION, *SHORT, *alone, "--json").stdout)
        ids, its = (
            [token["id"] for token in tokens] for tokens in (one["answer"]["tokens"], by_itself["guided"]["tokens"])
        )
        assert ids == its
        assert one["settings"]["betas"] == by_itself["settings"]["betas"]
        assert one["settings"]["seed"] == by_itself["settings"]["seed"]
        assert one["metrics"]["kl"] == pytest.approx(by_itself["metrics"]["kl"], abs=1e-3)


def test_further_columns_in_every_form(run, prompts, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # speeds have as many digits as the machine is fast
    vs = ("--vs", "helpful=3", "--vs", "system_prompt='Be brief.'")
    files = ("--html", "a.html", "--markdown", "a.md", "--svg", "a.svg", "--mt-bench", "mt", "--output", "a.jsonl")
    made = run("compare", "--prompts", prompts, *SHORT, *vs, *files, "--json")
    assert made.exit_code == 0, made.output + repr(made.exception)
    summary = json.loads(made.stdout)["summary"]
    assert list(summary["vs"]) == ["helpful=3", "system_prompt='Be brief.'"]
    assert summary["vs"]["helpful=3"]["tokens"]["value"] == 4
    for path in ("a.html", "a.md", "a.svg"):
        text = Path(path).read_text().replace("&#160;", " ").replace("\\", "")
        assert text.count("helpful=3: guided by") >= 3, path
    assert sorted(path.name for path in Path("mt").iterdir()) == [
        "guided.jsonl",
        "helpful=3.jsonl",
        "patient.jsonl",
        "system_prompt=_Be_brief..jsonl",
    ]
    plain = run("compare", "--prompts", prompts, *vs, "--max-new-tokens", 4, "--seed", 1)
    assert plain.stdout.count("helpful=3: guided by helpful 3, safe 0.6:\n") == 3
    header = next(line for line in plain.stdout.splitlines() if line.lstrip().startswith("patient alone "))
    assert "helpful=3" in header


@pytest.mark.parametrize(
    ("vs", "words"),
    [
        ("much", ["--vs", "name=value", "'much'"]),
        ("quack=1", ["--vs", "no setting 'quack'", "beta.helpful"]),
        ("beta=-1", ["--vs", "beta of helpful", "greater than or equal to 0"]),
        ("profile=nowhere", ["unknown profile 'nowhere'"]),
        ("profile=", ["--vs", "profile=...", "'profile='"]),
        ("profile=clinic profile=clinic", ["--vs", "one profile"]),
        ("stop='a", ["--vs", "quotation mark"]),
    ],
)
def test_a_column_that_cannot_be_is_one_line(vs, words, fails):
    fails(2, words, "compare", "Hi", "--vs", vs)


def test_a_doctor_of_a_column_that_is_missing_is_said_before_anything_is_loaded(fails, monkeypatch):
    monkeypatch.setattr(options, "load_assistant", lambda *_args, **_how: pytest.fail("loaded a model"))
    helpful = load_profile("clinic").doctors["helpful"].checkpoint
    fails(3, ["no doctor at nowhere"], "compare", "Hi", "--vs", "doctor=nowhere")
    fails(3, ["no doctor at nowhere"], "compare", "Hi", "--sweep", f"doctor={helpful},nowhere")


def test_columns_and_options_that_exclude_each_other(fails):
    fails(2, ["--vs", "given twice"], "compare", "Hi", "--vs", "beta=1", "--vs", "beta=1")
    fails(2, ["alpha and every beta are 0"], "compare", "Hi", "--vs", "alpha=0 beta=0")
    fails(2, ["--sweep", "--vs"], "compare", "Hi", "--vs", "beta=1", "--sweep", "beta=0:1:1")
    fails(2, ["--follow", "--diff"], "compare", "Hi", "--follow", "--diff")
    for wrong in ("beta", "beta=", "beta=0:1:0", "beta=1:0:0.1", "beta=0:1:1e-9", "beta=a:b:c", "quack=1,2"):
        fails(2, ["--sweep"], "compare", "Hi", "--sweep", wrong)
    fails(2, ["--kl-budget", "above 0"], "compare", "Hi", "--kl-budget", 0)


def test_a_sweep_is_a_table_and_a_picture_and_goes_on_where_it_was_stopped(run, prompts):
    """Every point measures the answers that compare gives with that setting; beta 0 is the patient."""
    sweep = ("compare", "--prompts", prompts, "--max-new-tokens", 4, "--sweep", "beta=0:1:0.5")
    files = ("--html", "s.html", "--markdown", "s.md", "--svg", "s.svg", "--output", "s.jsonl")
    made = run(*sweep, *files, "--seed", 1, "--json")
    assert made.exit_code == 0, made.output + repr(made.exception)
    found = json.loads(made.stdout)
    assert (found["sweep"], found["prompts"], found["answers"], found["seed"]) == (["beta"], 2, 3, 1)
    assert [point["point"] for point in found["points"]] == [{"beta": 0.0}, {"beta": 0.5}, {"beta": 1.0}]
    compared = json.loads(run("compare", "--prompts", prompts, *SHORT, "--beta", 1, "--json").stdout)["summary"]
    first, _, last = (point["measures"] for point in found["points"])
    assert set(last) == set(compared["guided"])
    timed = {"tokens_per_second"}
    for name in set(last) - timed:
        value = compared["guided"][name]["value"]  # None: four tokens may have no 4-gram of words
        assert last[name]["value"] == (value if value is None else pytest.approx(value, rel=1e-4))
    assert first["kl_per_token"] == first["changed"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    alone = compared["patient"]["patient_logprob"]
    assert first["patient_logprob"]["value"] == pytest.approx(alone["value"], rel=1e-4)
    assert {"helpful_logprob", "words", "tokens", "distinct_4", "repeating"} <= set(first)

    picture = ElementTree.parse("s.svg").getroot()
    drawn = {element.get("id") for element in picture.iter() if element.get("id")}
    assert {f"{name}-0" for name in first} <= drawn
    table = run(*sweep, "--output", "s.jsonl")
    assert "holds all 9 answers already" in table.stderr
    assert table.stdout.splitlines()[0] == "2 prompts, 3 answers per point, seed 1 (95% intervals)"
    for text in (table.stdout, Path("s.md").read_text(), Path("s.html").read_text()):
        assert "KL per token" in text
        assert "helpful log-prob" in text

    kept = Path("s.jsonl").read_text().splitlines(keepends=True)
    Path("s.jsonl").write_text("".join(kept[:5]))
    again = run(*sweep, "--output", "s.jsonl", "--jsonl")
    assert [json.loads(line)["point"]["beta"] for line in again.stdout.splitlines()] == [0.0, 0.5, 1.0]
    assert sorted(json.loads(line)["answer"]["text"] for line in kept) == sorted(
        line["answer"]["text"] for line in lines("s.jsonl")
    )


def test_several_sweeps_are_a_grid(run):
    sweep = ("--sweep", "helpful=0,1", "--sweep", "mode=ratio,product", "--max-new-tokens", 2, "--seed", 1)
    made = json.loads(run("compare", QUESTION, *sweep, "--json", "--svg", "g.svg").stdout)
    assert [tuple(point["point"].values()) for point in made["points"]] == [
        (0.0, "ratio"),
        (0.0, "product"),
        (1.0, "ratio"),
        (1.0, "product"),
    ]
    assert [point["settings"]["mode"] for point in made["points"]] == ["ratio", "product"] * 2
    assert all("mode=product" not in text or "ratio" not in text for text in Path("g.svg").read_text().splitlines())
    assert made["points"][0]["measures"]["tokens"] == {"value": 2.0, "low": None, "high": None}


def test_a_sweep_reads_the_weights_once_however_many_points_it_has(run, monkeypatch):
    """To tell its answers from those of other models at the same places."""
    read = []
    for name in ("doctor_fingerprint", "model_fingerprint"):
        own = getattr(model_source, name)
        monkeypatch.setattr(model_source, name, lambda place, own=own: read.append(str(place)) or own(place))
    profile = load_profile("clinic")
    how = ("compare", QUESTION, "--max-new-tokens", 1, "--sweep", "beta=0:4:1", "--output", "s.jsonl", "--quiet")
    assert run(*how).exit_code == 0
    doctors = [str(doctor.checkpoint) for doctor in profile.doctors.values()]
    assert sorted(read) == sorted([profile.patient.model, *doctors])


def test_what_a_full_screen_cannot_show_is_named(fails):
    wanted = ["--tui shows whole answers", "no --sweep and no --follow", "--html FILE"]
    fails(2, wanted, "compare", "Hi", "--tui", "--sweep", "beta=0,1", "--follow")
    fails(2, ["it takes no --diff"], "compare", "Hi", "--tui", "--diff")
    fails(2, ["--tui needs a terminal"], "compare", "Hi", "--tui", "--vs", "beta=1", "--kl-budget", 0.1)


def test_a_kl_budget_finds_the_beta_and_answers_with_it(run, prompts):
    command = ("compare", "--prompts", prompts, "--max-new-tokens", 8, "--kl-budget", 0.3, "--vs", "helpful=0")
    command += ("--mode", "product", "--output", "k.jsonl")
    made = json.loads(run(*command, "--seed", 1, "--json").stdout)
    budget = made["kl_budget"]
    assert made["comparisons"][0]["settings"]["betas"] == budget["betas"]
    assert budget["betas"]["safe"] / budget["betas"]["helpful"] == pytest.approx(BETAS["safe"] / BETAS["helpful"], 1e-3)
    assert made["summary"]["guided"]["kl_per_token"] == budget["kl_per_token"]
    assert budget["kl_per_token"]["value"] == pytest.approx(0.3, rel=0.05)
    betas = made["comparisons"][0]["vs"][0]["settings"]["betas"]
    assert betas == {"helpful": 0.0, "safe": budget["betas"]["safe"]}
    by_hand = [part for name, beta in budget["betas"].items() for part in ("--beta", f"{name}={beta}")]
    again = run(
        "compare", "--prompts", prompts, "--max-new-tokens", 8, "--seed", 1, "--mode", "product", *by_hand, "--json"
    )
    texts, its = (
        [one["guided"]["text"] for one in document["comparisons"]] for document in (made, json.loads(again.stdout))
    )
    assert texts == its
    size = Path("k.jsonl").stat().st_size
    told = run(*command)
    assert f"KL budget 0.3 nats per token: beta helpful={budget['betas']['helpful']:g}" in told.stdout
    assert "95%" in told.stdout
    assert Path("k.jsonl").stat().st_size == size


def test_following_shows_what_the_patient_would_have_said(run):
    how = (QUESTION, "--max-new-tokens", 12, "--seed", 11, "--beta", 2, "--follow")
    tokens = json.loads(run("compare", *how, "--json").stdout)["guided"]["tokens"]
    away = [token for token in tokens if token["patient_id"] != token["id"]]
    assert away
    first = away[0]
    assert first["text"].strip() != first["patient_text"].strip() != ""
    files = ("--html", "f.html", "--markdown", "f.md", "--svg", "f.svg")
    assert run("compare", *how, *files).exit_code == 0
    instead, said = first["patient_text"].strip(), first["text"].strip()
    assert f"[-{instead}-]{{+{said}+}}" in run("compare", *how).stdout
    assert f"~~{instead}~~**{said}**" in Path("f.md").read_text()
    assert f"<del>{instead}</del><ins>{said}</ins>" in Path("f.html").read_text()
    assert f"it led away from the patient's own token at {len(away)};" in Path("f.md").read_text()
    nothing = run("compare", QUESTION, "--max-new-tokens", 12, "--seed", 11, "--beta", 0, "--follow").stdout
    assert "{+" not in nothing
    assert "own token at 0;" in nothing


def test_records_that_cannot_be_asked_are_skipped_and_ids_that_come_again_are_told_apart(run):
    path = Path("p.jsonl")
    path.write_text(
        '{"question_id": 5, "prompt": "How can I cook rice?"}\n{"prompt": ""}\n{\n'
        '{"question_id": 5, "prompt": "How can I go camping?"}\n'
    )
    result = run("compare", "--prompts", path, *SHORT, "--json", "--mt-bench", "mt", "--output", "a.jsonl")
    assert f"{path}: skipped 2 of 4 records (line 2: " in result.stderr
    made = json.loads(result.stdout)
    assert [one["id"] for one in made["comparisons"]] == ["5", "5#2"]
    assert made["summary"]["prompts"] == 2
    answered = lines("mt/guided.jsonl")
    assert [line["question_id"] for line in answered] == [5, 5]
    assert [line["choices"][0]["turns"][0] for line in answered] == [
        one["guided"]["text"].strip() for one in made["comparisons"]
    ]
    kept = sorted((line["question"], line["prompt"]) for line in lines("a.jsonl") if line["column"] == "guided")
    assert kept == [
        (1, "How can I cook rice?"),
        (2, "How can I go camping?"),
    ]


def test_real_pairs_with_an_unusable_record_are_asked(shared):
    said = []
    from llmdoctor.token_rewards.pairs import read_questions

    asked = read_questions(shared / "hh-rlhf" / "harmless-base_test.jsonl.gz", on_note=said.append)
    assert len(asked) == 2303
    assert "skipped 9 of 2312 records (line 87: " in said[0]


class Terminal(io.StringIO):
    """A stdout that is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("variable", ["NO_COLOR", "TERM"])
def test_a_terminal_without_colours_keeps_the_table_and_breaks_at_words(variable, run, monkeypatch, comparison, token):
    monkeypatch.setenv(variable, {"NO_COLOR": "1", "TERM": "dumb"}[variable])
    monkeypatch.setenv("COLUMNS", "80")
    words = "Sleep comes sooner in a dark and quiet room, so draw the curtains and put the screens away early."
    followed = token(" early", patient_id=9, patient_text=" late")
    guided = [token(part) for part in words.removesuffix(" early.").replace(" ", "| ").split("|")] + [
        followed,
        token("."),
    ]
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    compare._print(compare.View.of(comparison(words, guided), follow=True), first=True)
    shown = screen.getvalue()
    assert "\x1b" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    assert len(rows) > 3
    left, right = (" ".join(" ".join(line.split("│")[i] for line in rows).split()) for i in (1, 2))
    assert left == f"patient alone {words}"
    assert right == f"guided by helpful 0.8 {words.replace('early.', '[-late-]{+early+}.')}"
    assert not any(line.rstrip("│ ").endswith("-") for line in rows)


def test_columns_that_do_not_fit_follow_below():
    table = text_table(["beta", "tokens", "words"], [["0", "12 ±1", "9 ±1"], ["0.5", "13 ±2", "10 ±2"]], width=16)
    assert table == "beta  tokens\n0     12 ±1\n0.5   13 ±2\n\nbeta  words\n0     9 ±1\n0.5   10 ±2"
