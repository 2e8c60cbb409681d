"""The doctor: its training form against naive rows, its folder against plain PEFT, its decoding form against both."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from llmdoctor.errors import LoadError, StorageError, UsageError
from llmdoctor.models import Vocabulary
from llmdoctor.settings import TrainSettings
from llmdoctor.training.doctor import Doctor, new_doctor
from llmdoctor.training.folder import load_doctor, save_doctor

LETTERS = "abcdefghijklmnopqrstuvwxyz "
SIZE = len(LETTERS) + 1
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
BASES = {
    "llama": lambda: LlamaConfig(vocab_size=SIZE, **SHAPE),
    "padded qwen2": lambda: Qwen2Config(vocab_size=40, tie_word_embeddings=True, **SHAPE),
    "gemma2": lambda: Gemma2Config(vocab_size=SIZE, final_logit_softcapping=3.0, query_pre_attn_scalar=8, **SHAPE),
}
META = {"name": "kind", "settings": {"train": {"anchor": True}}, "rewards": {"patient": "p", "pairs": 3}}


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model's folder, in float64 where the architecture computes in it."""
    folder = tmp_path_factory.mktemp("tree") / "base"
    backend = Tokenizer(models.WordLevel({"<eos>": 0, **{c: i + 1 for i, c in enumerate(LETTERS)}}, "<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(BASES[request.param]()).save_pretrained(folder)
    return folder


def trained(base: Path, **settings: Any) -> tuple[Doctor, Any]:
    """A doctor with every trainable weight off its start, as training leaves it."""
    doctor, tokenizer = new_doctor(base, TrainSettings(lora_rank=3, rho=4.0, **settings))
    generator = torch.Generator().manual_seed(5)
    for _, p in sorted((n, p) for n, p in doctor.named_parameters() if p.requires_grad):
        p.data += 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return doctor, tokenizer


def saved(base: Path, folder: Path, **settings: Any) -> Doctor:
    doctor, tokenizer = trained(base, **settings)
    save_doctor(folder, doctor, tokenizer, {"base_model": str(base), **META})
    return doctor


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


IDS = torch.tensor([[3, 9, 1, 20, 7, 7, 12], [5, 2, 2, 8, 26, 14, 0]])


def test_a_new_doctor_is_its_base_with_v_equal_to_1(base: Path) -> None:
    doctor, _ = new_doctor(base, TrainSettings(dtype="float64"))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    assert torch.equal(logits(doctor.lm, IDS), logits(plain, IDS))
    lengths = torch.tensor([2, 3]), torch.tensor([4, 2])
    out = doctor(IDS, torch.ones_like(IDS), *lengths, scored=2)
    with doctor.base_alone():
        alone = doctor(IDS, torch.ones_like(IDS), *lengths, scored=2)
    assert torch.equal(out.log_values_R_N, torch.zeros(2, 5))
    assert torch.equal(out.logprobs_B_T, alone.logprobs_B_T)


def test_forward_equals_naive_unpadded_rows(base: Path) -> None:
    """Ragged prompts and responses, padding full of noise: log-probs, the base's log-probs and log V, row by row."""
    doctor, _ = trained(base, dtype="float64")
    doctor.eval()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    rows = [([4, 2], [9, 9, 1, 0]), ([7], [3, 0]), ([1, 2, 3, 4, 5, 6], [8, 7, 6, 5, 4, 3, 0]), ([11, 12, 13], [5])]
    scored, longest = 3, max(len(p) + len(r) for p, r in rows)
    ids = torch.randint(1, SIZE, (4, longest))
    mask = torch.zeros(4, longest, dtype=torch.long)
    for i, (p, r) in enumerate(rows):
        ids[i, : len(p + r)] = torch.tensor(p + r)
        mask[i, : len(p + r)] = 1
    prompts, responses = (torch.tensor([len(row[k]) for row in rows]) for k in (0, 1))
    out = doctor(ids, mask, prompts, responses, scored=scored)
    with doctor.base_alone():
        alone = doctor(ids, mask, prompts, responses, scored=scored)
    assert out.logprobs_B_T.shape == (scored, 7)
    exact = 1e-6 if plain.config._attn_implementation == "eager" else 1e-9  # eager attention has a softmax in float32
    size = len(AutoTokenizer.from_pretrained(base))  # less than the rows of a padded embedding
    base_model = doctor.lm.get_base_model().base_model
    for i, (p, r) in enumerate(rows):
        sequence = torch.tensor([p + r])
        with torch.no_grad():
            states = base_model(sequence, use_cache=False).last_hidden_state[0, len(p) - 1 :]
        values = 4.0 * (states.float() @ doctor.value_head.weight[0] + doctor.value_head.bias)
        torch.testing.assert_close(out.log_values_R_N[i, : len(r) + 1], values, atol=1e-5, rtol=1e-5)
        if i < scored:
            for found, model in ((out.logprobs_B_T, doctor.lm), (alone.logprobs_B_T, plain)):
                table = logits(model, sequence)[0, len(p) - 1 : -1, :size].log_softmax(-1)
                torch.testing.assert_close(found[i, : len(r)], table[torch.arange(len(r)), r], atol=exact, rtol=exact)
    assert out.logprobs_B_T.requires_grad


def test_an_id_without_a_token_takes_no_probability(llama: Path) -> None:
    """The log-probs are normalised over the ids in use; by the whole model's logits, set to nothing at the others."""
    doctor, tokenizer = trained(llama, dtype="float64")
    doctor.eval()
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if i not in (6, 13)}
    doctor.vocabulary = Vocabulary(vocabulary, max(vocabulary.values()) + 1)
    lengths = torch.tensor([2, 2]), torch.tensor([5, 5])
    found = doctor(IDS, torch.ones_like(IDS), *lengths, scored=2).logprobs_B_T
    used = sorted(vocabulary.values())
    table = torch.full((2, 5, max(used) + 1), -torch.inf, dtype=torch.float64)
    table[..., used] = logits(doctor.lm, IDS)[:, 1:-1, used].log_softmax(-1)
    torch.testing.assert_close(found, table.gather(2, IDS[:, 2:, None])[..., 0], atol=1e-9, rtol=0)


def test_the_folder_is_a_plain_adapter_and_loads_as_it_was_trained(base: Path, tmp_path: Path) -> None:
    """`PeftModel.from_pretrained` opens it; the merged form has the training form's logits and values; no pickle."""
    doctor = saved(base, tmp_path / "doctor", dtype="float64").eval()
    folder = tmp_path / "doctor"
    expected = logits(doctor.lm, IDS)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), folder)
    torch.testing.assert_close(logits(peft, IDS), expected, atol=1e-6, rtol=1e-6)
    found = load_doctor(folder, with_base=True, dtype="float64")
    torch.testing.assert_close(logits(found.model, IDS), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(
        logits(found.base, IDS), logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), IDS)
    )
    ones = torch.ones_like(IDS)
    out = doctor(IDS, ones, torch.tensor([1, 1]), torch.tensor([6, 6]), scored=2)
    states = found.model.base_model(IDS, use_cache=False).last_hidden_state
    for t in range(7):
        torch.testing.assert_close(found.log_value(states[:, t]), out.log_values_R_N[:, t], atol=1e-5, rtol=1e-5)
    assert out.log_values_R_N.std() > 0.1
    assert (found.name, found.anchored) == ("kind", True)
    assert found.vocabulary.ids == AutoTokenizer.from_pretrained(base).get_vocab()
    names = {f.name for f in folder.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "value_head.safetensors",
        "doctor.json",
        "README.md",
    }
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_the_base_is_found_again_when_all_has_moved(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "here" / "base")
    saved(tmp_path / "here" / "base", tmp_path / "here" / "out" / "doctor")
    expected = logits(load_doctor(tmp_path / "here" / "out" / "doctor").model, IDS)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = tmp_path / "there" / "out" / "doctor"
    assert torch.equal(logits(load_doctor(moved).model, IDS), expected)
    (tmp_path / "there" / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(LoadError, match="base"):
        load_doctor(moved)
    assert torch.equal(logits(load_doctor(moved, base=tmp_path / "elsewhere").model, IDS), expected)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _narrow(path: Path) -> None:
    save_file({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, path)


def _half(path: Path) -> None:
    save_file({"weight": load_file(path)["weight"]}, path)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("value_head.safetensors", Path.unlink),
        ("value_head.safetensors", _truncate),
        ("value_head.safetensors", _narrow),
        ("value_head.safetensors", _half),
        ("doctor.json", Path.unlink),
        ("doctor.json", _truncate),
        ("doctor.json", lambda path: path.write_text("[]")),
        ("doctor.json", lambda path: path.write_text('{"base_model": "./", "settings": 3}')),
        ("adapter_model.safetensors", _truncate),
        ("adapter_model.safetensors", Path.unlink),
        ("adapter_config.json", Path.unlink),
        ("adapter_config.json", _truncate),
        ("adapter_config.json", lambda path: path.write_text("{}")),
        ("tokenizer.json", _truncate),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path: Path, llama: Path, file: str, damage: Any) -> None:
    folder = tmp_path / "doctor"
    saved(llama, folder)
    damage(folder / file)
    with pytest.raises(LoadError) as caught:
        load_doctor(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    backend = Tokenizer(models.WordLevel({"<eos>": 0, **{c: i + 1 for i, c in enumerate(LETTERS)}}, "<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(BASES["llama"]()).save_pretrained(folder)
    return folder


def test_a_base_of_another_shape_is_refused(llama: Path, tmp_path: Path) -> None:
    saved(llama, tmp_path / "doctor")
    config = LlamaConfig(vocab_size=SIZE, **{**SHAPE, "hidden_size": 32})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(LoadError, match="doctor"):
        load_doctor(tmp_path / "doctor", base=tmp_path / "wide")


@pytest.mark.parametrize("room", [0, 1500, 4000])
def test_a_save_that_fails_leaves_what_was_there(llama: Path, tmp_path: Path, room: int) -> None:
    """The system refuses every byte of a file beyond ``room``: no new folder, and an older doctor is untouched."""
    old, new = tmp_path / "old", tmp_path / "new"
    saved(llama, old)
    doctor, tokenizer = trained(llama, seed=1)
    before = {f: f.read_bytes() for f in old.iterdir()}
    for folder in (old, new):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            with pytest.raises(StorageError, match=f"cannot write {folder}"):
                save_doctor(folder, doctor, tokenizer, {"base_model": str(llama), **META})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert {f: f.read_bytes() for f in old.iterdir()} == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["old"]
    save_doctor(old, doctor, tokenizer, {"base_model": str(llama), **META, "name": "newer"})
    assert json.loads((old / "doctor.json").read_text())["name"] == "newer"
    new.mkdir()
    (new / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not empty"):
        save_doctor(new, doctor, tokenizer, {"base_model": str(llama), **META})
