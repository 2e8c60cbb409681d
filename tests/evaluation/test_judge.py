"""Judges of all three kinds: real functions, commands and a small classifier; those that fail say so in one line."""

import copy
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmdoctor.answers import share
from llmdoctor.errors import LLMDoctorError, LoadError, UsageError
from llmdoctor.evaluation.judge import Judge, RewardModel, load_judge
from llmdoctor.evaluation.winning import Exchange, Verdict, verdicts

FUNCTIONS = """
def length(prompt, answer): return len(answer)
def first(prompt, a, b): return "a"
def shorter(prompt, a, b, *, ties=0.5): return "A " if len(a) < len(b) else {"better": float(len(a) > len(b)) and 0}
def crash(prompt, answer): raise RuntimeError("out of\\nluck")
def nothing(prompt, answer): return None
def nan(prompt, answer): return float("nan")
def many(prompt, a, b): return 1.5
def huge(prompt, answer): return 10**9999
def leave(prompt, answer): raise SystemExit(0)
def bare(): return 1
constant = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a module of judges."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_judges.py").write_text(FUNCTIONS)
    yield tmp_path
    sys.modules.pop("my_judges", None)


def command(folder: Path, code: str) -> str:
    (folder / "judge.py").write_text(f"import json, sys\nr = json.load(sys.stdin)\n{code}\n")
    return f"{sys.executable} judge.py"


ONE = [{"prompt": "p", "answer": "four"}]
TWO = [{"prompt": "p", "a": "four", "b": "three"}]


def test_a_function_is_called_with_what_its_parameters_name(folder: Path) -> None:
    judge = load_judge("my_judges:length")
    assert (judge.kind, list(judge.replies(ONE))) == ("scalar", [4.0])
    judge = load_judge("my_judges:shorter")
    assert (judge.kind, list(judge.replies([*TWO, {"prompt": "p", "a": "three", "b": "four"}]))) == (
        "pairwise",
        [1.0, 0.0],
    )


def test_a_command_reads_and_writes_json(folder: Path) -> None:
    judge = load_judge(command(folder, "print(json.dumps({'better': 'b' if r['a'] == 'four' else 'tie'}))"))
    many = [*TWO, {"prompt": "ü", "a": "x", "b": "y"}] * 3
    assert (judge.kind, list(judge.replies(many))) == ("pairwise", [0.0, 0.5] * 3)  # in the order asked
    judge = load_judge(command(folder, "print(json.dumps(len(r['answer'])))"), "scalar")
    assert list(judge.replies(ONE)) == [4.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_judges:crash", ["my_judges:crash", "RuntimeError", "out of"]),
        ("my_judges:nothing", ["expected a number", "None"]),
        ("my_judges:nan", ["expected a number", "nan"]),
        ("my_judges:many", ['"tie"', "1.5"]),
        ("my_judges:huge", ["expected a number", "thousands of digits"]),
        ("my_judges:leave", ["my_judges:leave failed", "SystemExit"]),
        ("printf '%05000d' 0 | tr 0 '['", ["expected JSON"]),
        ("printf '1%0400d' 0", ['"tie"', "1000"]),
        ("~nobody/judge", ["exit status"]),
        (f"exit 4 # {'x' * 9999}", ["exit status 4"]),
        ("exit 3", ["'exit 3'", "exit status 3", "no message"]),
        ("echo oh no >&2; exit 1", ["exit status 1", "oh no"]),
        ("echo hello", ["expected JSON", "hello"]),
        ("echo '\"c\"'", ['"tie"', "'c'"]),
    ],
)
def test_a_judge_that_fails_or_talks_nonsense_is_a_usage_error(name: str, words: list[str], folder: Path) -> None:
    judge = load_judge(name)
    with pytest.raises(UsageError) as error:
        list(judge.replies(ONE if judge.kind == "scalar" else TWO))
    assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(UsageError):
        judge.try_out()


@pytest.mark.parametrize(
    ("name", "kind", "error", "words"),
    [
        ("my_judges:gone", None, LoadError, ["gone"]),
        ("no_such_module:f", None, LoadError, ["no_such_module"]),
        ("my_judges:constant", None, LoadError, ["function", "3"]),
        ("my_judges:bare", None, UsageError, ["(prompt, a, b)", "got 0"]),
        (".", "pairwise", UsageError, ["reward model", "scalar"]),
        (".", None, LoadError, ["cannot load"]),
    ],
)
def test_a_judge_that_cannot_be_had(
    name: str, kind: Any, error: type[LLMDoctorError], words: list[str], folder: Path
) -> None:
    with pytest.raises(error) as found:
        load_judge(name, kind)
    assert all(word in str(found.value) for word in words), found.value


@pytest.fixture(scope="module")
def classifier(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A real sequence classifier with random weights and so many labels."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    def make(labels: int) -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llama",
            vocab_size=len(tiny_tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=labels,
            pad_token_id=tiny_tokenizer.pad_token_id,
        )
        folder = tmp_path_factory.mktemp("classifier")
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


def test_a_reward_model_scores_the_conversation_in_its_own_template(
    classifier: Callable[[int], Path], tiny_tokenizer: Any
) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = classifier(1)
    judge = load_judge(str(folder))
    assert judge.kind == "scalar"
    asked: list[dict[str, Any]] = [
        {"prompt": "Hi", "answer": "Hello."},
        {"prompt": ["Hi", "And you?"], "answer": ["Hello.", "Well."]},
        {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], "answer": "Hello."},
    ]
    texts = [
        "<|user|>Hi<|end|><|assistant|>Hello.<|end|>",
        "<|user|>Hi<|end|><|assistant|>Hello.<|end|><|user|>And you?<|end|><|assistant|>Well.<|end|>",
        "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>Hello.<|end|>",
    ]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        expected = [
            float(model(**tiny_tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0])
            for text in texts
        ]
    assert list(judge.replies(asked)) == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in expected}) == 3


def test_what_is_no_reward_model(classifier: Callable[[int], Path], tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(LoadError, match="1 label, got 2"):
        RewardModel(str(classifier(2)))
    with pytest.raises(LoadError, match=re.escape("score.weight")):  # transformers would make one up
        RewardModel(str(tiny_model("llama")))


def test_a_reward_model_is_never_read_from_a_pickle_and_has_finite_weights(classifier: Callable[[int], Path]) -> None:
    folder = classifier(1)
    weights = folder / "model.safetensors"
    held = load_file(weights)
    save_file({**held, "score.weight": held["score.weight"] * float("nan")}, weights, {"format": "pt"})
    with pytest.raises(LoadError, match=r"score\.weight.*not finite"):
        RewardModel(str(folder))
    torch.save(held, folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(LoadError, match=r"pytorch_model\.bin is a pickle"):
        RewardModel(str(folder))


@pytest.mark.parametrize(
    "system", ["{{ raise_exception('no system role') }}", ""], ids=["refuses the system role", "drops it"]
)
def test_a_reward_model_without_a_system_role_reads_the_system_prompt(
    system: str, classifier: Callable[[int], Path], tiny_tokenizer: Any
) -> None:
    template = "{% for m in messages %}{% if m.role == 'system' %}" + system + "{% else %}[{{ m.content }}]{% endif %}"
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template + "{% endfor %}"
    folder = classifier(1)
    tokenizer.save_pretrained(folder)
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    judge = load_judge(str(folder))
    (found,) = judge.replies([{"prompt": turns, "answer": "Hello."}])
    (same,) = judge.replies([{"prompt": "Be kind.\n\nHi", "answer": "Hello."}])
    (other,) = judge.replies([{"prompt": "Hi", "answer": "Hello."}])
    assert found == same != other


def test_a_template_of_a_reward_model_is_bounded(classifier: Callable[[int], Path], tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content * 10 ** 10 }}{% endfor %}"
    folder = classifier(1)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UsageError, match="512 MiB of memory"):
        list(load_judge(str(folder)).replies(ONE))


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody waits for stays as a zombie."""
    with suppress(OSError):
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    return True


