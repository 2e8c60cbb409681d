"""A chat template is a stranger's program: it says what the user said, once, or is refused in one line."""

import copy
import os
import re
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmdoctor import chat_template, template_process
from llmdoctor.chat_template import ChatTemplate
from llmdoctor.errors import DataError, LoadError
from llmdoctor.text import conversation_text, end_of_turn, prompt_ids

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
        ("{{ messages[0].content * 10 ** 10 }}", "memory"),
        ("{% set n = namespace(t='aaaaaa') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}", "memory"),
        ("{% set n = namespace(t=[1]) %}{% for i in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}", "memory"),
        ("{{ '%10000000000d' % 1 }}", "memory"),
        ("{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaa' * 100 }}{% endfor %}", "16,777,216 characters"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "compiled"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("x" * 2_000_000, "2,000,000 characters"),
        ({"rag": TURN, "tool_use": TURN}, "no default"),
        (["a"], "not a text"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_is_one_line(tiny_tokenizer, template, words, monkeypatch):
    monkeypatch.setattr("llmdoctor.chat_template._SECONDS", 60.0)
    tokenizer = with_template(tiny_tokenizer, template)
    for use in (lambda: prompt_ids(tokenizer, ASKED), lambda: end_of_turn(tokenizer, {1})):
        with pytest.raises(LoadError) as refused:
            use()
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 600


NESTED = (
    "{% set n = namespace(t=[1], u=[1]) %}{% for i in range(99) %}{% set n.t = [n.t, n.t] %}{% set n.u = [n.u, n.u] %}"
)
ENDLESS = {
    "a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "the text of nested lists": NESTED + "{% endfor %}{{ n.t }}",
    "nested lists as JSON": NESTED + "{% endfor %}{{ n.t | tojson }}",
    "nested lists that are equal": NESTED + "{% endfor %}{{ n.t == n.u }}",
    "a great number": "{% set ten = 10 %}{{ ten ** (ten ** 10) }}",
    "many words": "{% set much = 9999999 %}{{ ('a ' * much) | wordwrap(1) }}",
}


@pytest.mark.parametrize("endless", ENDLESS)
def test_a_template_that_runs_on_is_stopped_after_one_wait(endless, tiny_tokenizer, monkeypatch):
    """Much of this is one call of C code, which nothing in the same process can stop. Left alone it takes years."""
    monkeypatch.setattr("llmdoctor.chat_template._SECONDS", 0.5)
    tokenizer, began = with_template(tiny_tokenizer, ENDLESS[endless]), time.monotonic()
    waits = []
    real = chat_template._process.ask
    monkeypatch.setattr(chat_template._process, "ask", lambda *given: waits.append(given) or real(*given))
    for _ in range(3):
        with pytest.raises(LoadError, match=r"was stopped: it (ran for more than 0\.5 seconds|took more than 512 MiB)"):
            prompt_ids(tokenizer, ASKED)
    assert len(waits) == 1
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("endless", ENDLESS)
def test_a_template_that_runs_on_for_some_conversations_is_stopped_there(endless, tiny_tokenizer, monkeypatch):
    """One wait even where there is another try, and the next conversation is rendered as before."""
    later = "{% if messages[0].content == 'loop' %}" + ENDLESS[endless] + "{% endif %}" + TURN
    template = ChatTemplate.of(with_template(tiny_tokenizer, later))
    monkeypatch.setattr("llmdoctor.chat_template._SECONDS", 0.5)
    for turns in ([{"role": "system", "content": "loop"}, *ASKED], [{"role": "user", "content": "loop"}]):
        with pytest.raises(LoadError, match="was stopped"):
            conversation_text(with_template(tiny_tokenizer, later), turns)
    assert template.render(ASKED) == "[user]Why is the sky blue?[model]"


def test_threads_that_render_get_their_own_answers(tiny_tokenizer, monkeypatch):
    later = "{% if messages[0].content == 'loop' %}" + ENDLESS["a loop"] + "{% endif %}" + TURN
    template = ChatTemplate.of(with_template(tiny_tokenizer, later))
    monkeypatch.setattr("llmdoctor.chat_template._SECONDS", 0.5)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(template.render, [{"role": "user", "content": said}]) for said in ("1", "loop", "2", "3")]
    assert [answer.exception() and type(answer.exception()) for answer in found] == [None, LoadError, None, None]
    assert [found[i].result() for i in (0, 2, 3)] == [f"[user]{i}[model]" for i in (1, 2, 3)]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads memory from /proc")
def test_a_template_that_grows_takes_no_memory_from_its_caller(tiny_tokenizer):
    """Of 2 to 4 GB, once. The limit is that of the system: no trick of the template leads around it."""
    grown = "{% set n = namespace(t=['x' * 99]) %}{% for i in range(40) %}{% set n.t = n.t * 2 %}{% endfor %}{{ n.t }}"

    def most(process):
        return int(re.search(r"VmPeak:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) << 10

    ChatTemplate.of(tiny_tokenizer)
    process, before = chat_template._process._running.pid, most("self")
    with pytest.raises(LoadError, match="512 MiB of memory"):
        ChatTemplate.of(with_template(tiny_tokenizer, grown))
    assert most(process) <= 1 << 29
    assert most("self") - before < 1 << 27


@pytest.fixture
def interruptible():
    """A shell's background job ignores SIGINT, and so would the tests in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_rendering_at_once_and_the_next_one_is_right(tiny_tokenizer, interruptible):
    later = "{% if messages[0].content == 'loop' %}" + ENDLESS["nested lists that are equal"] + "{% endif %}" + TURN
    template = ChatTemplate.of(with_template(tiny_tokenizer, later))
    threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        template.render([{"role": "user", "content": "loop"}])
    assert time.monotonic() - began < 4
    assert template.render(ASKED) == "[user]Why is the sky blue?[model]"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_renders_on_its_own(tiny_tokenizer):
    template = ChatTemplate.of(tiny_tokenizer)
    wanted = template.render(ASKED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
    if not child:
        try:
            os._exit(template.render(ASKED) != wanted)
        finally:
            os._exit(2)
    assert [template.render(ASKED) for _ in range(20)] == [wanted] * 20
    assert os.waitpid(child, 0)[1] == 0


def test_a_process_of_templates_that_was_killed_is_started_again(tiny_tokenizer):
    template = ChatTemplate.of(tiny_tokenizer)
    wanted = template.render(ASKED)
    chat_template._process._running.kill()
    chat_template._process._running.wait()
    assert template.render(ASKED) == wanted


def test_a_process_of_templates_that_ends_while_it_is_asked_is_told_and_started_again(tiny_tokenizer, monkeypatch):
    template = ChatTemplate.of(tiny_tokenizer)
    wanted = template.render(ASKED)
    running = chat_template._process._running
    running.kill()
    running.wait()
    with monkeypatch.context() as patch:
        patch.setattr(running, "poll", lambda: None)  # as if it was killed a moment later
        with pytest.raises(LoadError, match="was stopped"):
            template.render(ASKED)
    assert template.render(ASKED) == wanted


def test_a_process_of_templates_that_cannot_start_does_not_condemn_the_template(tiny_tokenizer, monkeypatch):
    chat_template._process._running.kill()
    chat_template._process._running.wait()
    tokenizer = with_template(tiny_tokenizer, TURN + "{# of this test #}")
    for broken, words in (("/nowhere/python", "cannot be started"), ("/bin/false", "ended as it started")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", broken)
            with pytest.raises(LoadError, match=words):
                ChatTemplate.of(tokenizer)
    assert ChatTemplate.of(tokenizer).render(ASKED) == "[user]Why is the sky blue?[model]"


def test_what_a_conversation_holds_reaches_the_template_as_it_is(tiny_tokenizer):
    content = "a\n\r\u2028\ud83d\ude00\0\x1b 😀 \\u0041 {{ 7 * 7 }}"
    assert ChatTemplate.of(with_template(tiny_tokenizer, TURN)).render([{"role": "user", "content": content}]) == (
        f"[user]{content}[model]"
    )
    with pytest.raises(DataError, match="no JSON"):
        ChatTemplate.of(tiny_tokenizer).render([{"role": "user", "content": b"bytes"}])


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
    assert "_compile_jinja_template" not in Path(template_process.__file__).read_text(encoding="utf-8")  # it is private
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


TIDES = [("user", "What is a tide, and when is it high?"), ("assistant", "Water, that rises."), ("user", "And low?")]


@pytest.mark.parametrize(
    ("template", "dropped"),
    [
        ("{{ messages[-1].content }}", "user"),
        ("{% for m in messages %}{{ m.content[:20] }}{% endfor %}", "user"),
        (
            "{% for m in messages %}{% if loop.first or m.role != 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "user",
        ),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "assistant"),
        ("{% for m in messages %}{{ m.content if m.role == 'user' else m.content[:9] }}{% endfor %}", "assistant"),
    ],
    ids=["all but the last", "their ends", "all but the first", "the answers", "the end of an answer"],
)
def test_a_template_that_loses_what_was_said_is_refused(tiny_tokenizer, template, dropped):
    with pytest.raises(DataError, match=f"drops the {dropped} turn, or a part of it"):
        prompt_ids(with_template(tiny_tokenizer, template), [{"role": role, "content": text} for role, text in TIDES])


@pytest.mark.parametrize(
    "reasoning", ["<think>\nHm.\n</think>\n\n", "<thinking>Hm.</thinking>", "Hm.</think>", "[THINK]Hm.[/THINK]", ""]
)
def test_a_template_may_leave_out_what_was_reasoned_before_an_answer(tiny_tokenizer, reasoning):
    """As those of models that reason do; the answer itself must be there."""
    turns = [{"role": role, "content": text} for role, text in TIDES]
    turns[1]["content"] = reasoning + turns[1]["content"]
    answers = "{% for m in messages %}{{ m.content.split('>')[-1].split('THINK]')[-1] | trim }}{% endfor %}"
    assert "Water, that rises." in conversation_text(with_template(tiny_tokenizer, answers), turns)
    with pytest.raises(DataError, match="drops the assistant turn"):
        conversation_text(with_template(tiny_tokenizer, answers.replace("trim", "replace('Water', '')")), turns)
