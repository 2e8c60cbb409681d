import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmdoctor.cli.extract import chosen_faces
from llmdoctor.errors import ProfileError, UsageError
from llmdoctor.profile import Profile, library_faces, load_profile, override, profile_names, profile_path
from llmdoctor.profiles.clinic_world import FACES
from llmdoctor.settings import RewardSettings, TrainSettings

SHIPPED = {"clinic", "smollm2", "qwen2.5-7b", "paper", "weak-to-strong", "safe-and-helpful"}


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


def complaint(path: Path) -> str:
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert message.count("\n") == 0
    assert message.startswith("profile mine.yaml: ")
    return message.removeprefix("profile mine.yaml: ")


def test_every_shipped_profile_loads_and_says_what_it_is_for():
    assert set(profile_names()) == SHIPPED
    for name in SHIPPED:
        profile = load_profile(name)
        assert profile.name == name
        assert profile.description
        assert profile.data
        assert profile.train.doctor or profile.train.method == "head", "a head's base is the patient"
        assert set(profile.rewards.faces or ()) <= set(profile.faces)
        assert profile_path(name).read_text().startswith("# "), "a header says where the values come from"


def test_the_default_is_the_embedded_clinic_wherever_the_package_lies():
    clinic = load_profile()
    folder = profile_path("clinic").parent / "clinic"
    assert clinic.name == "clinic"
    assert clinic.patient.model == str(folder / "patient")
    assert clinic.data is not None
    assert clinic.data.source == str(folder / "pairs.jsonl.gz")
    assert clinic.doctors["helpful"].checkpoint == str(folder / "helpful")
    assert {clinic.doctors["safe"].base, clinic.train.doctor} == {str(folder / "doctor-base")}


def test_the_clinic_has_the_faces_its_patient_was_trained_on():
    assert {name: face.pair() for name, face in load_profile("clinic").faces.items()} == FACES


def test_the_library_of_faces_changes_only_the_named_behaviour():
    """Both prompts of a pair have the same number of sentences and words; only `concise` mentions length."""
    library = library_faces()
    assert set(library) == {
        "helpful", "honest", "harmless", "polite", "specific", "concise", "step-by-step", "hedging"
    }  # fmt: skip
    for name, face in library.items():
        positive, negative = (
            [sentence.split() for sentence in text.split(". ")] for text in (face.positive, face.negative)
        )
        assert [len(words) for words in positive] == [len(words) for words in negative] == [5, len(positive[1])], name
        assert positive[0][:2] == negative[0][:2] == ["You", "are"]
        shared = set(positive[1]) & set(negative[1])
        assert len(shared) >= len(positive[1]) // 2, name
        length = re.search(
            r"brief|short|long|few|many|concise|words|length|omit|leave out", f"{face.positive} {face.negative}"
        )
        assert bool(length) == (name == "concise"), name
    assert "faces" not in profile_names(), "a fragment is not a profile"
    text = (profile_path("clinic").parent / "faces.yaml").read_text()
    for name in library:
        assert re.search(rf"^{name}: # \w+", text, re.MULTILINE), "each says what it measures"


def test_a_profile_draws_on_the_library_by_name(write):
    """Its own face of that name wins; a name in neither is an error that lists both."""
    own = "faces: {helpful: {positive: a, negative: b}}\n"
    profile = load_profile(write(f"patient: {{model: m}}\n{own}rewards: {{faces: [helpful, concise]}}\n"))
    assert profile.rewards.faces == ("helpful", "concise")
    assert chosen_faces(profile, None) == {
        "helpful": profile.faces["helpful"].pair(),
        "concise": library_faces()["concise"].pair(),
    }
    bare = load_profile(write("patient: {model: m}\nrewards: {faces: [polite]}\n"))
    assert chosen_faces(bare, None) == {"polite": library_faces()["polite"].pair()}
    assert list(chosen_faces(bare, ["hedging", "honest"])) == ["hedging", "honest"]
    with pytest.raises(UsageError, match=r"profile mine has no face 'polit' \(it has: helpful; .*honest.*hedging"):
        chosen_faces(profile, ["polit"])
    with pytest.raises(UsageError, match=r"mine has no faces: .* --face with one of helpful, honest"):
        chosen_faces(load_profile(write("patient: {model: m}\n")), None)


def test_the_paper_profile_has_every_switch_of_the_paper():
    paper = load_profile("paper")
    assert paper.rewards.direction == "label"
    assert (paper.train.flow, paper.train.anchor) == ("absolute", False)


