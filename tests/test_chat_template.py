"""A chat template is a stranger's program: it says what the user said, once, or is refused in one line."""

import copy
import time

import pytest

from llmdoctor.chat_template import ChatTemplate
from llmdoctor.errors import DataError, LoadError
from llmdoctor.text import end_of_turn, prompt_ids

ASKED = [{"role": "user", "content": "Why is the sky blue?"}]
TURN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[model]"


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}[model]",
        "{% for m in messages %}{{ m.content | map(attribute='text') | join }}{% endfor %}[model]",
        "{% for m in messages %}{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
        "{% endfor %}[model]",
    ],
)
def test_a_template_that_wants_parts_gets_parts(tiny_tokenizer, template):
    tokenizer = with_template(tiny_tokenizer, template)
    assert tokenizer.decode(prompt_ids(tokenizer, ASKED)) == "Why is the sky blue?[model]"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content }", "line 1"),
        ("{{ raise_exception }", "not a Jinja template"),
        ("{% if %}", "not a Jinja template"),
        ("{{ messages[0].content.text.more }}", "no attribute"),
        ("{{ messages[0]['speaker'].upper() }}", "speaker"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% for m in messages %}{{ m.content }}{{ 1 / (messages | length - 1) }}{{ 1 / (messages | length - 2) }}"
         "{% endfor %}", "ZeroDivisionError"),
        ("once upon a time", "0 times"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "0 times"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "2 times"),
        ("{{ messages[0].content * 10 ** 10 }}", "characters"),
        ("{{ 10 ** (10 ** 10) }}", "characters"),
        ("{% set n = namespace(t='aaaaaaaa') %}{% for i in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}", "char"),
        ("{% set n = namespace(t='aaaaaaaa') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}", "char"),
        ("{% set n = namespace(t=[1]) %}{% for i in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}", "characters"),
        ("{% set n = namespace(t=9) %}{% for i in range(9999) %}{% set n.t = n.t * n.t %}{% endfor %}", "characters"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaa' }}{% endfor %}{% endfor %}",
         "characters"),
        ("{{ 'a'.ljust(10000000000) }}", "characters"),
        ("{{ 'a' | center(10000000000) }}", "characters"),
        ("{{ '%10000000000d' | format(1) }}", "too wide"),
        ("{{ '{:10000000000}'.format(1) }}", "too wide"),
        ("{{ '%10000000000d' % 1 }}", "characters"),
        ("{{ lipsum(10000) }}", "undefined"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "compiled"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("x" * 2_000_000, "2,000,000 characters"),
        ({"rag": TURN, "tool_use": TURN}, "no default"),
        (["a"], "not a text"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_is_one_line(tiny_tokenizer, template, words):
    tokenizer = with_template(tiny_tokenizer, template)
    for use in (lambda: prompt_ids(tokenizer, ASKED), lambda: end_of_turn(tokenizer, {1})):
        with pytest.raises(LoadError) as refused:
            use()
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 600


def test_a_template_that_runs_on_is_stopped_in_any_thread(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("llmdoctor.chat_template._SECONDS", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(LoadError, match=r"runs for more than 0\.2 seconds"):
        ChatTemplate.of(with_template(tiny_tokenizer, loop))
    assert time.monotonic() - started < 5
    later = "{% for m in messages %}{{ m.content }}{% if m.content == 'loop' %}" + loop + "{% endif %}{% endfor %}"
    with pytest.raises(DataError, match="runs for more"):
        prompt_ids(with_template(tiny_tokenizer, later), [{"role": "user", "content": "loop"}])


def test_of_several_templates_the_default_is_taken(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, {"default": TURN, "rag": "{{ nothing }}"})
    assert tokenizer.decode(prompt_ids(tokenizer, ASKED)) == "[user]Why is the sky blue?[model]"


@pytest.mark.parametrize("name", ["qwen", "clinic", "tiny_tokenizer"])
def test_the_text_is_what_transformers_renders(name, request, tiny_tokenizer):
    tokenizer = request.getfixturevalue(name)
    talk = [{"role": "system", "content": "Be brief."}, *ASKED, {"role": "assistant", "content": " It scatters. "}]
    talk.append({"role": "user", "content": "And red? {{ 7 * 7 }} <|im_end|> 123456 " + "long " * 1000})
    for turns in (ASKED, talk[:2], talk):
        for opened in (True, False):
            wanted = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opened)
            assert ChatTemplate.of(tokenizer).render(turns, answer_next=opened) == wanted


@pytest.fixture
def qwen(shared):
    from llmdoctor.models import load_tokenizer

    return load_tokenizer(shared / "qwen2-tokenizer")


@pytest.fixture
def clinic():
    from llmdoctor.models import load_tokenizer
    from llmdoctor.profile import load_profile

    return load_tokenizer(load_profile("clinic").patient.model)
