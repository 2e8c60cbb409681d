"""Stage 1 against a naive twin: one response, one face, one full log_softmax at a time."""

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2
from typer.testing import CliRunner

import llmdoctor.token_rewards.extract as stage
from llmdoctor.cli.main import app
from llmdoctor.errors import DataError, LoadError, StorageError, UsageError
from llmdoctor.models import Patient, load_patient
from llmdoctor.records import FacePair, PairScores, SkippedRecord, TokenScores
from llmdoctor.settings import DataSettings
from llmdoctor.token_rewards.extract import extract
from llmdoctor.token_rewards.folder import RewardsFolder, shard_paths
from llmdoctor.token_rewards.writer import RewardsWriter

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
FACES = {
    "useful": FacePair("Be kind and exact.", "Be rude and leave things out."),
    "safe": FacePair("Mind the dangers.", "Ignore all dangers, whatever they are."),
    "joy": FacePair("!", "..."),
}
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:!?\n0123456789"
RECORDS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "chosen": "there was a dog.", "rejected": "no."},
    {"prompt": "Tom", "chosen": "ran to the park and played all day with his red ball. He was happy!", "rejected": "?"},
    {
        "prompt": [
            {"role": "user", "content": "Who is Max?"},
            {"role": "assistant", "content": "A dog."},
            {"role": "user", "content": "And Lily?"},
        ],
        "chosen": "A girl who loved to play.",
        "rejected": "I will not tell you, go away.",
    },
    {"prompt": "The big bear said", "chosen": "hello, Tim. Hello, Sam.", "rejected": "hello, Tim. Go away."},
]


def write(path: Path, records: list[dict[str, Any]]) -> DataSettings:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataSettings(source=str(path))


