"""Expressions made of every filter, test, method and operator of Jinja2 with values of every kind."""

VALUES = {
    "none": None, "tr": True, "fa": False, "zero": 0, "i": 7, "neg": -3, "big": 12345678901234567890,
    "f": 0.1, "one": 1.0, "half": 2.5, "nf": -7.25, "tiny": 1e-07, "huge": 1e16, "empty": "", "s": "  Hello World\n",
    "w": "abc", "q": "it's \"q\"\\\n\t", "t": "a,b,,c", "u": "\u00c4\u00f6\u00dc \u00df\u01c5", "n": "12", "nn": "-3.7", "hx": "0x1f",
    "h": "<b>x & 'y'</b>", "e": [], "l": [3, 1, 2], "m": ["b", "A", "a"], "mixed": [1, "a", None, 2.5, [1], {"k": 1}],
    "em": {}, "d": {"b": 1, "a": 2, "c": {"x": 1e20}}, "ds": [{"n": "x", "v": 1}, {"n": "y", "v": 2}, {"n": "x", "v": 3}],
    "ll": [[1, 2], [3, 4]],
}
# Written into the template: values that JSON has no form for.
WRITTEN = ["undef", "(1, 2)", "('a',)", "()", "range(3)", "l|reverse", "d.items()", "d.keys()", "d.values()", "l|map('string')",
           "namespace(a=1)", "99999999999999999999", "-5", "s|safe", "dict(a=1)", "[1, 2.0]", "'%s'", "true", "1e3"]

