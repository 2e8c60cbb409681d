"""A short form of benchmarks/long_run.py: nothing grows with the tokens said or the models loaded."""

import gc
import importlib.util
import sys
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import ref

import pytest

from llmdoctor import LLMdoctor
from llmdoctor.decoding.caches import recorded


@pytest.fixture(scope="module")
def long_run() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "long_run.py"
    if not path.is_file():
        pytest.skip("the benchmarks are not here")
    spec = importlib.util.spec_from_file_location("long_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["long_run"] = module
    spec.loader.exec_module(module)
    return module


def growth(found: list[Any]) -> tuple[float, int, int]:
    return tuple(b - a for a, b in zip(found[1][:3], found[-1][:3], strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "mixtral"])
def test_a_model_that_was_dropped_is_gone_weight_by_weight(tiny_model: Any, kind: str) -> None:
    doctor = LLMdoctor(patient_model=str(tiny_model(kind)))
    for _ in range(2):
        doctor.generate("How?", max_new_tokens=8, seed=1)
    model = doctor.patient.model
    assert (recorded._graphs.get(model) is not None) == (kind in ("llama", "qwen2")), "the others cannot be recorded"
    weights = [ref(weight) for weight in model.parameters()]
    del doctor, model
    gc.collect()
    assert [weight() for weight in weights if weight() is not None] == []
    assert not recorded._graphs


def test_turns_and_cancelled_answers_leave_nothing(long_run: Any) -> None:
    memory, handles, threads = growth(long_run.readings(long_run.conversation(length=10), 250))
    assert memory < 25
    assert (handles, threads) == (0, 0)


def test_loads_leave_nothing(long_run: Any, tmp_path: Path) -> None:
    steps = long_run.loads(tmp_path)
    list(islice(steps, 5))  # each kind once: what is kept once is there
    before = long_run.reading(1, 1.0)
    list(islice(steps, 5))
    after = long_run.reading(1, 1.0)
    assert after.memory - before.memory < 30, "the weights of the embedded models alone are 45 MB"
    assert (after.handles, after.threads) == (before.handles, before.threads)