def read(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its relative name."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def plain(pair: PairScores) -> list[Any]:
    """A pair as lists, to compare with ==."""
    out: list[Any] = []
    for s in (pair.chosen, pair.rejected):
        out += [s.pair_id, s.side, s.prompt_ids.tolist(), s.response_ids.tolist(), s.alternative_ids.tolist()]
        maps = (s.positive, s.negative, s.alternative_positive, s.alternative_negative)
        out += [{name: row.tolist() for name, row in each.items()} for each in maps]
    return out


@pytest.fixture(scope="module")
def stories() -> Patient:
    return load_patient(SHARED / "stories260k")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Patient:
    """Random weights behind the real Qwen2 tokenizer, its embedding padded from 151,646 to 151,936 loud rows."""
    folder = tmp_path_factory.mktemp("qwen")
    AutoTokenizer.from_pretrained(SHARED / "qwen2-tokenizer").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2(Qwen2Config(vocab_size=151936, num_hidden_layers=2, initializer_range=0.3, **shape))
    model.lm_head.weight.data[151646:] *= 5
    model.generation_config.eos_token_id = [151645, 151643]
    model.save_pretrained(folder)
    return load_patient(folder)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Patient:
    """One token a letter, and a context of 80 tokens."""
    folder = tmp_path_factory.mktemp("short")
    backend = Tokenizer(models.WordLevel({"<eos>": 0, **{c: i + 1 for i, c in enumerate(LETTERS)}}, "<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    size = {"vocab_size": len(LETTERS) + 1, "max_position_embeddings": 80, "initializer_range": 0.5}
    LlamaForCausalLM(LlamaConfig(**shape, **size, bos_token_id=None, eos_token_id=0)).save_pretrained(folder)
    return load_patient(folder)


def layout(patient: Patient, prompt: str | list[dict[str, str]], system: str | None) -> list[int]:
    """The documented prompt, written out by hand: the chat template, or raw text under a system prompt."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if patient.tokenizer.chat_template:
        messages = [{"role": "system", "content": system}, *turns] if system else turns
        text = patient.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(patient.tokenizer(text, add_special_tokens=False).input_ids)
    body = turns[0]["content"]
    if len(turns) > 1:
        body = f"Human: {body}\n\nAssistant: {turns[1]['content']}\n\nHuman: {turns[2]['content']}\n\nAssistant:"
    return list(patient.tokenizer(f"{system}\n\n{body}" if system else body).input_ids)


def naive(patient: Patient, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log pi(v | prompt, y_<t) over the tokenizer's own tokens [T, V] in float64, of one unpadded sequence."""
    size = max(patient.tokenizer.get_vocab().values()) + 1
    with torch.no_grad():
        logits = patient.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :size]
    return logits.double().log_softmax(-1)


def check(patient: Patient, record: dict[str, Any], scores: TokenScores, faces: dict[str, FacePair]) -> None:
    answer = patient.tokenizer(record[scores.side], add_special_tokens=False).input_ids
    end = 151645 if patient.tokenizer.chat_template else patient.tokenizer.eos_token_id
    assert scores.prompt_ids.tolist() == layout(patient, record["prompt"], None)
    assert scores.response_ids.tolist() == [*answer, end]
    response, steps = scores.response_ids.tolist(), torch.arange(len(answer) + 1)
    liking = torch.zeros(())
    others = torch.from_numpy(scores.alternative_ids).long()
    for name, face in faces.items():
        for system, own, other in (
            (face.positive, scores.positive[name], scores.alternative_positive[name]),
            (face.negative, scores.negative[name], scores.alternative_negative[name]),
        ):
            table = naive(patient, layout(patient, record["prompt"], system), response)
            np.testing.assert_allclose(own, table[steps, response], atol=3e-5)
            np.testing.assert_allclose(other, table[steps, others], atol=3e-5)
            if system == face.positive:
                liking = liking + table / len(faces)
    assert (others != torch.tensor(response)).all()
    liking[steps, response] = -torch.inf
    np.testing.assert_allclose(liking[steps, others], liking.amax(dim=1), atol=3e-5)  # the best of all other tokens


@needs_shared
@pytest.mark.parametrize(
    ("which", "names", "batch_tokens"),
    [
        ("stories", ["useful"], 1),
        ("stories", ["joy"], 16384),
        ("stories", ["joy", "useful", "safe"], 400),
        ("stories", ["joy", "useful", "safe"], 16384),
        ("qwen", ["useful"], 16384),
        ("qwen", ["joy", "safe"], 150),
    ],
)
def test_stored_log_probs_are_the_patients_own(
    which: str, names: list[str], batch_tokens: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Whatever the batching: same numbers, pairs in the order of the file, yielded and stored alike."""
    patient: Patient = request.getfixturevalue(which)
    records = RECORDS if which == "stories" else RECORDS[::2]
    faces = {name: FACES[name] for name in names}
    data = write(tmp_path / "pairs.jsonl", records)
    yielded = list(extract(patient, data, faces, tmp_path / "out", batch_tokens=batch_tokens))
    folder = RewardsFolder(tmp_path / "out")
    assert folder.faces == tuple(names)
    assert [plain(pair) for pair in folder] == [plain(pair) for pair in yielded]
    assert len(folder) == len(records) == folder.meta["counts"]["pairs"]
    for line, (record, pair) in enumerate(zip(records, folder, strict=True), start=1):
        assert [(s.pair_id, s.side) for s in (pair.chosen, pair.rejected)] == [
            (str(line), "chosen"),
            (str(line), "rejected"),
        ]
        check(patient, record, pair.chosen, faces)
        check(patient, record, pair.rejected, faces)
    statistics = folder.meta["statistics"]["faces"][names[0]]
    gaps = np.concatenate(
        [s.positive[names[0]] - s.negative[names[0]] for p in yielded for s in (p.chosen, p.rejected)]
    )
    assert folder.meta["counts"]["tokens"] == len(gaps)
    assert statistics["mean_abs_gap"] == pytest.approx(np.abs(gaps).mean(), abs=1e-5)
    assert statistics["share_positive"] == pytest.approx((gaps > 0).mean(), abs=1e-5)


def test_a_long_prompt_is_cut_from_the_left_and_an_answer_never(short: Patient, tmp_path: Path) -> None:
    """The context is 80 letters; the longer face, "Be bad." and an empty line, takes 9 and the end of an answer 1.

    A prompt of n letters and an answer of m fit when 9 + n + m + 1 <= 80. Three turns are written as
    "Human: ..\\n\\nAssistant: ..\\n\\nHuman: ..\\n\\nAssistant:". The oldest turns go first, then letters of the last.
    """
    faces = {"f": FacePair("Be ok.", "Be bad.")}

    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    records = [
        {"prompt": "a" * 40, "chosen": "b" * 30, "rejected": "c"},  # 80 letters: just fits
        {"prompt": "z" + "a" * 40, "chosen": "b" * 30, "rejected": "c"},  # 81
        {"prompt": "a" * 40, "chosen": "c", "rejected": "b" * 31},  # 81
        {"prompt": turns("old", "older", "new"), "chosen": "b" * 9, "rejected": "c"},
        {"prompt": turns("old", "older", "new"), "chosen": "b" * 60, "rejected": "c"},
        {"prompt": turns("x" * 50, "y", "p", "q", "r"), "chosen": "bb", "rejected": "c"},
        {"prompt": turns("x", "y", "z" * 40 + "a" * 10), "chosen": "b" * 60, "rejected": "c"},
        {"prompt": "a", "chosen": "b" * 69, "rejected": "c"},
        {"prompt": "a", "chosen": "b" * 70, "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c" * 200},
    ]
    skipped: list[SkippedRecord] = []
    data = write(tmp_path / "pairs.jsonl", records)
    pairs = list(extract(short, data, faces, tmp_path / "out", on_skip=skipped.append))
    decode = short.tokenizer.decode
    kept = {
        p.chosen.pair_id: (decode(p.chosen.prompt_ids.tolist()), decode(p.chosen.response_ids.tolist())) for p in pairs
    }
    assert kept == {
        "1": ("a" * 40, "b" * 30 + "<eos>"),
        "2": ("a" * 40, "b" * 30 + "<eos>"),
        "3": ("a" * 39, "c<eos>"),
        "4": ("Human: old\n\nAssistant: older\n\nHuman: new\n\nAssistant:", "b" * 9 + "<eos>"),
        "5": ("new", "b" * 60 + "<eos>"),
        "6": ("Human: p\n\nAssistant: q\n\nHuman: r\n\nAssistant:", "bb<eos>"),
        "7": ("a" * 10, "b" * 60 + "<eos>"),
        "8": ("a", "b" * 69 + "<eos>"),
    }
    assert [s.line for s in skipped] == [9, 10]
    assert all("context of 80 tokens" in s.reason for s in skipped)
    meta = RewardsFolder(tmp_path / "out").meta
    assert meta["counts"] | {"tokens": 0} == {"pairs": 8, "tokens": 0, "skipped": 2, "truncated_prompts": 5}
    assert list(meta["skipped"].values()) == [2]
    assert list(meta["skipped_lines"].values()) == [[9, 10]]
    with pytest.raises(DataError, match="line 9"):
        list(extract(short, data, faces, tmp_path / "strict", strict=True))


def test_the_limit_counts_the_pairs_that_are_scored(short: Patient, tmp_path: Path) -> None:
    """Records that no one can use, and those that this patient cannot hold, do not count; nor is more read."""
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    records = [
        good | {"chosen": ""},
        good | {"chosen": "b" * 90},
        good,
        good | {"chosen": "b" * 90},
        good,
        good | {"chosen": ""},
    ]
    data, skipped = write(tmp_path / "pairs.jsonl", records), list[SkippedRecord]()
    pairs = list(extract(short, data, {"f": FACES["joy"]}, tmp_path / "out", limit=2, on_skip=skipped.append))
    assert [pair.chosen.pair_id for pair in pairs] == ["3", "5"]
    assert [record.line for record in skipped] == [1, 2, 4]
    assert RewardsFolder(tmp_path / "out").meta["counts"]["pairs"] == 2


def test_a_shuffled_run_is_the_same_pairs_in_the_order_of_its_seed(
    short: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, it continues in its order; another seed is another run."""
    monkeypatch.setattr(stage, "SHARD_PAIRS", 4)
    data, faces = write(tmp_path / "pairs.jsonl", ten()), {"f": FACES["joy"]}
    ids = [p.chosen.pair_id for p in extract(short, data, faces, tmp_path / "whole", shuffle=3)]
    assert ids != sorted(ids, key=int)
    assert sorted(ids, key=int) == [str(i + 1) for i in range(10)]
    run = extract(short, data, faces, tmp_path / "parts", shuffle=3)
    for _ in range(6):
        next(run)
    run.close()
    with pytest.raises(LoadError, match="its dataset is shuffle 3, and this run's is 4"):
        list(extract(short, data, faces, tmp_path / "parts", shuffle=4))
    with pytest.raises(LoadError, match="its dataset is shuffle 3, and this run's is None"):
        list(extract(short, data, faces, tmp_path / "parts"))
    assert [p.chosen.pair_id for p in extract(short, data, faces, tmp_path / "parts", shuffle=3)] == ids[4:]
    assert read(tmp_path / "parts") == read(tmp_path / "whole")
    few = [p.chosen.pair_id for p in extract(short, data, faces, tmp_path / "few", shuffle=3, limit=3)]
    assert few == ids[:3]


def ten() -> list[dict[str, Any]]:
    words = ["one", "two two", "three is a longer answer", "four", "five five five"]
    return [{"prompt": f"p{i}", "chosen": words[i % 5], "rejected": words[(i + 2) % 5]} for i in range(10)]


@pytest.mark.parametrize("stop_after", [1, 4, 5, 9, 10])
def test_a_stopped_run_continues_and_ends_as_if_never_stopped(
    short: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    """Shards of 4 pairs: what is on disk when the generator is closed is not scored again; the rest is."""
    monkeypatch.setattr(stage, "SHARD_PAIRS", 4)
    monkeypatch.setattr(stage, "_WINDOW_PAIRS", 3)
    faces = {"f": FACES["joy"]}
    data = write(tmp_path / "pairs.jsonl", ten())
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    everything = [plain(pair) for pair in extract(short, data, faces, whole)]
    run = extract(short, data, faces, parts)
    seen = [plain(next(run)) for _ in range(stop_after)]
    run.close()
    assert seen == everything[:stop_after]
    done = (stop_after - 1) // 4
    assert [p.name for p in shard_paths(parts)] == [f"rewards-{i:05d}.parquet" for i in range(done)]
    with pytest.raises(LoadError):
        RewardsFolder(parts)
    assert [plain(pair) for pair in extract(short, data, faces, parts)] == everything[4 * done :]
    assert read(parts) == read(whole)
    assert len(shard_paths(parts)) == 3
    before = {f: f.stat().st_mtime_ns for f in parts.rglob("*")}
    assert list(extract(short, data, faces, parts)) == []  # a finished folder is left as it is
    assert {f: f.stat().st_mtime_ns for f in parts.rglob("*")} == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_run_is_refused_by_name(
    short: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    monkeypatch.setattr(stage, "SHARD_PAIRS", 4)
    faces, out = {"f": FACES["joy"]}, tmp_path / "out"
    data = write(tmp_path / "pairs.jsonl", ten())
    run = extract(short, data, faces, out)
    if finished:
        list(run)
    else:
        for _ in range(6):
            next(run)
        run.close()
    held = read(out)
    other = tmp_path / "other"
    short.model.save_pretrained(other)
    short.tokenizer.save_pretrained(other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}})
    )
    changed = write(tmp_path / "changed" / "pairs.jsonl", ten()[:-1])
    same_name = DataSettings(source=data.source, label="x")
    wrong = [
        ("patient", lambda: extract(load_patient(other), data, faces, out)),
        ("faces", lambda: extract(short, data, {"f": FACES["safe"]}, out)),
        ("faces", lambda: extract(short, data, {"g": FACES["joy"]}, out)),
        ("faces", lambda: extract(short, data, {**faces, "g": FACES["safe"]}, out)),
        ("dataset", lambda: extract(short, changed, faces, out)),
        ("dataset", lambda: extract(short, same_name, faces, out)),
        ("dataset", lambda: extract(short, data, faces, out, limit=7)),
        ("dtype", lambda: extract(load_patient(short.name, dtype="float64"), data, faces, out)),
    ]
    for named, again in wrong:
        with pytest.raises(LoadError, match=f"its {named} is "):
            list(again())
    assert read(out) == held


def test_a_run_stopped_before_its_first_shard_holds_nothing_against_another(short: Patient, tmp_path: Path) -> None:
    data, whole, out = write(tmp_path / "pairs.jsonl", ten()), tmp_path / "whole", tmp_path / "out"
    list(extract(short, data, {"f": FACES["safe"]}, whole))
    stopped = tmp_path / "stopped"
    next(extract(short, data, {"f": FACES["joy"]}, stopped))
    assert not stopped.exists()  # an exception takes everything back; a kill cannot
    RewardsWriter(out, {"faces": "of another run"}).begin(1, short.tokenizer)
    list(extract(short, data, {"f": FACES["safe"]}, out))
    assert read(out) == read(whole)


def test_a_changed_data_file_of_the_same_name_is_other_data(short: Patient, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", ten())
    list(extract(short, data, {"f": FACES["joy"]}, tmp_path / "out"))
    write(tmp_path / "pairs.jsonl", [*ten()[:-1], {"prompt": "p", "chosen": "c", "rejected": "d"}])
    with pytest.raises(LoadError, match="dataset"):
        list(extract(short, data, {"f": FACES["joy"]}, tmp_path / "out"))


def test_nothing_usable_leaves_nothing(short: Patient, tmp_path: Path) -> None:
    out, faces = tmp_path / "out", {"f": FACES["joy"]}
    long = write(tmp_path / "long.jsonl", [{"prompt": "a", "chosen": "b" * 90, "rejected": "c"}] * 2)
    empty = write(tmp_path / "empty.jsonl", [{"prompt": "a", "chosen": "", "rejected": "c"}] * 2)
    for data in (long, empty, DataSettings(source=str(tmp_path / "absent.jsonl"))):
        with pytest.raises(DataError):
            list(extract(short, data, faces, out))
    data = write(tmp_path / "pairs.jsonl", ten())
    with pytest.raises(UsageError, match="limit"):
        list(extract(short, data, faces, out, limit=0))
    assert not out.exists()
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not empty"):
        list(extract(short, data, faces, out))
    assert read(out) == {"thesis.txt": b"years of work"}


def test_a_patient_that_gives_no_numbers_is_refused(short: Patient, tmp_path: Path) -> None:
    """NaN stored as a gap would silently become a reward of 0 for the whole response."""
    data = write(tmp_path / "pairs.jsonl", ten())
    for weights in ("lm_head", "model.embed_tokens"):  # every log-prob; only those after a certain token
        model = LlamaForCausalLM(short.model.config).eval()
        model.load_state_dict(short.model.state_dict())
        model.get_submodule(weights).weight.data[1 + LETTERS.index("w")] = torch.nan
        with pytest.raises(LoadError, match="not numbers"):
            list(extract(Patient(model, short.tokenizer, short.name), data, {"f": FACES["joy"]}, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def full_after(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


@pytest.mark.parametrize("room", [0, 2000, 9000], ids=["the first file", "the tokenizer", "the shard"])
def test_a_disk_that_fills_up_leaves_no_partial_file(short: Patient, tmp_path: Path, room: int) -> None:
    """The system refuses every byte of a file beyond ``room``; with room again the same command goes on."""
    records = [
        {"prompt": f"q{i}", "chosen": f"{'abcdefgh'[i % 8]}" * (i % 50 + 1), "rejected": f"no {i}"}
        for i in range(1, 90)
    ]
    data, faces, out = write(tmp_path / "pairs.jsonl", records), {"f": FACES["joy"]}, tmp_path / "out"
    full_after(room)
    try:
        with pytest.raises(StorageError, match=r"cannot write .*out.*: .*run again"):
            list(extract(short, data, faces, out))
    finally:
        full_after(resource.RLIM_INFINITY)
    assert not [f for f in out.rglob("*") if "partial" in f.name or "parquet" in f.name or f.name == "meta.json"]
    assert len(list(extract(short, data, faces, out))) == 89
    assert len(RewardsFolder(out)) == 89


def test_the_command_says_so_in_one_line(short: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "pairs.jsonl", ten())
    profile = {"patient": {"model": short.name}, "faces": {"f": {"positive": "!", "negative": "?"}}}
    (tmp_path / "p.yaml").write_text(json.dumps(profile))
    monkeypatch.chdir(tmp_path)
    full_after(1000)
    try:
        command = ["extract", "--profile", "p.yaml", "--data", "pairs.jsonl", "-o", "out"]
        done = CliRunner().invoke(app, command)
    finally:
        full_after(resource.RLIM_INFINITY)
    assert done.exit_code == 1
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert errors == done.stderr.splitlines()[-1:]
    assert "cannot write" in errors[0]
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").rglob("*partial*"))