FILTERS = {
    "abs": [""], "attr": ["'a'", "'upper'", "0"], "batch": ["2", "2, 'x'"], "capitalize": [""], "center": ["", "9"], "count": [""],
    "default": ["", "'x'", "'x', true", "boolean=true"], "d": ["1"], "dictsort": ["", "true", "by='value'", "false, 'key', true"],
    "escape": [""], "e": [""], "filesizeformat": ["", "true"], "first": [""], "float": ["", "1.5"], "forceescape": [""],
    "format": ["1", "'a'", "1.5, 2"], "groupby": ["'n'", "'n', default='z'"], "indent": ["", "2", "2, true", "'> '", "first=true, blank=true"],
    "int": ["", "5", "0, 16", "base=2"], "items": [""], "join": ["", "', '", "attribute='n'", "'-', 'v'"], "last": [""], "length": [""],
    "list": [""], "lower": [""], "map": ["'upper'", "attribute='n'", "attribute=0", "'default', 'x'", "attribute='zz', default=5"],
    "max": ["", "attribute='v'"], "min": ["", "case_sensitive=true"], "pprint": [""], "reject": ["'none'", ""], "rejectattr": ["'v'", "'v', 'eq', 1"],
    "replace": ["'a', 'b'", "'', '-'", "'l', 'L', 1", "1, 2"], "reverse": [""], "round": ["", "1", "1, 'floor'", "-1", "method='ceil'"],
    "safe": [""], "select": ["", "'string'", "'gt', 1"], "selectattr": ["'v'", "'v', 'gt', 1", "'zz', 'defined'", "'c.x'"],
    "slice": ["2", "2, 'x'"], "sort": ["", "true", "attribute='n'", "case_sensitive=true"], "string": [""], "striptags": [""],
    "sum": ["", "start=5", "attribute='v'"], "title": [""], "tojson": ["", "indent=2", "sort_keys=true", "ensure_ascii=true", "2", "separators=(',', ':')"],
    "trim": ["", "'ab'", "chars=' '"], "truncate": ["5", "5, true", "7, true, '', 0", "5, leeway=0"], "unique": ["", "true", "attribute='n'"],
    "upper": [""], "urlencode": [""], "urlize": [""], "wordcount": [""], "wordwrap": ["5", "5, false", "3, true, '|'"], "xmlattr": ["", "false"],
}
TESTS = ["boolean", "callable", "defined", "divisibleby 2", "divisibleby 0", "eq 1", "equalto 'abc'", "escaped", "even", "false", "filter", "float",
         "ge 2", "gt 2", "greaterthan 1", "in [1, 'abc', none]", "in 'xabcx'", "in d", "integer", "iterable", "le 2", "lessthan 3", "lower", "lt 'b'",
         "mapping", "ne none", "none", "number", "odd", "sameas none", "sameas true", "sequence", "string", "test", "true", "undefined", "upper"]
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", ">=", "in", "not in", "and", "or"]
OPERANDS = ["none", "tr", "zero", "i", "neg", "big", "f", "one", "half", "nf", "tiny", "huge", "empty", "w", "n", "e", "l", "m", "em", "d", "undef", "(1, 2)", "'%s'"]
STRING_METHODS = {
    "capitalize": [""], "casefold": [""], "center": ["9", "9, '*'", "2"], "count": ["'l'", "''", "'l', 3", "'l', 1, 4"], "encode": [""], "endswith": ["'c'", "('x', 'c')", "'b', 0, 2", "''"],
    "expandtabs": ["", "4"], "find": ["'l'", "'zz'", "''", "'o', 5", "'o', -3"], "format": ["1", "a=2", ""], "index": ["'l'", "'zz'"], "isalnum": [""], "isalpha": [""],
    "isascii": [""], "isdecimal": [""], "isdigit": [""], "isidentifier": [""], "islower": [""], "isnumeric": [""], "isprintable": [""], "isspace": [""], "istitle": [""],
    "isupper": [""], "join": ["['x', 'y']", "'xyz'", "[1]", "d", "m|map('upper')"], "ljust": ["9", "9, '.'"], "lower": [""], "lstrip": ["", "'a '", "none"], "partition": ["','", "' '", "''"],
    "removeprefix": ["'a'", "''"], "removesuffix": ["'c'", "''"], "replace": ["'l', 'L'", "'', '-'", "'l', 'L', 1", "'l', 'L', -1", "'l', 'L', count=1"], "rfind": ["'l'", "''"], "rindex": ["'l'"],
    "rjust": ["9", "9, '.'"], "rpartition": ["','"], "rsplit": ["", "','", "none, 1", "',', 1", "maxsplit=1"], "rstrip": ["", "'\\n'", "'c'"],
    "split": ["", "','", "',', 1", "none, 1", "sep=','", "'l', maxsplit=1", "''", "' '"], "splitlines": ["", "true"], "startswith": ["'a'", "('x', 'a')", "'b', 1", "''"],
    "strip": ["", "'ac'", "none", "''"], "swapcase": [""], "title": [""], "translate": ["{97: 'x'}"], "upper": [""], "zfill": ["6", "1"], "nomethod": [""],
}
LIST_METHODS = {"append": ["4"], "clear": [""], "copy": [""], "count": ["1", "'a'"], "extend": ["[1]"], "index": ["1", "9", "2, 1"], "insert": ["0, 1"], "pop": ["", "0"],
                "remove": ["1"], "reverse": [""], "sort": [""], "items": [""], "get": ["0"]}
DICT_METHODS = {"clear": [""], "copy": [""], "fromkeys": ["['a']"], "get": ["'a'", "'zz'", "'zz', 5", "key='a'", "none", "1"], "items": [""], "keys": [""], "pop": ["'a'"], "popitem": [""],
                "setdefault": ["'a', 1"], "update": ["{'a': 1}"], "values": [""], "nokey": [""]}
SUBSCRIPTS = ["[0]", "[-1]", "[9]", "['a']", "['zz']", "[none]", "[true]", "[1.0]", "[1:]", "[:-1]", "[::2]", "[::-1]", "[-2:]", "[9:]", "[:0]", "[2:1]", "[none:1]", "[1:none:2]", ".a", ".b", ".zz", ".0", ".x.y", ".items", ".keys()", ".__class__", "[0][0]", ".a.b"]

SHOWN = ["{{ %s }}", "{{ (%s) is none }}|{{ (%s) is string }}", "{{ [%s] }}", "{{ (%s)|tojson }}", "{{ (%s) ~ '' }}|{{ 'y' if (%s) else 'n' }}",
         "{%% for x in %s %%}<{{ x }}{{ loop.index }}>{%% else %%}none{%% endfor %%}", "{%% set v = %s %%}{{ v }}"]


