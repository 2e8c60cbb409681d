"""A short form of benchmarks/long_run.py: nothing grows with the tokens said or the models loaded."""

import gc
import importlib.util
import sys
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


@pytest.fixture(autouse=True)
def nothing_of_other_tests() -> None:
    """The app's thread takes what it finds out of garbage collection (gc.freeze), models of other tests too."""
    gc.unfreeze()
    gc.collect()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral", "gemma2", "clinic"])
def test_models_that_were_dropped_are_gone_weight_by_weight(tiny_model: Any, kind: str) -> None:
    """Also where their steps were recorded: all but Gemma 2, whose layers have windows."""
    doctor = LLMdoctor.from_profile("clinic") if kind == "clinic" else LLMdoctor(patient_model=str(tiny_model(kind)))
    for _ in range(2):
        doctor.generate("How?", max_new_tokens=8, seed=1)
    models = [doctor.patient.model, *(one.model for one in doctor._doctors.values())]
    assert (recorded._graphs.get(models[0]) is not None) == (kind != "gemma2")
    left = [ref(one) for model in models for one in (model, *model.parameters())]
    del doctor, models
    gc.collect()
    assert sum(one() is not None for one in left) == 0


def test_turns_and_cancelled_answers_leave_nothing(long_run: Any) -> None:
    first, *_, last = long_run.readings(long_run.conversation(length=10), 250)[1:]
    assert last.memory - first.memory < 25
    assert (last.handles, last.threads) == (first.handles, first.threads)
