"""The guided patient in lm-evaluation-harness itself, on small local tasks."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmdoctor import LLMdoctor
from llmdoctor.decoding.product import product
from llmdoctor.errors import UsageError
from llmdoctor.evaluation.harness import GuidedLM
from llmdoctor.profile import profile_path

CLINIC = profile_path("clinic").parent / "clinic"
TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["{{good}}", "{{bad}}"]
doc_to_target: 0
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "say": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{good}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{good}} {{bad}} {{good}} {{bad}} {{question}}"
metric_list: [{metric: word_perplexity}]
""",
}
DOCS = [
    {"question": "How can I sleep better?", "good": "Go to bed at the same time.", "bad": "Just sleep."},
    {"question": "How do I learn the guitar?", "good": "Practise for ten minutes a day.", "bad": "I do not care."},
    {"question": "How do I save money?", "good": "Write down each payment.", "bad": "Money comes and goes."},
]


@pytest.fixture(scope="module")
def harness() -> Any:
    module = pytest.importorskip("lm_eval.evaluator", reason="lm-evaluation-harness is not installed (extra lm-eval)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "add_env_info", lambda _results: None)  # takes seconds, and says nothing of a model
        yield module


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, body in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'docs.jsonl'}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\ntest_split: test\n{source}{body}")
    return folder


@pytest.fixture(scope="module")
def clinic() -> LLMdoctor:
    """The clinic, in mode "ratio" with a cut."""
    return LLMdoctor.from_profile("clinic", dtype="float32")


def evaluate(model: Any, tasks: Path) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    assert found is not None
    return {
        "results": {
            name: {k: v for k, v in row.items() if isinstance(v, float)} for name, row in found["results"].items()
        },
        "samples": {name: [doc["resps"] for doc in docs] for name, docs in found["samples"].items()},
    }


@pytest.mark.parametrize("said", ["Go to bed", " Go to bed "])
def test_a_last_turn_may_be_left_open(said: str, tiny_tokenizer: Any) -> None:
    """Without the harness too: what transformers' continue_final_message gives."""
    turns = [{"role": "user", "content": "Go to bed?"}, {"role": "assistant", "content": said}]
    found = GuidedLM.apply_chat_template(SimpleNamespace(tokenizer=tiny_tokenizer), turns, False)
    assert found == tiny_tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)


def test_a_chat_template_without_a_system_role_gets_the_system_prompt(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}"
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert GuidedLM.apply_chat_template(SimpleNamespace(tokenizer=tokenizer), turns) == "[Be kind.\n\nHi]"


def test_without_guidance_it_is_the_harnesss_own_model(harness: Any, clinic: LLMdoctor, tasks: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    own = HFLM(pretrained=clinic.patient.model, tokenizer=clinic.patient.tokenizer, max_length=24, batch_size=2)
    mine = GuidedLM(clinic, batch_tokens=200)
    mine._readers.context = 24  # texts are longer, so that they are read in windows
    before = clinic.guidance
    clinic.beta = 0.0
    try:
        expected, found = evaluate(own, tasks), evaluate(mine, tasks)
    finally:
        clinic.guidance = before
    assert found["samples"]["say"] == expected["samples"]["say"]
    assert all(said for docs in found["samples"]["say"] for (said,) in docs)
    for name, row in expected["results"].items():
        assert found["results"][name] == pytest.approx(row, rel=1e-4), name
    theirs, ours = ([score for doc in f["samples"]["choose"] for (score,) in doc] for f in (expected, found))
    assert len(ours) == 2 * len(DOCS)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [logprob for logprob, _ in ours] == pytest.approx([logprob for logprob, _ in theirs], abs=1e-3)


def test_guided_likelihoods_are_the_products_without_its_cut(harness: Any, clinic: LLMdoctor) -> None:
    """Against one forward of every model over the whole text; the text holds tokens that the cut forbids."""
    from lm_eval.api.instance import Instance

    context, continuation = DOCS[0]["question"], " Money comes and goes."
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    ((logprob, greedy),) = GuidedLM(clinic).loglikelihood([request], disable_tqdm=True)
    tokenizer, vocabulary = clinic.patient.tokenizer, clinic.patient.vocabulary
    ids, begin = tokenizer.encode(context + continuation), len(tokenizer.encode(context))

    def said(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            return vocabulary.mask(model(torch.tensor([ids])).logits[0, begin - 1 : -1]).log_softmax(dim=-1)

    doctors = {name: said(doctor.model) for name, doctor in clinic.doctors.items()}
    bases = {name: said(doctor.base) for name, doctor in clinic.doctors.items()}
    patient, targets = said(clinic.patient.model), torch.tensor(ids[begin:])[:, None]
    cut = product(patient, doctors, clinic.guidance, bases).gather(1, targets)
    assert cut.isneginf().any()
    whole = product(patient, doctors, clinic.guidance.replace(plausibility=0), bases).gather(1, targets)
    assert logprob == pytest.approx(float(whole.sum()), rel=1e-4)
    assert greedy is False


def test_guided_answers_are_the_decoders_own(harness: Any, clinic: LLMdoctor) -> None:
    from lm_eval.api.instance import Instance

    question = DOCS[0]["question"]
    context = GuidedLM(clinic).apply_chat_template([{"role": "user", "content": question}])
    request = Instance("generate_until", {}, (context, {"until": [], "max_gen_toks": 20}), 0)
    (text,) = GuidedLM(clinic).generate_until([request])
    assert text == clinic.generate(question, temperature=0, max_new_tokens=20)
    assert text != clinic.generate(question, beta=0, temperature=0, max_new_tokens=20)


def test_the_harness_makes_the_model_by_name(harness: Any, tasks: Path) -> None:
    """With the arguments that its command passes on; of the command, only its search for tasks is left out: slow."""
    from lm_eval.tasks import TaskManager

    found = harness.simple_evaluate(
        model="llmdoctor",
        model_args="profile=clinic,beta=0.5,mode=product",
        tasks=["read"],
        batch_size=1,
        device="cuda:0",  # its default
        limit=1,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    assert 1 < found["results"]["read"]["word_perplexity,none"] < 1e9


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmdoctor.evaluation.harness.TemplateLM", object)
    with pytest.raises(UsageError, match=re.escape('pip install "llmdoctor[lm-eval]"')):
        GuidedLM()
