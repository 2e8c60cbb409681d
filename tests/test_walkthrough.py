"""The three stages on real input, through the command line: the commands of docs/models.md, and the Qwen2 tokenizer."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from llmdoctor.cli.main import app
from llmdoctor.settings import RewardSettings, TrainSettings
from llmdoctor.token_rewards.folder import RewardsFolder

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
PAIRS = [
    ("What is 2 + 2?", "It is 4.", "Go away."),
    ("你好吗？", "我很好，谢谢！", "不。"),
    ("Name a café 🙂", "Try the Café Zürich.", "No"),
    ("How do I sleep better?", "Keep regular hours, and drink less coffee.", "Just sleep."),
    ("Say hi", "hi <|im_start|>there", "no"),
]


def llmdoctor(*arguments: str) -> str:
    """Run one command as the shell would, and return its stdout."""
    done = CliRunner().invoke(app, list(arguments), prog_name="llmdoctor")
    assert done.exit_code == 0, f"llmdoctor {shlex.join(arguments)} ended with {done.exit_code}:\n{done.output}"
    return done.stdout


def written_commands(heading: str) -> list[list[str]]:
    """The ``llmdoctor`` commands of the first shell block under a heading of the page, without the word itself."""
    _, found, rest = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}")
    assert found, f"{PAGE} has no section {heading!r}"
    block = rest.partition("```sh\n")[2].partition("```")[0].replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [command[1:] for command in commands if command[:1] == ["llmdoctor"]]


def test_the_pages_walk_on_a_real_llama_and_human_pairs(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = written_commands("A model without a chat template")
    written = {c[0]: [part.replace("$DATA", str(shared)) for part in c] for c in commands}
    assert set(written) == {"extract", "inspect", "train", "compare"}

    report = json.loads(llmdoctor(*written["extract"], "--json"))
    folder = RewardsFolder(report["output"])
    too_long = sum(
        n for reason, n in report["skipped"].items() if reason.startswith("longer than the patient's context")
    )
    assert len(folder) == report["written"] == 48 - too_long > 40
    assert report["read"] == report["written"] + sum(report["skipped"].values())
    tokenizer = AutoTokenizer.from_pretrained(shared / "stories260k")
    for pair in folder:  # every number is a log-prob of a real token after a real text
        for scores in (pair.chosen, pair.rejected):
            assert scores.response_ids[-1] == tokenizer.eos_token_id
            for logprobs in (*scores.positive.values(), *scores.negative.values()):
                assert len(logprobs) == len(scores.response_ids)
                assert (logprobs < 0).all()
    assert llmdoctor(*written["inspect"]).count("chosen") >= 1

    doctor = json.loads(llmdoctor(*written["train"], "--batch-size", "4", "--seed", "0", "--json"))["doctor"]
    assert doctor["metrics"]["steps"] == 16
    assert doctor["metrics"]["last"]["loss"] < doctor["metrics"]["first"]["loss"]
    assert doctor["rewards"]["patient"] == str(shared / "stories260k")
    general = TrainSettings().model_dump(include={"method", "rho", "ceiling", "subtb_weight", "value_weight"})
    assert doctor["settings"]["train"] | general == doctor["settings"]["train"], "not the clinic's own"
    assert doctor["settings"]["rewards"]["tau"] == RewardSettings().tau

    assert "there was a little dog" in llmdoctor(*written["compare"])
    guided = json.loads(llmdoctor(*written["compare"], "--json"))
    assert guided["guided"]["text"] != guided["patient"]["text"]
    assert guided["metrics"]["kl"] > 0
    values = [x for t in guided["guided"]["tokens"] for x in t["values"].values()]
    assert max(values) != min(values)
    alone = json.loads(llmdoctor(*written["compare"], "--json", "--beta", "0", "--temperature", "0"))
    assert alone["guided"]["text"] == alone["patient"]["text"]
    assert alone["patient"]["text"].lstrip().startswith("named Max. Max loved to play with his toys")


def test_qwen2s_tokenizer_with_two_paddings_through_all_three_stages(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]
) -> None:
    """The shapes of Qwen2.5 7B and 1.5B in small: 152,064 and 151,936 rows for the 151,646 tokens that both share."""
    monkeypatch.chdir(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(shared / "qwen2-tokenizer")
    shape = {"tokenizer": tokenizer, "hidden_size": 8, "intermediate_size": 8, "head_dim": 4}
    patient = str(tiny_model("qwen2", rows=152064, seed=1, **shape))
    base = str(tiny_model("qwen2", rows=151936, seed=2, tie_word_embeddings=True, **shape))
    records = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
    Path("pairs.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")

    command = ["extract", "--patient", patient, "--data", "pairs.jsonl", "--output", "rewards", "--json"]
    report = json.loads(llmdoctor(*command, "--face", "helpful", "--face", "safe"))
    assert (report["written"], report["faces"]) == (5, ["helpful", "safe"])
    for record, pair in zip(records, RewardsFolder("rewards"), strict=True):
        for scores, answer in ((pair.chosen, record["chosen"]), (pair.rejected, record["rejected"])):
            turn = [{"role": "user", "content": record["prompt"]}]
            prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            assert tokenizer.decode(scores.prompt_ids.tolist()) == prompt
            assert tokenizer.decode(scores.response_ids.tolist()) == f"{answer}<|im_end|>"
            assert scores.alternative_ids.max() < 151646

    command = ["train", "--rewards", "rewards", "--doctor", base, "--output", "doctor", "--json"]
    trained = json.loads(llmdoctor(*command, "--patient", patient, "--max-steps", "2", "--batch-size", "3"))["doctor"]
    assert trained["tokenizer"]["size"] == 151646
    assert trained["metrics"]["steps"] == 2

    command = ["compare", "How do I sleep better?", "--patient", patient, "--doctor", "sleep=doctor", "--json"]
    compared = json.loads(llmdoctor(*command, "--seed", "1", "--max-new-tokens", "12", "--beta", "sleep=0.5"))
    tokens = compared["patient"]["tokens"] + compared["guided"]["tokens"]
    assert all(token["id"] < 151646 for token in tokens)
    assert set(compared["metrics"]["mean_values"]) == {"sleep"}
    alone = json.loads(llmdoctor(*command, "--seed", "1", "--max-new-tokens", "12", "--beta", "0"))
    assert alone["guided"]["text"] == alone["patient"]["text"] == compared["patient"]["text"]
