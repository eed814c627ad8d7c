"""Inputs that break parsers of YAML, command lines and templates."""

from __future__ import annotations

from itertools import pairwise

#: Pieces for any text.
TEXTS = (
    *(b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\x1a", b"\t", b"'", b'"', b"\\", b"\n\n"),
    *(text.encode() for text in ("\u2028", "\u202e", "\uff11", "e\u0301\u0301\u0301", "\U0001f926\u200d\u2642")),
    *(
        b"[" * 3000,
        b"{" * 3000,
        b"- " * 3000,
        b"&a ",
        b"*a",
        b"!!python/object:os.system ",
        b"<<: ",
        b"{{",
        b"{%",
        b"%}",
    ),
)

_ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghij")
)

#: Lines of a config.
YAML = (
    _ALIASES,
    "seed: " + "9" * 6000,
    "seed: 0x" + "f" * 6000,
    "data: " + "[" * 3000 + "]" * 3000,
    "data: " + "{a: " * 3000 + "}" * 3000,
    "\n".join(f"{' ' * depth}a:" for depth in range(1500)),
    "output: '" + "x" * 5000 + "'",
    "\u0085seed\u0085: 3",
    "\ttrain: {}",
    "--- \nseed: 1\n--- \nseed: 2",
    "%YAML 9.9\n---",
    "? [a, b]\n: 1",
    *"""\
base: &b {a: *b}
optim: {lr: 1e99999}
optim: {lr: .nan}
<<: {seed: 1}
<<: [{seed: 1}, [1]]
seed: !!python/object/apply:os.system [ls]
seed: !!binary aGk=
seed: !!set {a, b}
seed: 2024-01-01
seed: 1:30:00
train: {num_steps: 1000000000000000000000}
train: {num_steps: 1.0e+3}
model: {id: ~}
evaluate: {}
'': ''""".splitlines(),
)

#: Words of a command line.
WORDS = (
    "--seed=" + "9" * 5000,
    "--data.sources=" + "[" * 3000,
    "--model.id=\udcff",
    *"""\
--
-
--seed
--seed=
--=1
--.=1
--a.b.c=1
--data.sources.99.limit=1
--data.sources.-1.limit=1
--optim.lr=nan
--optim.lr=-inf
--optim.lr=1e999
--train={
--train=[1,
--base=
--base=nf4
--model.id=
--data.sources=[]
--seed=&a [*a]
--train.num_steps=1e30
--output=/dev/null
--adapter.rank=0
--adapter.rank=-1
--data.max_seq_len=10000000000000000000
--evaluate.metrics=[x]
run.yaml
--help=1
--train.num_steps
--data.sources.0
--data.sources.0.columns.a.b=1
--seed=3
--seed=4
--no-seed""".splitlines(),
)

#: Pieces of a chat template.
JINJA = (
    "{{ (" * 300,
    *r"""{{ messages[99].content }}
{{ 1 / 0 }}
{{ x.y.z }}
{{ 10 ** 10 ** 8 }}
{{ 9 ** 9 ** 9 }}
{{ 'x' * 10 ** 10 }}
{{ [0] * 10 ** 9 }}
{% for a in range(10 ** 12) %}{% endfor %}
{% for a in range(10 ** 5) %}{{ a }}{% endfor %}
{% break %}
{{ '%d' % 'x' }}
{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}
{% include 'x' %}
{% extends 'x' %}
{% import 'x' as y %}
{{ self }}
{{ ''.__class__.__mro__ }}
{{ raise_exception('no') }}
{{ raise_exception(1) }}
{{ strftime_now('%Y') }}
{{ cycler() }}
{{ messages | tojson }}
{{ messages | map(attribute='x') | join }}
{{ messages | sort }}
{{ messages | sum }}
{{ 'a' | int('x') }}
{% generation %}a{% endgeneration %}
{% set x = namespace(a=1) %}{% set x.b.c = 2 %}
{{ lipsum(n=10 ** 6) }}
{{ 'a' | center(10 ** 10) }}
{{ '{:>9999999999}'.format(1) }}
{{ messages.append(messages[0]) }}
{{ messages.pop() }}
{{ undefined() }}
{{ '\ud800' }}
{{ '\x00' }}
{{ 'a'.encode('x') }}
{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}""".splitlines(),
)
