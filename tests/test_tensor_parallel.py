"""A patient whose weights two processes share (tp_plan): the tokens and the rewards of one process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from llmdoctor.cli.main import app
from llmdoctor.errors import LoadError
from llmdoctor.model_source import ModelSource
from llmdoctor.models import _require_shares, load_lm
from llmdoctor.token_rewards.folder import RewardsFolder


def in_two_processes(*arguments: str, stdin: str = "") -> str:
    """What the command prints, run by torchrun over gloo; it must succeed."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llmdoctor"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, *launch, *arguments, "--tp-plan", "auto"],
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def in_one(*arguments: str, stdin: str = "") -> str:
    """What the command prints in this process."""
    ran = CliRunner().invoke(app, arguments, input=stdin)
    assert ran.exit_code == 0, ran.output
    return ran.stdout


@pytest.mark.slow
def test_two_processes_draw_the_tokens_of_one() -> None:
    """The clinic with both doctors, over a conversation of two questions; only the first process speaks."""
    how = ["chat", "--plain", "--json", "--seed", "3", "--max-new-tokens", "12"]
    asked = "How can I sleep better?\nHow do I save money?\n"
    one, two = (
        [json.loads(line) for line in said.splitlines()]
        for said in (
            in_one(*how, stdin=asked),
            in_two_processes(*how, stdin=asked),
        )
    )
    assert [line.get("id") for line in one] == [line.get("id") for line in two]
    assert [line["text"] for line in one] == [line["text"] for line in two]
    ours, theirs = ([line["patient_logprob"] for line in lines if "id" in line] for lines in (one, two))
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_processes_score_the_pairs_of_one(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = str(tiny_model("llama", num_key_value_heads=2))
    records = [{"prompt": f"Q{i}", "chosen": "Go to bed. " * (i % 3 + 1), "rejected": "No."} for i in range(300)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    how = ["extract", "--patient", model, "--data", str(tmp_path / "pairs.jsonl"), "--face", "helpful", "--json"]
    in_one(*how, "-o", str(tmp_path / "one"))
    report = json.loads(in_two_processes(*how, "-o", str(tmp_path / "two")))
    assert report["written"] == 300
    for one, two in zip(RewardsFolder(tmp_path / "one"), RewardsFolder(tmp_path / "two"), strict=True):
        assert one.chosen.pair_id == two.chosen.pair_id
        np.testing.assert_array_equal(one.chosen.response_ids, two.chosen.response_ids)
        np.testing.assert_allclose(one.chosen.positive["helpful"], two.chosen.positive["helpful"], rtol=0, atol=1e-4)


def test_heads_that_cannot_be_shared_are_one_clear_line(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ModelSource.of(tiny_model("llama", num_key_value_heads=2))
    model = load_lm(where.name)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    _require_shares(where, model)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    with pytest.raises(LoadError, match="a number that divides its 2 key-value heads"):
        _require_shares(where, model)
