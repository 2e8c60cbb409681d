"""Conversations to token ids and back, with real tokenizers."""

import copy
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from llmdoctor.errors import DataError
from llmdoctor.models import load_tokenizer
from llmdoctor.records import Message
from llmdoctor.text import conversation, end_of_turn, prompt_ids, response_ids, token_texts, with_system

ASKED = [Message(role="user", content="Why is the sky blue?")]
TALK = [*ASKED, Message(role="assistant", content="It scatters."), Message(role="user", content="And red?")]


@pytest.fixture(scope="module")
def qwen(shared) -> Any:
    return load_tokenizer(shared / "qwen2-tokenizer")


@pytest.fixture(scope="module")
def llama(stories) -> Any:
    return load_tokenizer(stories)


@pytest.fixture(scope="module")
def adds_bos(tiny_tokenizer) -> Any:
    """A tokenizer that puts a BOS before a text, and has no chat template."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template, tokenizer.bos_token = None, "<|user|>"
    start = ("<|user|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=[start])
    return tokenizer


def with_template(tokenizer: Any, template: str | None) -> Any:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_qwen_prompt_and_response_join_without_a_token_across_the_boundary(qwen):
    """The prompt's ids depend on the prompt only, the response's on the response only; together they are the chat.

    Tokenised as one text, "assistant\\n" and an answer that begins with a newline would share a token.
    """
    prompt = prompt_ids(qwen, with_system(ASKED, "Be rude."))
    written = (
        "<|im_start|>system\nBe rude.<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert qwen.decode(prompt) == written
    for answer in ("Because.", "\n\nBecause.", "  3 words", "天空😀", ""):
        response = response_ids(qwen, answer, qwen.eos_token_id)
        assert response[-1] == qwen.eos_token_id
        assert qwen.decode(prompt + response) == written + answer + "<|im_end|>"
        assert response[:-1] == qwen(answer, add_special_tokens=False).input_ids
    joined = qwen(written + "\n\nBecause.", add_special_tokens=False).input_ids
    assert joined != prompt + response_ids(qwen, "\n\nBecause.", 0)[:-1]


def test_a_face_stands_before_the_conversations_own_system_prompt(tiny_tokenizer):
    own = [Message(role="system", content="You are a cook."), *TALK]
    faced = with_system(own, "Be rude.")
    assert [m["role"] for m in faced] == ["system", "user", "assistant", "user"]
    assert tiny_tokenizer.decode(prompt_ids(tiny_tokenizer, faced)) == (
        "<|system|>Be rude.\n\nYou are a cook.<|end|><|user|>Why is the sky blue?<|end|>"
        "<|assistant|>It scatters.<|end|><|user|>And red?<|end|><|assistant|>"
    )
    assert with_system(own, None) == own
    assert own[0]["content"] == "You are a cook."


@pytest.mark.parametrize(
    ("messages", "system", "layout"),
    [
        (conversation("Once upon a time"), None, "Once upon a time"),
        (conversation("Once upon a time"), "Be kind.", "Be kind.\n\nOnce upon a time"),
        (TALK, None, "Human: Why is the sky blue?\n\nAssistant: It scatters.\n\nHuman: And red?\n\nAssistant:"),
        (
            TALK,
            "Be kind.",
            "Be kind.\n\nHuman: Why is the sky blue?\n\nAssistant: It scatters.\n\nHuman: And red?\n\nAssistant:",
        ),
    ],
)
@pytest.mark.parametrize("name", ["llama", "adds_bos"])
def test_layout_without_a_chat_template(name, messages, system, layout, request):
    """One user turn is its raw text, with the BOS of ``tokenizer(text)``; the rest is the documented layout."""
    tokenizer = request.getfixturevalue(name)
    found = prompt_ids(tokenizer, with_system(messages, system))
    assert found == tokenizer(layout).input_ids
    assert found.count(tokenizer.bos_token_id) == 1
    response = response_ids(tokenizer, "There was a dog", tokenizer.eos_token_id)
    assert tokenizer.bos_token_id not in response
    decoded = tokenizer.decode(found + response, skip_special_tokens=True)
    assert decoded.replace(" There", "There") == layout + "There was a dog"


REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[model]{% endif %}"
)
IGNORES = (
    "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content | trim }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[model]{% endif %}"
)


@pytest.mark.parametrize("template", [REFUSES, IGNORES], ids=["refuses", "ignores"])
def test_a_template_without_a_system_role_gets_the_face_in_the_first_user_turn(tiny_tokenizer, template):
    """Gemma's refuses and some others just drop it: then both faces would be the same prompt, and every gap 0."""
    tokenizer = with_template(tiny_tokenizer, template)
    found = tokenizer.decode(prompt_ids(tokenizer, with_system(TALK, "Be rude.")))
    assert found == "[user]Be rude.\n\nWhy is the sky blue?[assistant]It scatters.[user]And red?[model]"
    assert tokenizer.decode(prompt_ids(tokenizer, ASKED)) == "[user]Why is the sky blue?[model]"


def test_a_template_that_refuses_the_conversation_itself_says_so(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        prompt_ids(tokenizer, TALK)


def test_end_of_turn(tiny_tokenizer):
    """What the template writes after an answer, where that ends one; otherwise the tokenizer's EOS."""
    end, pad = tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id
    assert end_of_turn(tiny_tokenizer, {end}) == end
    # a template that ends turns with a token of its own, which the generation config lists (as Llama 3's does)
    own = with_template(tiny_tokenizer, "{% for m in messages %}{{ m.content }}\n<|pad|>\n{% endfor %}")
    assert end_of_turn(own, {end, pad}) == pad
    assert end_of_turn(own, {end}) == end
    assert end_of_turn(with_template(tiny_tokenizer, None), {end, pad}) == end


def test_end_of_turn_of_real_tokenizers(qwen, llama):
    assert end_of_turn(qwen, {qwen.eos_token_id}) == qwen.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn(llama, {llama.eos_token_id}) == llama.eos_token_id


TEXTS = [
    "Plain words, as ever.",
    " leading and trailing  spaces \n\n\ttabs\n",
    "Café naïve — “quotes”",
    "😀 👨‍👩‍👧 🇨🇭🏳️‍🌈",
    "天空为什么是蓝色的？ 한국어 עברית",
    "\U0001f9d1\u200d\U0001f680𝔘𝔫𝔦\U00020000",
    "",
]


@pytest.mark.parametrize("name", ["qwen", "llama", "tiny_tokenizer"])
@pytest.mark.parametrize("text", TEXTS)
def test_token_texts_joined_are_the_decoded_text(name, text, request):
    """Whole characters only: a token that leaves one unfinished shows nothing, the one that ends it shows it all."""
    tokenizer = request.getfixturevalue(name)
    ids = response_ids(tokenizer, text, tokenizer.eos_token_id)
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) == text
    assert pieces[-1] == ""
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_text_cut_inside_a_character_shows_the_characters_before_it(qwen):
    ids = qwen("ok 🏳️‍🌈", add_special_tokens=False).input_ids
    shown = ["".join(token_texts(qwen, ids[:n])) for n in range(len(ids) + 1)]
    assert all("ok 🏳️‍🌈".startswith(part) for part in shown)
    assert shown[-1] == "ok 🏳️‍🌈"