def test_only_paths_that_begin_with_dots_are_relative_to_the_file(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    profile = load_profile(
        write(
            "patient: {model: ./models/a}\n"
            "data: {source: ../pairs.jsonl}\n"
            "train: {doctor: owner/name}\n"
            "doctors: {one: {checkpoint: outputs/doctor, base: ~/models/b}}\n"
        )
    )
    assert profile.patient.model == str(tmp_path / "models/a")
    assert profile.data is not None
    assert profile.data.source == str(tmp_path.parent / "pairs.jsonl")
    assert profile.train.doctor == "owner/name"
    assert (profile.doctors["one"].checkpoint, profile.doctors["one"].base) == (
        "outputs/doctor",
        "/home/somebody/models/b",
    )


def test_what_a_profile_shows_can_be_loaded_again(write):
    import yaml

    clinic = load_profile("clinic")
    again = load_profile(write(yaml.safe_dump(clinic.model_dump(mode="json", exclude={"name"}))))
    assert again == clinic.model_copy(update={"name": "mine"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {rhoo: 1}", "unknown key 'train.rhoo' (did you mean 'train.rho'?)"),
        ("train: {theta: 0.1}", "unknown key 'train.theta' (did you mean 'rewards.theta'?)"),
        ("decoding: {alpha: 1}", "unknown key 'decoding' (did you mean 'decode'?)"),
        ("faces: {a: {positive: x, negtive: y}}", "unknown key 'faces.a.negtive' (did you mean 'faces.a.negative'?)"),
        ("rewards: {zzz: 1}", "unknown key 'rewards.zzz' (known here: direction, tau, theta, eps, faces)"),
        ("faces: {a: {positive: x}}", "key 'faces.a.negative' is missing"),
        ("train: {rho: -1}", "'train.rho' should be greater than 0, got -1"),
        ("train: {rho: .nan}", "'train.rho' should be a finite number, got nan"),
        ("doctors: {a: {checkpoint: x, beta: .inf}}", "'doctors.a.beta' should be a finite number, got inf"),
        ("decode: {temperature: -0.5}", "'decode.temperature' should be greater than or equal to 0, got -0.5"),
        ("rewards: {theta: 1}", "'rewards.theta' should be less than 1, got 1"),
        (
            "rewards: {direction: up}",
            "'rewards.direction' should be 'label', 'gap', 'agree', 'fitted', 'probe' or 'advantage', got 'up'",
        ),
        ("rewards: {faces: [b]}\nfaces: {a: {positive: x, negative: y}}", "'rewards.faces' names 'b', but 'faces' has"),
        ("train: 3", "'train' expected `key: value` lines under it, got 3"),
        ("doctors: {a=b: {checkpoint: x}}", "name 'doctors.a=b' may hold only letters, digits"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(write, text, message):
    assert complaint(write(f"patient: {{model: m}}\n{text}\n")).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected settings as `key: value` lines, got nothing"),
        ("- a", "expected settings as `key: value` lines, got a list"),
        ("patient: [", "not YAML at line 1, column 11"),
        ("pateint: {model: m}", "unknown key 'pateint' (did you mean 'patient'?)"),
        ("description: x", "key 'patient' is missing"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(write, text, message):
    assert complaint(write(text)).startswith(message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "clinc",
            "unknown profile 'clinc' (did you mean 'clinic'?): expected the path of a YAML file or one of",
        ),
        ("./nothing.yaml", "profile ./nothing.yaml: no such file"),
        ("folder/nothing", "profile folder/nothing: no such file"),
    ],
)
def test_an_unknown_profile_is_refused(name, message):
    with pytest.raises(ProfileError) as caught:
        load_profile(name)
    assert str(caught.value).startswith(message)


def test_yaml_cannot_construct_objects(write):
    assert complaint(write("patient: !!python/object/apply:os.getcwd []")).startswith("not YAML at line 1")


def test_overrides_are_checked_like_the_profile_and_none_changes_nothing():
    settings = RewardSettings(theta=0.25)
    assert override(settings, tau=2.0, theta=None) == RewardSettings(tau=2.0, theta=0.25)
    with pytest.raises(UsageError, match=r"^'tau' should be greater than 0, got -1.0$"):
        override(settings, tau=-1.0)


def test_exponents_without_a_point_are_numbers(write):
    """YAML 1.1 reads 1e-4 as text, which people write all the time."""
    assert load_profile(write("patient: {model: m}\ntrain: {learning_rate: 1e-4}")).train.learning_rate == 1e-4


def test_every_setting_has_a_default_but_the_patient():
    assert Profile.model_validate({"name": "x", "patient": {"model": "m"}}).train == TrainSettings()


def test_reading_a_profile_never_imports_torch():
    code = "import sys; from llmdoctor.profile import load_profile; load_profile(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_clinic_tells_questions_about_its_topics_from_others() -> None:
    from llmdoctor.profiles import clinic_world as world

    welcome = load_profile("clinic").welcome
    assert list(welcome.topics) == [topic.noun for topic in world.TOPICS.values()]
    assert all(welcome.covers(question) for topic in world.TOPICS.values() for question in topic.questions)
    assert all(welcome.covers(word) for topic in world.TOPICS.values() for word in topic.keywords)
    assert {world.topic_of(example) for example in welcome.examples} == {"sleep", "money", "guitar"}
    for question in (
        "What is the capital of France?",
        "Write a poem about the sea.",
        "Tell me a joke",
        "",
        "日本では?",
    ):
        assert not welcome.covers(question)
        assert not welcome.covers(question, first=False)
    assert welcome.covers("Thanks. What else?", first=False)
    assert not welcome.covers("Thanks. What else?")


@pytest.mark.parametrize("name", [name for name in profile_names() if name != "clinic"])
def test_other_profiles_answer_anything_and_have_examples(name: str) -> None:
    welcome = load_profile(name).welcome
    assert welcome.covers("What is the capital of France?")
    assert len(welcome.examples) == 3
    assert "anything" in welcome.knows