# Whole templates: control of white space and of loops, macros, namespaces, scopes.
PIECES = ["a", "\n", "  ", "\t", "{% if true %}", "{%- if tr -%}", "{% endif %}", "{%- endif %}", "{{ i }}", "{{- i }}", "{{ i -}}", "{# c #}", "{#- c -#}",
          "{%+ if true %}", "{% for x in l %}", "{% endfor %}", "{%- endfor -%}", "{% set y = 1 %}", "{%- set y = 2 -%}", "{% raw %}r{% endraw %}", "\r\n"]
WHOLE = [
    "{% for x in l %}{{ loop.cycle('a', 'b') }}{{ loop.depth }}{{ loop.depth0 }}{{ loop.revindex0 }}{{ loop.changed(x) }}{% endfor %}",
    "{% for x in l if x > 1 %}{{ loop.index }}/{{ loop.length }}{% else %}e{% endfor %}",
    "{% for x in l if x > 9 %}{{ x }}{% else %}e{% endfor %}",
    "{% for a, b in ll %}{{ a }}{{ b }}{% endfor %}", "{% for (a, b) in ll %}{{ a }}{{ b }}{% endfor %}",
    "{% for k, v in d|dictsort %}{{ k }}={{ v }}{% endfor %}",
    "{% for x in ll recursive %}{% if x is iterable %}[{{ loop(x) }}]{% else %}{{ x }}{{ loop.depth }}{% endif %}{% endfor %}",
    "{% for x in l %}{% for y in l %}{% if y == 1 %}{% break %}{% endif %}{{ x }}{{ y }}{% endfor %}{% endfor %}",
    "{% for x in l %}{% if loop.first %}{% continue %}{% endif %}{{ loop.previtem }}-{{ x }}-{{ loop.nextitem }};{% endfor %}",
    "{% set x = 1 %}{% for y in l %}{% set x = y %}{% endfor %}{{ x }}", "{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}",
    "{% for x in l %}{% endfor %}{{ x is defined }}", "{% for x in 5 %}{% endfor %}", "{% for x in none %}a{% endfor %}", "{% for x in undef %}a{% else %}b{% endfor %}",
    "{% for x in 'abc' %}{{ x }}{% endfor %}", "{% for x in d %}{{ x }}{% endfor %}", "{% for x in range(2, 8, 3) %}{{ x }}{% endfor %}", "{{ range(3)|list }}{{ range(5, 2, -1)|list }}", "{{ range(3) }}",
    "{% macro f(a, b=2, *rest) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}", "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, 3, c=4) }}",
    "{% macro f(a) %}{{ a }}{% endmacro %}{{ f() }}|{{ f(a=1) }}|{{ f(1, 2) }}", "{% macro f(a) %}{{ a }}{% endmacro %}{{ f(b=1) }}", "{% macro f() %}{{ varargs|join(',') }}{% endmacro %}{{ f(1, 2) }}",
    "{% macro f() %}{{ kwargs }}{% endmacro %}{{ f(a=2) }}", "{% macro f(x) %}{{ x|upper }}{% endmacro %}{{ f('a') ~ f('b') }}{{ f('c')|lower }}{{ f.name }}{{ f.arguments }}",
    "{% macro f(x) %}{% if x %}{{ x }}{{ f(x[1:]) }}{% endif %}{% endmacro %}{{ f('abc') }}", "{% macro f(x) %}{{ i }}{{ x }}{% endmacro %}{% set i = 9 %}{{ f(1) }}",
    "{% set z = 5 %}{% macro f() %}{{ z }}{% endmacro %}{% for x in l %}{% set z = x %}{{ f() }}{% endfor %}", "{{ f() }}{% macro f() %}x{% endmacro %}",
    "{% macro w() %}[{{ caller() }}]{% endmacro %}{% call w() %}in{{ i }}{% endcall %}", "{% macro w(a) %}{{ caller(a, 2) }}{% endmacro %}{% call(x, y=3) w(1) %}{{ x }}{{ y }}{% endcall %}",
    "{% set ns = namespace(a=1) %}{% set ns.b = 2 %}{{ ns.a }}{{ ns.b }}{{ ns.c is defined }}", "{% set ns = namespace() %}{% for x in l %}{% set ns.x = x %}{% endfor %}{{ ns.x }}", "{% set ns = namespace(d) %}{{ ns.a }}",
    "{% set ns = namespace({'a': 5}, b=6) %}{{ ns.a }}{{ ns.b }}", "{% set d.a = 1 %}", "{% set a, b = 1, 2 %}{{ a }}{{ b }}", "{% set a, b = (1, 2) %}{{ b }}", "{% set x %}a{{ i }}b{% endset %}{{ x }}{{ x|length }}",
    "{% set x | upper %}ab{% endset %}{{ x }}", "{% filter upper %}a{{ w }}{% endfilter %}", "{% filter replace('a', 'b') %}abc{% endfilter %}", "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a is defined }}",
    "{% with a = 1 %}{% set a = 2 %}{{ a }}{% endwith %}", "{% if undef %}a{% elif i == 7 %}b{% else %}c{% endif %}", "{% if not undef and 'x' %}a{% endif %}", "{{ 'a' if i > 3 }}{{ 'b' if i > 9 }}|",
    "{{ ('b' if i > 9) is undefined }}", "{{ ('b' if i > 9)|default('z') }}", "{{ 1 if tr else 2 if fa else 3 }}", "{% block a %}x{% endblock %}", "{% do l.append(1) %}", "{% autoescape true %}{{ h }}{% endautoescape %}", "{% include 'x' %}",
    "{{ undef.a }}", "{{ d.zz.yy }}", "{{ undef() }}", "{{ undef[0] }}", "{{ undef + 1 }}", "{{ undef|upper }}|{{ undef|list }}|{{ undef|length }}", "{{ -undef }}", "{{ undef == none }}{{ undef != undef }}{{ undef in l }}",
    "{{ loop.index }}", "{{ self }}", "{{ super() }}", "{{ cycler('a', 'b').next() }}", "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{{ c.reset() }}", "{% set j = joiner('|') %}{{ j() }}{{ j() }}", "{{ lipsum is callable }}", "{{ dict(a=1, b=2) }}{{ dict([['a', 1]]) }}{{ dict(d, z=1) }}",
    "{{ raise_exception('x') }}", "{{ raise_exception() }}", "{{ strftime_now('%Y-%m-%d') }}", "{{ strftime_now('%-d %b %y %j %U') }}", "{{ strftime_now('%A %a %B %e %p %I %%') }}", "{{ strftime_now('%q') }}", "{{ strftime_now('') }}", "{{ strftime_now('%D %F %h %n %t %u %w %G %V %C %y %s')|length > 5 }}",
    "{{ strftime_now('%c|%x|%X')|length }}", "{{ strftime_now('%k|%l|%P|%r|%R|%T')|length }}", "{{ strftime_now('100% sure') }}", "{{ strftime_now('a%') }}", "{{ strftime_now('%10d|%_d|%05d|%^a|%#a|%:z|%Ex|%Od')|length }}",
    "{{ messages }}", "{{ messages|length }}", "{{ tools }}", "{{ documents }}", "{{ add_generation_prompt }}", "{{ bos_token is defined }}", "{{ not i }}{{ not not i }}{{ not (i == 7) }}", "{{ i is not none }}{{ not i is none }}", "{{ i is divisibleby(7) and i is odd }}",
    "{{ 'a' 'b' }}", "{{ 'a'\n'b' }}", "{{ (1, 2) + (3,) }}", "{{ [1] + [2] * 2 }}", "{{ 2 ** 3 ** 2 }}", "{{ -2 ** 2 }}", "{{ (-2) ** 2 }}", "{{ 7 // 2 * 2 }}", "{{ 7 % 4 ** 2 }}", "{{ 1 - -1 }}", "{{ +1 }}", "{{ 0x1F }}{{ 0b11 }}{{ 0o17 }}", "{{ 1_000.5 }}", "{{ 1.e3 }}", "{{ .5 }}", "{{ 1.5e+3 }}", "{{ 1E3 }}",
    "{{ 2 ** 100 }}", "{{ 2 ** 0.5 }}", "{{ 10 ** 20 }}", "{{ big * big }}", "{{ 7 / 0 }}", "{{ 7 % 0 }}", "{{ 7.0 // 0 }}", "{{ 0.1 + 0.2 }}", "{{ 1e308 * 10 }}", "{{ -1e308 * 10 }}", "{{ 5 // 0.3 }}", "{{ -7 // 2.0 }}", "{{ -7 % 2.5 }}", "{{ 7 % -3 }}", "{{ 7 // -3 }}", "{{ 1e15 + 0.3 }}", "{{ 100000000000000000.0 }}", "{{ 1e22|int }}", "{{ 1.5|int }}{{ -1.5|int }}", "{{ 123456789 * 1.0 }}",
    "{{ 1 == true }}{{ 1.0 == true }}{{ '1' == 1 }}", "{{ [1, 2] == (1, 2) }}{{ [1] == [1.0] }}", "{{ {'a': 1} == {'a': 1.0} }}", "{{ [1, 2] < [1, 3] }}", "{{ (1, 2) < (1, 3) }}", "{{ 'B' < 'a' }}{{ 'ä' > 'z' }}", "{{ none < 1 }}", "{{ 'a' < 1 }}", "{{ 1 < 2 < 3 }}{{ 1 < 3 < 2 }}{{ 3 > 2 == 2 }}", "{{ 1 in [1.0] }}{{ true in [1] }}{{ '1' in [1] }}", "{{ 'b' in 'abc' and 'a' not in 'bc' }}", "{{ 1 in 'a' }}", "{{ none in 'a' }}", "{{ undef in 'a' }}", "{{ 1 in 5 }}", "{{ 'a' in undef }}",
    "{{ {1: 'a', 2.0: 'b', true: 'c', none: 'd', (1, 2): 'e'} }}", "{{ {'a': 1, 'a': 2} }}", "{{ {'a': 1}['a'] }}{{ {1: 2}[1] }}{{ {1: 2}[1.0] }}", "{{ [1, [2, {'a': [none, true]}]] }}", "{{ ['a\\'b', \"c\\\"d\", 'e\\nf', 'g\\\\h'] }}", "{{ '\\u00e9\\x41\\101\\N{BULLET}' }}", "{{ 'a\\\nb' }}", "{{ '\\q' }}", "{{ '\\0' }}", "{{ '\\a\\b\\f\\v'|length }}", "{{ ['\\x7f\\xa0\\u200b\\ue000\\U0001f44d\\u0300'] }}",
    "{{ \"}}\" }}{{ '%}' }}{{ '#}' }}", "{{ '{{' }}{{ '{%' }}", "{ { i } }", "{{i}}{%if tr%}x{%endif%}", "{%if(tr)%}x{%endif%}", "{{ i }", "{{ i }}}", "{{{'a': 1}}}", "{{ {'a': {'b': 1}}}}", "{% if tr %}", "{% endif %}", "{% if %}{% endif %}", "{# {{ i }} #}", "{# unclosed", "{{# c #}}", "{{ i # c\n }}", "## line\n# line\n{{ i }}",
    "{{ x.y.z }}", "{{ s|trim|length }}", "{{ (s|trim)[0] }}", "{{ s.strip()[0] }}", "{{ s|trim[0] }}", "{{ l|first|string }}", "{{ -l|first }}", "{{ l|map('string')|list|join }}", "{{ l|select|list }}", "{{ ds|map('attr', 'n')|list }}", "{{ ds|map(attribute='n')|unique|sort|join }}", "{{ ds|groupby('n')|list }}", "{% for g in ds|groupby('n') %}{{ g.grouper }}{{ g.list|length }}{{ g[0] }}{% endfor %}", "{{ l|batch(2)|list }}{{ l|slice(2)|list }}", "{{ l|sort|first }}{{ m|sort|join }}", "{{ mixed|sort }}", "{{ mixed|max }}", "{{ l|random is number }}", "{{ d|dictsort|first }}", "{{ d|tojson(indent=4) }}", "{{ mixed|tojson(indent=1) }}", "{{ (1, 2)|tojson }}", "{{ undef|tojson }}", "{{ range(2)|tojson }}", "{{ l|map('string')|tojson }}", "{{ d.keys()|tojson }}", "{{ namespace(a=1)|tojson }}", "{{ d|tojson(separators=[',', ':']) }}", "{{ d|tojson(separators=(',', ':'), indent=1) }}", "{{ d|tojson(true) }}", "{{ d|tojson(ensure_ascii=none) }}", "{{ {'ä': 'ö'}|tojson(ensure_ascii=true) }}", "{{ {'b': 1, 'a': {'d': 1, 'c': 2}}|tojson(sort_keys=true) }}", "{{ {1: 1, 'a': 2}|tojson(sort_keys=true) }}", "{{ {(1, 2): 1}|tojson }}", "{{ {1.5: 1, true: 2, none: 3}|tojson }}", "{{ ''|tojson(indent=none) }}", "{{ d|tojson(default=1) }}", "{{ d|tojson(foo=1) }}", "{{ '</script>'|tojson }}", "{{ 1e400|tojson }}", "{{ '\\u007f\\u0080\\ud800'|tojson }}",
    "{{ '%s is %d' % ('a', 5) }}", "{{ '%s' % 'a' }}", "{{ '%.2f' % 3.14159 }}", "{{ '%5s|%-5s|' % ('a', 'b') }}", "{{ '%05d' % 42 }}", "{{ '%x %X %o' % (255, 255, 8) }}", "{{ '%%' % () }}", "{{ '%(a)s' % {'a': 1} }}", "{{ '%s' % l }}", "{{ '%r' % 'a' }}", "{{ '%s' % none }}", "{{ '%d' % 'a' }}", "{{ '%s %s' % 'a' }}", "{{ '%e' % 12345.678 }}", "{{ '%g' % 1e-5 }}", "{{ '%c' % 'a' }}", "{{ '%+d' % 5 }}",
    "{{ '%s is %d'|format('a', 5) }}", "{{ '%(a)s'|format(a=1) }}", "{{ '{0} {1}'.format(1, 2) }}", "{{ '{a.b}'.format(a={'b': 1}) }}", "{{ '{0[a]}'.format({'a': 1}) }}", "{{ '{:,}'.format(1234567) }}", "{{ '{:.3f}'.format(2) }}", "{{ '{:08.3f}'.format(3.14159) }}", "{{ '{:<6}|{:^6}|{:>6}'.format('a', 'b', 'c') }}", "{{ '{!r}'.format('a') }}", "{{ '{{}}'.format() }}", "{{ '{:%}'.format(0.5) }}", "{{ '{:b}'.format(5) }}", "{{ '{}'.format(1e-7) }}", "{{ '{}'.format(none) }}", "{{ '{}'.format(l) }}", "{{ '{:*^9}'.format('x') }}", "{{ '{:+.1e}'.format(12345.678) }}", "{{ '{:d}'.format(5.0) }}", "{{ '{} {}'.format(1) }}",
    "{{ 'a b c'.split()[1:]|join('-') }}", "{{ 'a' * 3 }}{{ 3 * 'a' }}{{ 'a' * 0 }}{{ 'a' * -1 }}", "{{ l * 2 }}", "{{ 'a' + 'b' ~ 'c' }}", "{{ 1 ~ 2 + 3 }}", "{{ 'a' ~ undef ~ 'b' }}", "{{ 'abc'|list|reverse|join }}", "{{ 'a-b_c'|title }}", "{{ 'ﬁ'|upper }}{{ 'İ'|lower }}{{ 'ΑΣ'|lower }}", "{{ 'hello wOrld'|capitalize }}", "{{ 'a\u00a0b\u2028c'.split() }}", "{{ '\u00a0a\u2003'|trim }}|", "{{ '\x1ca\x1f'.strip() }}|", "{{ 'a\\r\\nb\\x0bc\\x0cd\\x1ce\\x85f\\u2028g'.splitlines() }}", "{{ 'x'.join(l) }}", "{{ 'x'.join('abc') }}", "{{ ','.join(d) }}", "{{ ','.join(d.keys()) }}", "{{ ','.join(m|map('lower')) }}",
    "{% for m in messages %}{{ m.role }}:{{ m['content'] }}{% if not loop.last %}\n{% endif %}{% endfor %}", "{{ messages[0]['role'] ~ messages[-1].role }}", "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ rest|length }}", "{{ messages|selectattr('role', 'equalto', 'user')|list|last|tojson }}", "{{ messages|map(attribute='role')|list }}", "{{ messages|rejectattr('role', 'eq', 'system')|map(attribute='content')|join('|') }}", "{{ (messages|selectattr('role', 'in', ['user'])|first).content }}", "{{ messages|first|items|list }}", "{{ messages[0].items()|list }}", "{{ messages[0].get('x', 'y') }}", "{{ messages[0].content.strip() }}", "{{ messages[5] }}", "{{ messages[5].role }}", "{{ messages[0].foo.bar }}", "{{ messages[0]['foo'] is defined and messages[0]['foo'] }}",
]


