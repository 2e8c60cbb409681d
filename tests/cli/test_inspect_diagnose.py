"""``inspect --diagnose`` and the end of ``extract``, on folders of known gaps and on the clinic itself."""

import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from llmdoctor.cli import findings
from llmdoctor.errors import UsageError
from llmdoctor.files import write_json
from llmdoctor.profile import load_profile
from llmdoctor.records import PairScores, TokenScores
from llmdoctor.token_rewards.diagnosis import diagnose
from llmdoctor.token_rewards.fit import features
from llmdoctor.token_rewards.folder import RewardsFolder, write_shard
from llmdoctor.token_rewards.summary import HARDLY

SETTINGS = load_profile("clinic").rewards.model_copy(update={"faces": None})  # what inspect reads rewards with


@pytest.fixture
def folder(clinic_rewards, tmp_path):
    """``folder(pairs)``: rewards of made-up gaps, {face: (chosen, rejected)} per pair, with the clinic's tokenizer."""

    def make(pairs):
        made = tmp_path / "made"
        made.mkdir()
        (made / "tokenizer").symlink_to(Path(clinic_rewards, "tokenizer").resolve())
        names = tuple(pairs[0])

        def side(number, index, name):
            gaps = {face: np.array(pairs[number][face][index], np.float32) for face in names}
            length = len(next(iter(gaps.values())))
            ids = np.arange(20, 20 + length, dtype=np.int32)
            zeros = dict.fromkeys(names, np.zeros(length, np.float32))
            return TokenScores(str(number), name, ids, ids, gaps, zeros, ids, gaps, zeros)

        scored = [PairScores(side(i, 0, "chosen"), side(i, 1, "rejected")) for i in range(len(pairs))]
        write_shard(made, 0, scored, names)
        meta = json.loads(Path(clinic_rewards, "meta.json").read_text())
        faces = {name: {"positive": "good", "negative": "bad"} for name in names}
        kept = {key: meta[key] for key in ("schema_version", "patient", "tokenizer", "dataset", "counts", "skipped")}
        shards = {"shards": ["rewards-00000.parquet"]}
        write_json(made / "meta.json", {**kept, "faces": faces, **shards, "statistics": {"faces": {}}})
        return made

    return make


def mixed(scale=1.0):
    """60 pairs: `kind` favours the chosen answer in 50 of them, `odd` in half; both by ``scale`` nats at one token."""
    pairs = []
    for i in range(60):
        kind, odd = scale if i % 6 else -scale, scale if i % 2 else -scale
        rest = [0.0] * 14
        pairs.append(
            {"kind": ([kind, 0.0, *rest], [-kind, 0.0, *rest]), "odd": ([0.0, odd, *rest], [0.0, -odd, *rest])}
        )
    return pairs


def test_the_fit_is_over_every_face_pair_of_the_folder(run, folder):
    """Also those that the profile's own rewards leave out; ``--face`` narrows it."""
    made = folder(mixed())
    document = json.loads(run("inspect", made, "--diagnose", "--json").stdout)
    rewards = RewardsFolder(made)
    assert document["diagnosis"] == json.loads(json.dumps(diagnose(rewards, rewards.faces, SETTINGS).as_dict()))
    assert [face["name"] for face in document["diagnosis"]["faces"]] == ["kind", "odd"]
    narrowed = json.loads(run("inspect", made, "--diagnose", "--json", "--face", "odd").stdout)["diagnosis"]
    assert [face["name"] for face in narrowed["faces"]] == ["odd"]
    assert narrowed["explains"] is False
    assert "do not explain" in narrowed["verdict"]


def test_it_says_the_same_in_every_form(run, folder, tmp_path):
    made = folder(mixed())
    text = run("inspect", made, "--diagnose").stdout
    found = json.loads(run("inspect", made, "--diagnose", "--json").stdout)["diagnosis"]
    for written in (tmp_path / "d.svg", tmp_path / "d.html"):
        done = run("inspect", made, "--diagnose", f"--{written.suffix[1:]}", written)
        assert (done.exit_code, done.stdout) == (0, "")
        assert f"wrote {written}" in done.stderr
    drawing, page = ((tmp_path / name).read_text(encoding="utf-8") for name in ("d.svg", "d.html"))
    ElementTree.fromstring(drawing)
    best = found["faces"][0]["best"][0]
    for form in (text, page):
        assert " ".join(found["verdict"].split()) in " ".join(form.replace("&#x27;", "'").split())
        assert f"{best['pair_id']} ({best['contribution']:+.2g})" in form
    for form in (text, drawing, page):
        for words in ("kind", "odd", "length alone", "chance", f"{found['accuracy']['value']:.1%}"):
            assert words in form


