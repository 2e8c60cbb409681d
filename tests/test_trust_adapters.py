"""Every kind of adapter that PEFT offers says the same when it is loaded, or is refused; whatever its config holds.

The keys are drawn: 200 cases in the usual run, LLMDOCTOR_FUZZ=10000 for a nightly one.
"""

import copy
import json
import os
import random
import shutil
import warnings
from contextlib import suppress
from dataclasses import fields

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, AdaLoraConfig, PeftModel, get_peft_model

from llmdoctor.adapters import log_probs, merged_adapter
from llmdoctor.errors import LoadError
from llmdoctor.models import load_lm

IDS = torch.arange(20, 40)[None]
SMALL = {
    "task_type": "CAUSAL_LM", "target_modules": ["v_proj"], "feedforward_modules": [], "r": 2, "init_r": 4,
    "target_r": 2, "total_step": 10, "boft_block_size": 4, "block_size": 4, "group_size": 4, "num_vectors": 8,
    "vector_length": 8, "n_frequency": 8, "theta_d_length": 16, "num_subspaces": 2, "u": 4, "effective_rank": 2,
    "n_tasks": 2, "n_splits": 1, "num_virtual_tokens": 2, "encoder_hidden_size": 8, "num_tasks": 2, "adapter_len": 2,
    "adapter_layers": 1, "token_indices": [1, 2, 3], "hidden_size": 16,
}  # fmt: skip
OWN = {"OFT": {"r": 0, "oft_block_size": 4}, "LN_TUNING": {"target_modules": ["input_layernorm"]}}
KINDS = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
MERGED = {"ADALORA", "BOFT", "C3A", "DELORA", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS",
          "OFT", "RANDLORA", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT"}  # fmt: skip
VALUES = (
    None, "", "x", "x\0y", "org/name", "(a+)+$", 5, 0, -1, 10**9, 10**400, 1e308, 0.5, True, [], [[1]], ["x"],
    [10**9], {}, {"a": {"b": 1}}, {"q_proj": 10**9}, {"v_proj": "x"}, "\ud800",
)  # fmt: skip
# what Python says of a value, and not of the file
USELESS = ("NoneType", "object has no", "not supported between", "unsupported operand", "not iterable", "subscriptable")


@pytest.fixture(scope="module")
def base(tiny_model):
    return load_lm(tiny_model(), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """``adapter("LOKR")``: the folder of an adapter that does something, and its log-probs. None: PEFT makes none."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = None
            known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
            given = {key: value for key, value in (SMALL | OWN.get(kind, {})).items() if key in known}
            with warnings.catch_warnings(), suppress(Exception):
                warnings.simplefilter("ignore")
                model = get_peft_model(copy.deepcopy(base), PEFT_TYPE_TO_CONFIG_MAPPING[kind](**given)).eval()
                torch.manual_seed(1)
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter.add_(torch.randn_like(parameter) * 0.1)
                folder = tmp_path_factory.mktemp(kind)
                model.save_pretrained(folder)
                made[kind] = folder, log_probs(model, IDS)
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_any_kind_says_the_same_when_merged_or_is_refused(kind, base, adapter):
    if (made := adapter(kind)) is None:
        assert kind not in MERGED
        pytest.skip("PEFT makes none for this model from so few settings")
    folder, own = made
    merged = None
    with suppress(LoadError):
        merged = merged_adapter(copy.deepcopy(base), folder, "it")
    if merged is None:
        assert kind not in MERGED
        return
    torch.testing.assert_close(log_probs(merged, IDS), own, atol=1e-4, rtol=1e-4)
    assert (own - log_probs(base, IDS)).abs().max() > 1e-3


def test_an_adapter_that_gave_up_a_part_of_its_ranks_says_the_same(base, tmp_path):
    """AdaLoRA, once trained, states which ranks of which layer it kept."""
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=2, tinit=1, tfinal=1, total_step=6, target_modules=["q_proj"]
    )
    model = get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.02)
    for step in range(6):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    own = log_probs(model.eval(), IDS)
    model.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert not all(map(all, kept.values()))
    merged = merged_adapter(copy.deepcopy(base), tmp_path, "it")
    torch.testing.assert_close(log_probs(merged, IDS), own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("OFT", "num_cayley_neumann_terms", 10**9),
        ("OFT", "peft_version", None),
        ("PEANUT", "depth", 10**9),
        ("PSOFT", "psoft_svd_lowrank_niter", 10**400),
        ("ADALORA", "rank_pattern", {"model.layers.0.self_attn.v_proj.lora_E": [True] * 5000}),
    ],
)
def test_a_number_that_would_run_on_is_refused_by_name(kind, key, value, base, adapter, tmp_path):
    if kind not in KINDS:
        pytest.skip("this version of PEFT does not know it")
    folder, _ = adapter(kind)
    with pytest.raises(LoadError, match=key):
        spoilt(base, folder, tmp_path, key, value)


def spoilt(base, folder, place, key, value):
    (place / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    data = json.loads((folder / "adapter_config.json").read_text()) | {key: value}
    (place / "adapter_config.json").write_text(json.dumps(data))
    return merged_adapter(copy.deepcopy(base), place, "it")


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("SHADOW", {"shadow_model": "org/name"}),
        ("XLORA", {"hidden_size": 16, "adapters": {"a": "org/name"}}),
        ("MULTITASK_PROMPT_TUNING", {"prompt_tuning_init_state_dict_path": "secret.pt", "num_virtual_tokens": 2}),
        ("PROMPT_TUNING", {"tokenizer_name_or_path": "org/name", "num_virtual_tokens": 2}),
    ],
)
def test_nothing_that_a_config_names_elsewhere_is_read(kind, config, base, adapter, tmp_path, monkeypatch):
    """PEFT asked the hub for the first, and opened the third as a pickle."""
    if kind not in KINDS:
        pytest.skip("this version of PEFT does not know it")
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda *_, **__: pytest.fail("PEFT was asked to load it"))
    folder, _ = adapter("LORA")
    shutil.copy(folder / "adapter_model.safetensors", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "task_type": "CAUSAL_LM", **config}))
    with pytest.raises(LoadError, match=f"{kind} cannot be merged"):
        merged_adapter(base, tmp_path, "it")


def test_any_key_of_any_kind_is_taken_or_named(base, adapter, tmp_path):
    cases = int(os.environ.get("LLMDOCTOR_FUZZ", "200"))
    rng = random.Random(0 if cases == 200 else None)
    for _ in range(cases):
        if (made := adapter(kind := rng.choice(KINDS))) is None:
            continue
        key = rng.choice([field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])])
        value = rng.choice(VALUES)
        try:
            spoilt(base, made[0], tmp_path, key, value)
        except LoadError as error:
            text = str(error)
            assert "\n" not in text, (kind, key, value, text)
            assert len(text) < 1000, (kind, key, value, text)
            assert key in text or not any(words in text for words in USELESS), (kind, key, value, text)
