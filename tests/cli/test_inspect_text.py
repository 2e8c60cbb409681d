"""``inspect --text``: any answer, scored as extract would score it."""

import json
import math

import numpy as np
import pytest

from llmdoctor.errors import UsageError
from llmdoctor.models import load_patient
from llmdoctor.profile import load_profile
from llmdoctor.records import FacePair
from llmdoctor.token_rewards.answer import score_answer
from llmdoctor.token_rewards.folder import RewardsFolder
from llmdoctor.token_rewards.pairs import read_pairs

PROMPT, ANSWER = "How can I sleep better?", "Keep the bedroom dark. There is no point in asking me."


def test_it_sees_what_extract_stores(clinic_rewards):
    profile = load_profile("clinic")
    patient = load_patient(profile.patient.model)
    data = profile.data
    pairs = read_pairs(data.source, split=data.split, label=data.label, limit=3)
    faces = {"helpful": profile.faces["helpful"].pair()}
    for pair, stored in zip(pairs, RewardsFolder(clinic_rewards), strict=False):
        for text, kept in ((pair.chosen, stored.chosen), (pair.rejected, stored.rejected)):
            own = score_answer(patient, faces, pair.prompt, text, side=kept.side)
            np.testing.assert_array_equal(own.response_ids, kept.response_ids)
            np.testing.assert_array_equal(own.prompt_ids, kept.prompt_ids)
            np.testing.assert_allclose(own.positive["helpful"], kept.positive["helpful"], atol=1e-3)
            np.testing.assert_allclose(own.negative["helpful"], kept.negative["helpful"], atol=1e-3)


def test_a_patient_without_a_chat_template_and_without_a_prompt(stories):
    patient = load_patient(stories)
    faces = {"merry": FacePair("A merry tale.", "A sad tale.")}
    scores = score_answer(patient, faces, "", "Once upon a time")
    assert scores.response_ids[-1] == patient.tokenizer.eos_token_id
    assert len(scores.positive["merry"]) == len(scores.response_ids)
    assert (scores.positive["merry"] < 0).all()
    with pytest.raises(UsageError, match="context of 512"):
        score_answer(patient, faces, "", "Once upon a time " * 200)


def test_every_form(run, tmp_path):
    asked = ("inspect", "--prompt", PROMPT, "--text", ANSWER, "--tau", 1)
    document = json.loads(run(*asked, "--json").stdout)
    assert (document["prompt"], document["answer"]) == (PROMPT, ANSWER)
    assert "".join(token["text"] for token in document["tokens"]) == ANSWER
    assert math.isclose(document["reward"], sum(token["reward"] for token in document["tokens"]), abs_tol=1e-5)
    text = run(*asked).stdout
    assert f"reward {document['reward']:+.2f}" in text
    assert PROMPT in text
    marks = sum(token["reward"] != 0 for token in document["tokens"])
    assert marks > 0
    for name in ("a.html", "a.svg"):
        assert run(*asked, f"--{name[2:]}", tmp_path / name).stdout == ""
        assert f"{document['reward']:+.2f}" in (tmp_path / name).read_text(encoding="utf-8").replace("&#160;", " ")
    assert (tmp_path / "a.html").read_text().count('" title="reward') == marks


def test_an_answer_whose_tokens_are_all_pruned_shows_its_raw_gap(run):
    done = run("inspect", "--prompt", PROMPT, "--text", "Just sleep.")
    assert "note: tau 40 and theta 0.3 prune every token of this answer" in done.stderr
    assert "\nJust sleep.\n" in done.stdout  # by reward nothing is marked
    assert "\nJ-ust sleep+.+" in done.stdout  # by gap; "ust" is below a tenth of the greatest
    assert "raw gap" not in run("inspect", "--text", "Just sleep.", "--show", "reward").stdout


def test_faces_of_profile_and_library(run):
    done = run("inspect", "--text", ANSWER, "--face", "safe", "--face", "polite", "--json")
    assert json.loads(done.stdout)["weights"] == {"safe": 0.5, "polite": 0.5}


def test_what_does_not_go_together(fails, clinic_rewards):
    fails(2, ["DIR", "--text"], "inspect")
    fails(2, ["--text", "leave out DIR"], "inspect", clinic_rewards, "--text", ANSWER)
    fails(2, ["--text"], "inspect", "--text", ANSWER, "--worst", 3)
    fails(2, ["--prompt", "--text"], "inspect", clinic_rewards, "--prompt", PROMPT)
    fails(2, ["fitted", "labelled"], "inspect", "--text", ANSWER, "--direction", "fitted")
    fails(2, ["--show", "'size'", "reward, gap or probe"], "inspect", "--text", ANSWER, "--show", "size")
    fails(2, ["--show probe", "extract --probe"], "inspect", "--text", ANSWER, "--show", "probe")
    fails(2, ["--show probe", "--probe"], "inspect", clinic_rewards, "--show", "probe")
    fails(2, ["empty"], "inspect", "--text", "")
    fails(2, ["--face", "'merry'"], "inspect", "--text", ANSWER, "--face", "merry")


def test_a_patient_in_the_environment_does_not_stand_in_the_way_of_a_folder(run, clinic_rewards):
    done = run("inspect", clinic_rewards, env={"LLMDOCTOR_PATIENT": "some/model", "LLMDOCTOR_INSPECT_LIMIT": "1"})
    assert done.exit_code == 0, done.output
    assert run("inspect", "--text", ANSWER, env={"LLMDOCTOR_INSPECT_LIMIT": "1"}).exit_code == 0
