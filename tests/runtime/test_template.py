"""Chat templates print what transformers prints, and a hostile one is stopped."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.synthetic_tokenizer import CHAT_TEMPLATE as QWEN2_VL
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from qwen2vl_tc.artifacts.errors import ArtifactError, RequestError, TargetError
from qwen2vl_tc.runtime.text import template
from qwen2vl_tc.runtime.text.template import ChatTemplate, Limits, Renderer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# the constructs that published chat templates use beyond those two
WIDE = r"""
{%- macro shout(text, mark='!') %}{{ text | upper ~ mark }}{% endmacro -%}
{%- set ns = namespace(users=0, last=none) %}
{#- a comment #}
{%- if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{%- for message in rest -%}
    {%- if message.role not in ['user', 'assistant'] %}{% continue %}{% endif %}
    {%- if message['role'] == 'user' %}{% set ns.users = ns.users + 1 %}{% endif -%}
    [{{ loop.index0 }}{{ ',' if not loop.last }}{{ message.get('missing', 'none') }}]
    {%- if message.content is string %}{{ shout(message.content.strip()) | trim }}
    {%- else %}{{ message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' + ') }}
    {%- for key, value in message.content[0].items() | sort %} {{ key }}={{ value | string | length }}{% endfor %}
    {%- endif %}
    {%- generation %} {{ message | tojson }} {{ message | tojson(indent=2) }}{% endgeneration %}
    {%- if loop.index > 20 %}{% break %}{% endif %}
{%- endfor %}
{{ ns.users }} {{ range(3) | list }} {{ 7 // 2 }} {{ 2 ** 5 }} {{ 7 % 4 }} {{ '-' * 4 }} {{ [1, 2] + [3] }} {{ (1, 2) }}
{{ messages | length }} {{ tools is none }} {{ documents }} {{ eos_token }} {{ undefined_thing is defined }}
{{ 'a,b'.split(',') }} {{ 'x'.join(['a', 'b']) }} {{ 'aXb' | replace('X', '-') }} {{ 'aXb'.replace('X', '--', 1) }}
{{ {'b': 1, 'a': [true, none, 1.5]} | tojson }} {{ dict(a=1) | items | list }} {{ [3, 1] | sort | first }}
{% set block %}{{ 'set' }} block{% endset %}{{ block | title }}{% filter upper %}low{% endfilter %}
{{ messages[-1].role.startswith('u') }} {{ "<&>" }} {{ '日本' | tojson }} {{ none | default('d', true) }}
"""
PICTURE = Image.new("RGB", (4, 4))
CONVERSATIONS = {
    "a question": [{"role": "user", "content": "What is this?"}],
    "a system message": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "several turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello <b> 日本 </b>\n"},
        {"role": "user", "content": ""},
    ],
}
PICTURED = {
    "an image": [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "this?"}]}],
    "images and videos": [
        {"role": "system", "content": [{"type": "text", "text": "Look."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "between"},
                {"type": "image", "image": "cat.jpg", "min_pixels": 50176},
                {"type": "image_url", "image_url": {"url": "x"}},
                {"type": "video", "video": [PICTURE, PICTURE], "fps": 1.5},
                {"type": "image"},
                {"type": "text", "text": "and\nafter"},
            ],
        },
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "video", "video": np.zeros((2, 4, 4, 3), np.uint8)}]},
    ],
}
CASES = [
    *itertools.product([QWEN2_VL, WIDE], [*CONVERSATIONS.values(), *PICTURED.values()]),
    *itertools.product([CHATML], CONVERSATIONS.values()),
]


# a template that is stopped by the clock is stopped here as in the product, only sooner
LIMITS = Limits(seconds=0.5)
HI = [{"role": "user", "content": "hi"}] * 3


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    """One process for all cases; it is started again wherever a case has ended it."""
    renderer = Renderer(LIMITS)
    yield renderer
    renderer.close()


@pytest.mark.parametrize(("source", "messages"), CASES)
@pytest.mark.parametrize("more", [{}, {"add_vision_id": True}, {"eos_token": "<|im_end|>"}], ids=str)
@pytest.mark.parametrize("prompt", [True, False])
def test_the_output_is_that_of_transformers(renderer, source, messages, more, prompt):
    rendered = ChatTemplate(source, renderer=renderer).render(messages, add_generation_prompt=prompt, **more)
    (expected,), _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=prompt, **more)
    assert rendered == expected


def test_rendering_leaves_the_messages_as_they_were():
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    ChatTemplate(QWEN2_VL).render(messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]


def test_the_template_sees_no_object_of_ours():
    template = ChatTemplate("{{ messages[0].content.save('x') }}")
    with pytest.raises(ArtifactError, match="save"):
        template.render([{"role": "user", "content": PICTURE}])


def test_the_date_is_printed_by_the_directives_that_templates_use():
    assert len(ChatTemplate("{{ strftime_now('%d %b %Y %-d') }}").render([{"role": "user"}])) > 10


BIG = "{% set big = 'a' * 500000 %}"
HUGE = "{% set v = 'v' %}{% set a = (v * 1000000)|int(base=32) %}{% set b = (v * 500000)|int(base=32) %}"
FOR_EVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def grow(start: str, step: str, times: int = 60) -> str:
    """A template that replaces x.v by `step` again and again, then prints it."""
    loop = f"{{% for i in range({times}) %}}{{% set x.v = {step} %}}{{% endfor %}}"
    return f"{{% set x = namespace(v={start}) %}}{loop}{{{{ x.v }}}}"


GROWTH = {
    "joined text": grow("'abcdefgh'", "x.v ~ x.v"),
    "added text": grow("'abcdefgh'", "x.v + x.v"),
    "added lists": grow("[1]", "x.v + x.v"),
    "shared lists": grow("[1]", "[x.v, x.v]"),
    "shared tuples": grow("(1,)", "(x.v, x.v)"),
    "shared dicts": grow("{}", "{1: x.v, 2: x.v}"),
    "shared calls": grow("{}", "dict(a=x.v, b=x.v)"),
    "shared views": grow("{}", "dict(a=x.v.items(), b=x.v)"),
    "namespaces": grow("namespace()", "namespace(a=x.v, b=x.v)"),
    "nesting": grow("[]", "[x.v]", times=99999),
    "lazy filters": grow("[]", "[x.v|map('upper')]", times=99999),
    "products": grow("3", "x.v * x.v"),
    "times": "{{ 'a' * 999999999 }}",
    "times reversed": "{{ 999999999 * 'a' }}",
    "list times": "{{ [1] * 999999999 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "floor division": HUGE + "{% set x = [" + "a // b, " * 1000 + "] %}",
    "modulo": HUGE + "{% set x = [" + "a % b, " * 1000 + "] %}",
    "a number in decimals": HUGE + "{{ a }}",
    "a folded constant": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "replace": "{{ ('a' * 1000).replace('a', 'a' * 1000000) }}",
    "replace nothing": "{{ ('a' * 1000).replace('', 'a' * 1000000) }}",
    "replace many": "{{ (['a'] * 100000) | map('replace', 'a', 'b' * 1000000) | list | length }}",
    "join": "{{ ('a' * 100000).join(['b'] * 10000) }}",
    "join filter": "{{ (['b'] * 10000) | join('a' * 100000) }}",
    "indented JSON": "{{ [1] | tojson(indent=999999999) }}",
    "set block": BIG + "{% set x %}{% for i in range(99999) %}{{ big }}{% endfor %}{% endset %}",
    "macro": BIG + "{% macro m(b) %}{% for i in range(99999) %}{{ b }}{% endfor %}{% endmacro %}{{ m(big) }}",
    "output": BIG + "{% for i in range(99999) %}{{ big }}{% endfor %}",
    "range": "{{ range(999999999) | list }}",
    "a slow search": "{{ ('a' * 900000 + 'b').rfind('b' + 'a' * 450000) }}" * 50,
    "a wide date": "{{ strftime_now('%999999999d') }}",
    "center": "{{ 'a'.center(999999999) }}",
    "center filter": "{{ 'a' | center(999999999) }}",
    "justified": "{{ 'a'.ljust(999999999) }}",
    "tabs": "{{ 'a\tb'.expandtabs(999999999) }}",
    "zeros": "{{ 'a'.zfill(999999999) }}",
    "indented": "{{ 'a\nb' | indent(999999999) }}",
    "format": "{{ '{:>999999999}'.format(1) }}",
    "format filter": "{{ '%999999999d' | format(1) }}",
    "format operator": "{{ '%999999999d' % 1 }}",
    "batch": "{{ [1] | batch(999999999, 'x') | list }}",
    "slice": "{{ [1] | slice(999999999) | list }}",
    "sum": "{{ ([[1] * 9999] * 9999) | sum(start=[]) | length }}",
    "translated": "{{ ('a' * 9999).translate({97: 'b' * 999999}) }}",
    "bytes": "{{ (5).to_bytes(999999999, 'big') }}",
    "lipsum": "{{ lipsum(n=999999) }}",
}
LOOPS = {
    "a loop": FOR_EVER,
    "a loop in a macro": "{% macro m() %}" + FOR_EVER + "{% endmacro %}{{ m() }}",
    "a loop over filters": "{% for a in range(99999) %}{% set x = range(9999) | map('string') | list %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive blocks": "{% block a %}{{ self.a() }}{% endblock %}",
    "a recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
}
ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ '' | attr('__class__') }}",
    "map attribute": "{{ [''] | map(attribute='__class__.__mro__') | list }}",
    "globals": "{{ raise_exception.__globals__['sys'] }}",
    "undefined": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "change": "{{ messages.append(1) }}",
    "namespace": "{{ namespace(__class__=1) }}",
    "namespace set": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "include": "{% include '/etc/hostname' %}",
    "import": "{% import 'os' as os %}",
    "format string": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
}
BROKEN = {
    "unfinished": "{% if %}",
    "unclosed": "{{ (1 }}",
    "unknown tag": "{% frobnicate %}",
    "undefined": "{{ nothing.at.all }}",
    "type": "{{ 1 + 'a' }}",
    "division": "{{ 1 / 0 }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep sums": "{{ 1" + "+1" * 20_000 + " }}",
    "deep attributes": "{{ a" + ".a" * 20_000 + " }}",
    "deep ifs": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "size": "x" * 70_000,
}


@pytest.mark.parametrize(
    "source",
    [*GROWTH.values(), *LOOPS.values(), *ESCAPES.values(), *BROKEN.values()],
    ids=[
        *(f"growth: {n}" for n in GROWTH),
        *(f"loop: {n}" for n in LOOPS),
        *ESCAPES,
        *(f"broken: {n}" for n in BROKEN),
    ],
)
def test_a_hostile_or_broken_template_ends_in_one_error_that_names_it(renderer, source):
    with pytest.raises(ArtifactError, match=r"^chat_template\.json: ") as caught:
        ChatTemplate(source, "chat_template.json", renderer=renderer).render(HI)
    assert len(str(caught.value)) < 1000
    assert ChatTemplate("{{ messages[0].content }}", renderer=renderer).render(HI) == "hi"


def test_a_syntax_error_names_its_line():
    with pytest.raises(ArtifactError, match="line 3"):
        ChatTemplate("a\nb\n{% if %}")


def test_other_threads_go_on_while_an_operator_takes_for_ever():
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.01):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    with pytest.raises(ArtifactError, match=r"stopped: the template ran longer than 0\.5 s"):
        ChatTemplate(GROWTH["floor division"], limits=LIMITS).render(HI)
    done.set()
    thread.join()
    assert len(ticks) > 5  # one operator took all of half a second


def test_a_template_that_needs_memory_is_stopped_in_its_own_process():
    with pytest.raises(ArtifactError, match="needed more than 256 MB"):
        ChatTemplate("{{ ('a' * 600000000) | length }}").render(HI)


def test_a_template_cannot_read_files():
    # whatever a hole in the sandbox were to give: the process has no more files to open
    template = ChatTemplate("{{ messages }}")
    limits = Path(f"/proc/{template._renderer._process.pid}/limits").read_text()
    assert [line.split()[3] for line in limits.splitlines() if line.startswith("Max open files")] == ["0"]


def test_a_process_that_is_gone_is_started_again():
    template = ChatTemplate(QWEN2_VL)
    expected = template.render(HI)
    os.kill(template._renderer._process.pid, signal.SIGKILL)
    with pytest.raises(ArtifactError, match=r"ended its process by .*SIGKILL"):
        template.render(HI)
    assert template.render(HI) == expected


def test_an_interrupted_request_is_not_the_answer_to_the_next(monkeypatch):
    template = ChatTemplate("{{ messages[0].content }}")
    pipe = template._renderer._process.stdout

    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt

        def close(self):
            pipe.close()

    monkeypatch.setattr(template._renderer._process, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        template.render([{"role": "user", "content": "first"}])
    assert template.render([{"role": "user", "content": "second"}]) == "second"


def test_threads_and_forked_processes_get_their_own_answers():
    template = ChatTemplate("{{ messages[0].content }}")
    answers = {}

    def ask(i):
        answers[i] = template.render([{"role": "user", "content": f"{i}"}])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: f"{i}" for i in range(20)}
    if (pid := os.fork()) == 0:
        signal.alarm(30)
        os._exit(template.render([{"role": "user", "content": "forked"}]) != "forked")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    ask(20)
    assert answers[20] == "20"


def test_the_process_ends_with_its_owner():
    code = """
import os
from qwen2vl_tc.runtime.text.template import ChatTemplate
template = ChatTemplate("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
process = template._renderer._process
process.stdin.write(b'{"source": "", "values": {}}\\n')
print(process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    owner = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(owner.stdout)
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < end, "the process outlived its owner"


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "held_back",
    [
        "signal.signal(signal.SIGALRM, signal.SIG_IGN)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})",
    ],
)
def test_the_time_limit_holds_whatever_the_owner_does_with_its_signal(held_back):
    code = f"""
import signal
{held_back}
from qwen2vl_tc.runtime.text import template
template.ChatTemplate({ENDLESS!r}, limits=template.Limits(seconds=0.2)).render([])
"""
    owner = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "stopped: the template ran longer than 0.2 s" in owner.stderr


@pytest.mark.parametrize("size", [1, 900_000], ids=["does not answer", "does not read"])
def test_a_process_that_hangs_is_ended_by_its_owner(size, monkeypatch):
    asked = ChatTemplate("{{ messages[0].content }}", limits=Limits(seconds=0.1))
    assert asked.render(HI) == "hi"
    monkeypatch.setattr(template, "_GRACE_SECONDS", 0.1)
    os.kill(asked._renderer._process.pid, signal.SIGSTOP)
    with pytest.raises(ArtifactError, match=r"gave no answer within 0\.2 s"):
        asked.render([{"role": "user", "content": "x" * size}])
    monkeypatch.undo()
    assert asked.render(HI) == "hi"


@pytest.mark.parametrize(
    ("executable", "said"),
    [
        (None, "sys.executable is empty, as in a program that embeds Python"),
        ("", "sys.executable is empty"),
        ("/bin/false", r"failed \(1\); is /bin/false \(sys.executable\) a Python"),
        ("./server", r"answers b'hello.*is ./server \(sys.executable\) a Python"),
    ],
)
def test_where_the_program_is_no_python_templates_fail_by_name(executable, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("server").write_text("#!/bin/sh\nread request\necho hello\n")
    Path("server").chmod(0o755)
    monkeypatch.setattr(sys, "executable", executable)
    renderer = Renderer()
    with pytest.raises(TargetError, match=said):
        ChatTemplate("{{ messages }}", renderer=renderer)


def test_without_a_process_to_render_in_only_templates_fail(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    renderer = Renderer()
    with pytest.raises(TargetError, match=r"cannot start the process that renders chat templates: .*/nowhere/python"):
        ChatTemplate("{{ messages }}", renderer=renderer)


def test_a_template_can_refuse_a_conversation():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", "chat_template.jinja")
    with pytest.raises(RequestError, match=r"chat_template\.jinja.*roles must alternate"):
        template.render([{"role": "user", "content": "hi"}])


def test_a_conversation_beyond_the_size_limit_is_the_requests_fault():
    with pytest.raises(RequestError, match="too large"):
        ChatTemplate(QWEN2_VL).render([{"role": "user", "content": "x" * (1 << 20)}])
    assert len(ChatTemplate(QWEN2_VL).render([{"role": "user", "content": "x" * 900_000}])) > 900_000


def test_messages_that_contain_themselves_are_refused():
    message: dict = {"role": "user"}
    message["content"] = [message]
    with pytest.raises(RequestError, match="too deep"):
        ChatTemplate(QWEN2_VL).render([message])