def test_the_page_shows_the_examples_token_by_token(run, folder, tmp_path):
    """A reward there is importance times the fitted weights: the difference of the two sides is the pair's log-odds."""
    made = folder(mixed())
    run("inspect", made, "--diagnose", "--html", tmp_path / "d.html")
    page = (tmp_path / "d.html").read_text(encoding="utf-8")
    found = json.loads(run("inspect", made, "--diagnose", "--json").stdout)["diagnosis"]["faces"]
    x_P_F, _, ids = features(RewardsFolder(made), [face["name"] for face in found], SETTINGS)
    log_odds = x_P_F @ [face["weight"]["value"] for face in found]
    kind = found[0]
    assert kind["best"]
    assert kind["worst"]
    for said, examples in (("explained best by", kind["best"]), ("contradicted most by", kind["worst"])):
        for example in examples:
            own = page.split(f"pair {example['pair_id']}, ")[1].split("<h2")[0]
            assert f"{said} kind ({example['contribution']:+.2g})" in own
            side = {name: float(reward) for name, reward in re.findall(r"<h3>(\w+), reward ([-+.\d]+)", own)}
            difference = side["chosen"] - side["rejected"]
            assert difference == pytest.approx(log_odds[ids.index(example["pair_id"])], abs=0.011)


def test_faces_that_hardly_differ_are_named_with_the_figure(run, folder):
    """One token in 16 is off by ``scale``: the root mean square gap is scale / 4."""
    below = HARDLY * 4 * 0.99
    pairs = mixed(below)
    for pair in pairs:
        pair["odd"] = tuple([2 * gap for gap in side] for side in pair["odd"])
    done = run("inspect", folder(pairs), "--diagnose", "--json")
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
    assert len(warned) == 1
    assert "'kind' hardly differ" in warned[0]
    assert "0.148 nats" in warned[0]
    kind, odd = json.loads(done.stdout)["face_differences"]
    assert (kind["hardly_differ"], odd["hardly_differ"]) == (True, False)
    assert odd["rms_gap"] == pytest.approx(2 * kind["rms_gap"])


def test_one_pair_is_too_few(folder, fails):
    fails(2, ["at least 2 pairs", "got 1"], "inspect", folder(mixed()[:1]), "--diagnose")


def test_extract_ends_with_the_diagnosis(run, tmp_path):
    done = run("extract", "--face", "helpful", "--limit", 8, "-o", tmp_path / "rewards")
    assert done.exit_code == 0, done.output
    assert "held-out pairs predicted" in done.stdout
    assert "hardly differ" not in done.stderr
    again = json.loads(run("extract", "--face", "helpful", "--limit", 8, "-o", tmp_path / "rewards", "--json").stdout)
    assert again["diagnosis"]["pairs"] == again["written"] == 8
    assert again["face_differences"][0]["rms_gap"] > HARDLY


def test_extract_warns_of_a_patient_that_does_not_follow_its_faces(run, stories, shared, tmp_path):
    data = shared / "hh-rlhf" / "harmless-base_test.jsonl.gz"
    done = run("extract", "--patient", stories, "--data", data, "--face", "helpful", "--limit", 8, "-o", tmp_path / "r")
    assert done.exit_code == 0, done.output
    assert "'helpful' hardly differ on this patient" in done.stderr


def test_a_folder_that_cannot_be_diagnosed_is_still_extracted(folder, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    made = folder(mixed())

    def refuse(*_args):
        raise UsageError("too few pairs")

    monkeypatch.setattr("llmdoctor.token_rewards.diagnosis.diagnose", refuse)
    found = findings.after_extraction(made, SETTINGS)
    assert found.diagnosis is None
    assert "no diagnosis: too few pairs" in said.getvalue()
    assert len(found.differences) == 2
