"""The schema: what it refuses and how it says so, and that a field added to it is known everywhere."""

import copy
import json
import os
import pickle
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmdoctor import settings
from llmdoctor.errors import StorageError, UsageError
from llmdoctor.schema import Settings, help_text
from llmdoctor.sessions import Session, SessionStore, Turn
from llmdoctor.set_command import parse_settings, setting_help, setting_names
from llmdoctor.settings import (
    DecodeSettings,
    DoctorSettings,
    Guidance,
    GuidanceFields,
    RewardSettings,
    Sampling,
    SamplingFields,
    TrainSettings,
)

DOCTORS = ("helpful", "safe")
NOW = Guidance(betas={"helpful": 0.8, "safe": 0.4}), Sampling()


def test_every_field_that_a_user_sees_has_a_help_text():
    groups = [one for one in vars(settings).values() if isinstance(one, type) and issubclass(one, Settings)]
    assert {TrainSettings, RewardSettings, DecodeSettings, DoctorSettings, Sampling} <= set(groups)
    for group in groups:
        for name, field in group.model_fields.items():
            assert field.description or field.title, f"{group.__name__}.{name}"


def test_the_help_says_the_range():
    assert help_text(Sampling, "top_p").endswith("(> 0 and <= 1).")
    assert help_text(Sampling, "min_p").endswith("(>= 0 and < 1).")
    assert help_text(Guidance, "mode").endswith("(product, ratio).")
    assert help_text(TrainSettings, "ceiling").endswith("(>= 0).")
    assert help_text(TrainSettings, "report_to").endswith("wandb, ...")


def test_values_may_be_positional_as_the_docstring_says():
    made = Guidance(0.5, {"a": 2}, "ratio", 0.2, {"a": 1})
    assert made == Guidance(alpha=0.5, betas={"a": 2.0}, mode="ratio", plausibility=0.2, dead_zones={"a": 1.0})
    assert Sampling(0.5, 3, 0.9) == Sampling(temperature=0.5, top_k=3, top_p=0.9)
    for wrong in (lambda: Guidance(1.0, alpha=1.0), lambda: Guidance(*range(6))):
        with pytest.raises(TypeError, match="Guidance"):
            wrong()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Guidance(-1.0), "'alpha' should be greater than or equal to 0, got -1.0"),
        (lambda: Guidance(1.0, {"x": -1.0}), "'beta of x' should be greater than or equal to 0, got -1.0"),
        (lambda: Guidance(dead_zones={"x": "far"}), "'dead_zone of x' should be a valid number, got 'far'"),
        (lambda: Guidance(mode="sum"), "'mode' should be 'product' or 'ratio', got 'sum'"),
        (lambda: Sampling(temprature=1), "unknown key 'temprature' (did you mean 'temperature'?)"),
        (lambda: Sampling(top_k=1.5), "'top_k' should be a valid integer, got 1.5"),
        (lambda: Sampling(seed=2**32), "'seed' should be less than or equal to 4294967295, got 4294967296"),
        (lambda: Sampling().replace(max_new_tokens=0), "'max_new_tokens' should be greater than or equal to 1, got 0"),
        (lambda: TrainSettings().replace(ceiling=-1), "'ceiling' should be greater than or equal to 0, got -1"),
        (lambda: TrainSettings().replace(rhoo=1), "unknown key 'rhoo' (did you mean 'rho'?)"),
    ],
)
def test_a_wrong_value_is_a_usage_error_of_one_line(make, said: str):
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == said


def test_what_each_doctor_has_of_its_own_has_one_range():
    """The doctor's section of a profile and the decoder's mapping take the same values."""
    for own, many in (("beta", "betas"), ("dead_zone", "dead_zones")):
        for value in (0.0, 3.5, -0.1, float("inf"), float("nan")):
            taken = []
            for make in (
                lambda own=own, value=value: DoctorSettings(checkpoint="x").replace(**{own: value}),
                lambda many=many, value=value: Guidance(**{many: {"x": value}}),
            ):
                try:
                    taken.append(bool(make()))
                except UsageError:
                    taken.append(False)
            assert taken[0] == taken[1] == (value in (0.0, 3.5))


def test_a_snapshot_cannot_change():
    """Also not through the mapping it was made of; copies and pickles are equal to it."""
    betas = {"helpful": 0.8}
    guidance = Guidance(1.0, betas)
    betas["helpful"] = 99
    assert guidance.betas == {"helpful": 0.8}
    for change in (
        lambda: guidance.betas.__setitem__("helpful", 99),
        lambda: guidance.betas.update(helpful=99),
        lambda: guidance.betas.pop("helpful"),
        guidance.betas.clear,
        lambda: guidance.dead_zones.setdefault("helpful", 1.0),
        lambda: guidance.betas.__ior__({"helpful": 99}),
        lambda: guidance.betas.__delitem__("helpful"),
    ):
        with pytest.raises(UsageError, match=r"read-only: .* doctor\.beta = \{"):
            change()
    with pytest.raises(UsageError, match=r"expected a copy, settings\.replace\(alpha=\.\.\.\)"):
        guidance.alpha = 2.0  # type: ignore[misc]
    assert (
        guidance == copy.deepcopy(guidance) == pickle.loads(pickle.dumps(guidance)) == Guidance(1.0, {"helpful": 0.8})
    )
    assert json.loads(json.dumps(guidance.to_dict()))["betas"] == {"helpful": 0.8}
    assert Guidance().betas == {}


