"""A chat template is a stranger's program: it says what the user said, once, or is refused in one line."""

import copy
import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmdoctor import chat_template
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
    # left alone, the loop would take minutes
    with pytest.raises(LoadError, match=r"runs for more than 0\.2 seconds"):
        ChatTemplate.of(with_template(tiny_tokenizer, loop))
    later = "{% for m in messages %}{{ m.content }}{% if m.content == 'loop' %}" + loop + "{% endif %}{% endfor %}"
    with pytest.raises(DataError, match="runs for more"):
        prompt_ids(with_template(tiny_tokenizer, later), [{"role": "user", "content": "loop"}])


def test_one_thread_watches_all_renders(tiny_tokenizer, monkeypatch):
    """Several at once, each to its own end; what was in time is left alone, and a child process has its own."""
    template = ChatTemplate.of(tiny_tokenizer)
    loop = "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}"
    slow = ChatTemplate.of(with_template(tiny_tokenizer, loop + "{% endfor %}{% endfor %}{% endif %}" + TURN))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda _: pytest.fail("a thread for one render"))
        assert {template.render(ASKED) for _ in range(20)} == {template.render(ASKED)}
    monkeypatch.setattr("llmdoctor.chat_template._SECONDS", 0.2)
    asked = [ASKED, [{"role": "user", "content": "loop"}]] * 2
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(slow.render, turns) for turns in asked]
    assert [type(answer.exception()) for answer in found] == [type(None), DataError] * 2
    time.sleep(0.3)
    assert template.render(ASKED)
    if hasattr(os, "fork"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
            child = os.fork()
        if not child:
            try:
                slow.render(asked[1])
            except DataError:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0


EVERYTHING = """
  {%- for m in messages %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {% if m.role == 'nobody' %}
        {% continue %}
    {% endif %}
    {% set seen = namespace(n=loop.index, self='s') %}
    {% set seen.n = seen.n + 1 %}
    {% generation %}
      {{ m | tojson }} {{ dict(a=m.role, b='ü<&') | tojson(indent=2) }} {{ [1, 'é'] | tojson(ensure_ascii=true) }}
      {{ {'b': 1, 'a': [2]} | tojson(separators=(',', ':'), sort_keys=true) }}
    {% endgeneration %}
      {{ seen.n }} {{ seen.self }} {{ dict.fromkeys('ab', 1) }} {{ strftime_now('%Y')[:2] }}
      {{ m.content | trim | upper }}
    {# a comment #}
    {{- m.content ~ 1 ~ none }} {{ '%s-%03d' | format('x', 7) }} {{ '{:>5}'.format(3) }} {{ m.content[:3] }}
  {% endfor %}
  {% macro say(x, y=2) %}<{{ x * y }}>{{ caller() if caller else '' }}{% endmacro %}
  {{ say('ab') }}{% call say(3) %}!{% endcall %} {% filter lower %}ABC{% endfilter %}
  {% set joined = joiner(', ') %}{{ joined() }}{{ joined() }} {{ range(3) | list }} {{ bos_token }}
  {{ missing is defined }}
  {% if add_generation_prompt %}{{ eos_token }}{% endif %}
"""


def test_a_template_finds_all_that_transformers_gives(tiny_tokenizer, monkeypatch):
    tokenizer = with_template(tiny_tokenizer, EVERYTHING.replace("{{ m | tojson }}", "{{ m | tojson | length }}"))
    talk = [*ASKED, {"role": "nobody", "content": "?"}, {"role": "assistant", "content": " It <scatters> é. "}] * 2
    wanted = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert "_compile_jinja_template" not in Path(chat_template.__file__).read_text(encoding="utf-8")  # it is private
    chat_template._environment.cache_clear()
    template = ChatTemplate.__new__(ChatTemplate)  # without the check that a word is there once
    monkeypatch.setattr(ChatTemplate, "_require_words", lambda *_: None)
    template.__init__(tokenizer.chat_template, tokenizer.special_tokens_map, "it")
    assert template.render(talk) == wanted


@pytest.mark.parametrize("source", ["{{ namespace(__class__=1) }}", "{{ dict.__class__.__mro__ }}", "{{ dict.mro() }}"])
def test_a_template_has_no_way_out_through_what_it_is_given(source, tiny_tokenizer):
    with pytest.raises(LoadError):
        ChatTemplate.of(with_template(tiny_tokenizer, source + TURN))


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


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ m.content[:20] }}{% endfor %}",
        "{% for m in messages %}{% if loop.first or m.role != 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    ],
    ids=["all but the last", "their ends", "all but the first"],
)
def test_a_template_that_loses_what_a_user_says_is_refused(tiny_tokenizer, template):
    turns = [("user", "What is a tide, and when is it high?"), ("assistant", "Water."), ("user", "And when is it low?")]
    with pytest.raises(DataError, match="drops the user turn, or a part of it"):
        prompt_ids(with_template(tiny_tokenizer, template), [{"role": role, "content": text} for role, text in turns])