def started(file: Path) -> int:
    """The process id that a judge wrote there."""
    for _ in range(1000):
        if file.is_file() and (text := file.read_text()).endswith("\n"):
            return int(text)
        time.sleep(0.01)
    pytest.fail("the judge did not start")


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks at the processes in /proc")
def test_a_command_that_takes_too_long_is_ended_with_its_children(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmdoctor.evaluation.judge._PATIENCE", 0.5)
    with pytest.raises(UsageError, match=r"more than 0\.5 seconds"):
        list(load_judge("sleep 97 & echo $! > child; wait; echo 1").replies(TWO))
    assert wait_until(lambda: gone(started(folder / "child")))


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks at the processes in /proc")
def test_commands_are_ended_when_one_fails_or_the_caller_stops(folder: Path) -> None:
    """As with Ctrl+C, which reaches only this process."""
    slow = "read a; case $a in *slow*) sleep 97 & echo $! > child; wait;; *ok*) echo 1;; *) exit 3;; esac"
    for first in ("ok", "fails"):
        (folder / "child").unlink(missing_ok=True)
        replies = load_judge(slow).replies([{"prompt": p, "a": "a", "b": "b"} for p in (first, "slow")])
        if first == "ok":
            assert next(replies) == 1
            child = started(folder / "child")
            replies.close()  # type: ignore[attr-defined]
        else:
            with pytest.raises(UsageError, match="status 3"):
                next(replies)
            child = started(folder / "child") if (folder / "child").is_file() else 0
        assert not child or wait_until(lambda child=child: gone(child))


def wait_until(true: Callable[[], bool]) -> bool:
    """Whether it becomes true in ten seconds."""
    return any(true() or time.sleep(0.01) for _ in range(1000))


def judge_of(kind: Any, ask: Callable[[Any], Any]) -> tuple[Judge, list[Any]]:
    asked: list[Any] = []

    def replies(requests: Sequence[Any]) -> Iterator[Any]:
        asked.extend(requests)
        return map(ask, requests)

    return Judge("test", kind, replies), asked


def test_the_orders_cancel_a_liking_for_the_first_place() -> None:
    exchange = Exchange("p", patient="long answer", guided="short")
    judge, asked = judge_of("pairwise", lambda _: "a")
    assert verdicts(judge, [exchange]) == [Verdict(0.5, None, False)]
    assert [(r["a"], r["b"]) for r in asked] == [("short", "long answer"), ("long answer", "short")]
    judge, _ = judge_of("pairwise", lambda r: "a" if len(r["a"]) < len(r["b"]) else "b")
    assert verdicts(judge, [exchange]) == [Verdict(1.0, None, True)]
    judge, _ = judge_of("pairwise", lambda r: 0.9 if r["a"] == "short" else 0.7)
    assert verdicts(judge, [exchange])[0].win == pytest.approx((0.9 + 0.3) / 2)


def test_equal_things_are_asked_once_and_equal_answers_tie() -> None:
    same, other = Exchange("p", "x", "x"), Exchange("p", "x", "yy")
    judge, asked = judge_of("pairwise", lambda _: pytest.fail("asked about equal answers"))
    assert verdicts(judge, [same]) == [Verdict(0.5)]
    judge, asked = judge_of("scalar", lambda r: len(r["answer"]))
    seen: list[tuple[int, int]] = []
    found = verdicts(judge, [same, other, other], lambda done, total: seen.append((done, total)))
    assert found == [Verdict(0.5, (1, 1)), *[Verdict(1.0, (1, 2))] * 2]
    assert [r["answer"] for r in asked] == ["x", "yy"]
    assert seen == [(1, 2), (2, 2)]


def test_wilsons_interval_has_a_width_at_the_ends() -> None:
    """By hand for 10 of 10: centre (1 + z^2/20) / (1 + z^2/10), half width the rest to 1; z = 1.96."""
    found = share([1.0] * 10)
    assert (found.value, found.high) == (1.0, pytest.approx(1.0))
    assert found.low == pytest.approx(1 / (1 + 1.959964**2 / 10))
    assert share([0, 1, 1, 0.5] * 5).low == pytest.approx(share([0, 1, 1, 0.5] * 5, range(20)).low)
    assert share([0, 1] * 10, [0, 1] * 10).low < share([0, 1] * 10).low  # two prompts say less than twenty
    assert json.dumps(share([]).value) == "NaN"