def test_decode_settings_are_what_the_decoder_reads():
    decode = DecodeSettings(alpha=0.5, mode="ratio", plausibility=0.2, temperature=0.3, stop=("x",))
    doctors = {"a": DoctorSettings(checkpoint="c", beta=2.0, dead_zone=1.0)}
    assert decode.guidance(doctors) == Guidance(0.5, {"a": 2.0}, "ratio", 0.2, {"a": 1.0})
    assert decode.sampling(5) == Sampling(temperature=0.3, stop=("x",), seed=5)
    assert set(Sampling.model_fields) == {*SamplingFields.model_fields, "seed"}
    assert set(Guidance.model_fields) == {*GuidanceFields.model_fields, "betas", "dead_zones"}


def test_modules_that_get_an_adapter_may_be_an_option_that_repeats():
    assert TrainSettings(lora_targets=["all-linear"]).lora_targets == "all-linear"
    assert TrainSettings(lora_targets=["q_proj", "v_proj"]).lora_targets == ("q_proj", "v_proj")


# /set


@pytest.mark.parametrize(
    ("line", "guidance", "sampling"),
    [
        ("beta=2", {"betas": {"helpful": 2.0, "safe": 2.0}}, {}),
        ("beta=2 safe=1 beta.helpful=3", {"betas": {"helpful": 3.0, "safe": 1.0}}, {}),
        ("safe=1 beta=2", {"betas": {"helpful": 2.0, "safe": 2.0}}, {}),
        ("mode=ratio plausibility=0.3", {"mode": "ratio", "plausibility": 0.3}, {}),
        ("dead-zone.safe=1.5", {"dead_zones": {"safe": 1.5}}, {}),
        ("dead_zone=2", {"dead_zones": {"helpful": 2.0, "safe": 2.0}}, {}),
        ("top-k=4 seed=5 max_new_tokens=9", {}, {"top_k": 4, "seed": 5, "max_new_tokens": 9}),
        (r"stop=\n 'stop=the end' stop=#", {}, {"stop": ("\n", "the end", "#")}),
    ],
)
def test_a_line_changes_what_it_names(line: str, guidance: dict[str, Any], sampling: dict[str, Any]):
    assert parse_settings(line, DOCTORS, *NOW) == (NOW[0].replace(**guidance), NOW[1].replace(**sampling))


def test_off_is_what_has_no_value_by_default():
    set_ = NOW[1].replace(seed=3, stop=("x",), top_k=4)
    assert parse_settings("seed=off stop=off top_k=off", DOCTORS, NOW[0], set_)[1] == NOW[1]
    with pytest.raises(UsageError, match=r"'top_p' .*'off'"):
        parse_settings("top_p=off", DOCTORS, *NOW)


def test_a_doctor_may_be_called_as_it_likes():
    guidance = Guidance(betas={"my-doctor": 1.0, "v1.5": 1.0})
    names = tuple(guidance.betas)
    made, _ = parse_settings("my-doctor=2 beta.v1.5=3 dead-zone.my-doctor=1", names, guidance, Sampling())
    assert (made.betas, made.dead_zones) == ({"my-doctor": 2.0, "v1.5": 3.0}, {"my-doctor": 1.0})
    assert parse_settings("v1.5=2", names, guidance, Sampling())[0].betas["v1.5"] == 2.0


def test_the_names_of_the_help_are_those_that_are_taken():
    names = [name for name, _ in setting_help()]
    assert names == setting_names()
    assert set(names) == {*GuidanceFields.model_fields, *Sampling.model_fields, "beta", "dead_zone"}
    fine = {"mode": "ratio", "stop": "x", "top_p": "0.5", "min_p": "0.5", "plausibility": "0.5"}
    for name in setting_names(DOCTORS):
        assert parse_settings(f"{name}={fine.get(name, '2')}", DOCTORS, *NOW) != NOW, name
    with pytest.raises(UsageError, match=r"no setting 'colour' .*alpha.*beta\.safe.*stop, seed\)$"):
        parse_settings("colour=3", DOCTORS, *NOW)
    with pytest.raises(UsageError, match="quotation mark"):
        parse_settings("stop='a", DOCTORS, *NOW)


# Saved conversations


def test_an_older_conversation_has_the_defaults_and_a_foreign_field_is_damage(tmp_path):
    store = SessionStore(tmp_path / "s.sqlite3")
    turn = Turn("Hi", 1, Sampling(temperature=0.5, stop=("x",)), Guidance(0.5, {"a": 2.0}, "ratio", 0.3, {"a": 1.0}))
    session = store.save(replace(Session.new({}), turns=(turn,)))
    assert SessionStore(store.path).load(session.id).turns == (turn,)

    def rewrite(change):
        with sqlite3.connect(store.path) as db:
            how = json.loads(db.execute("SELECT settings FROM turn").fetchone()[0])
            change(how)
            db.execute("UPDATE turn SET settings = ?", (json.dumps(how),))

    def drop(how):
        for name in ("min_p", "stop", "max_new_tokens"):
            del how["sampling"][name]
        for name in ("plausibility", "dead_zones"):
            del how["guidance"][name]

    rewrite(drop)
    old = SessionStore(store.path).load(session.id).turns[0]
    assert (old.sampling, old.guidance) == (Sampling(temperature=0.5), Guidance(0.5, {"a": 2.0}, "ratio"))
    rewrite(lambda how: how["sampling"].update(heat=1.0))
    with pytest.raises(StorageError, match=r"damaged.*heat"):
        SessionStore(store.path).load(session.id)


def test_a_field_added_to_the_schema_is_found_everywhere():
    """In an interpreter whose `llmdoctor.settings` has one line more per group, and nothing else changed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLMDOCTOR_")}
    script = Path(__file__).with_name("one_field_more.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "found everywhere\n"), done.stdout + done.stderr


def test_a_list_is_called_a_list() -> None:
    """Not a tuple, which neither YAML nor JSON has."""
    with pytest.raises(UsageError, match=r"^'stop' should be a list, got 5$"):
        Sampling(stop=5)  # type: ignore[arg-type]