def cases():
    """Every template of the grid, each once."""
    names = list(VALUES) + WRITTEN
    plain = lambda name, method, arguments: f"{name}{method}({arguments})" if arguments or "|" not in method else f"{name}{method}"
    expressions = []
    for name in names:
        value = name if name.isidentifier() or name.startswith(("(", "[", "'")) else f"({name})"
        expressions.append(value)
        for filter, lists in FILTERS.items():
            for arguments in lists:
                call = f"({arguments})" if arguments else ""
                expressions.append(f"{value}|{filter}{call}")
                if filter in ("batch", "slice", "map", "select", "reject", "selectattr", "rejectattr", "unique", "reverse", "items", "groupby"):
                    expressions.append(f"{value}|{filter}{call}|list")
        expressions += [f"{value} is {test}" for test in TESTS]
        expressions += [f"{value}{subscript}" for subscript in SUBSCRIPTS]
    for methods, receivers in (
        (STRING_METHODS, ["empty", "s", "w", "q", "t", "u", "n", "nn", "'hello'", "'Hello, World'", "'\\t\\n'", "i", "none", "l"]),
        (LIST_METHODS, ["l", "e", "mixed", "(1, 2)", "w"]),
        (DICT_METHODS, ["d", "em", "ds[0]", "namespace(a=1)"]),
    ):
        for receiver in receivers:
            for method, lists in methods.items():
                expressions += [f"{receiver}.{method}({arguments})" for arguments in lists]
                expressions.append(f"{receiver}.{method} is defined")
    # Python would compute numbers of more digits than memory holds.
    vast = lambda op, *sides: op in ("*", "**") and any(side in ("big", "huge") for side in sides)
    pairs = [(a, op, b) for op in OPERATORS for a in OPERANDS for b in OPERANDS]
    expressions += [f"{a} {op} {b}" for a, op, b in pairs if not vast(op, a, b)]
    expressions += [f"{sign}{a}" for sign in ("-", "+", "not ") for a in OPERANDS]
    found = ["{{ %s }}" % expression for expression in expressions]
    for name in names:
        found += [shape.replace("%s", name).replace("%%", "%") for shape in SHOWN]
    found += WHOLE
    for a in PIECES:
        for b in PIECES:
            for c in ("", "\n", "x\n ", " \n"):
                text = a + c + b
                opens = sum(text.count(x) for x in ("if t", "for x"))
                closes = [p for p in ("{% endif %}", "{% endfor %}") if p in text]
                if not closes and opens:
                    order = sorted((text.find(x), end) for x, end in (("if true", "{% endif %}"), ("if tr ", "{% endif %}"), ("for x", "{% endfor %}")) if x in text)
                    text += "\nz" + "".join(end for _, end in reversed(order)) + "\nq"
                elif closes and not opens:
                    text = ("{% if true %}" if "endif" in text else "{% for x in l %}") + text
                found.append(text + c + "b")
    return list(dict.fromkeys(found))
