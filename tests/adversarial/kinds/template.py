"""Chat templates of strangers give transformers' tokens, or an error that names the file."""

import random
import resource
from contextlib import contextmanager, nullcontext
from unittest import mock

from tests.adversarial.harness import Wrong
from tests.adversarial.kinds import _command, _model

from glm_fused.generation import chat
from glm_fused.loader import load

NAME = "template"
SLOW_CASES = 2000
SECONDS = 0.15  # here a template may run for so long
VALUES = [
    "messages", "messages[0]", "messages[0].content", "messages[-1]['role']", "messages[9]", "none",
    "undefined_name", "tools", "add_generation_prompt", "''", "'w1 w2'", "'\\ud800'", "0", "1.5",
    "10**400", "-1", "[]", "{}", "range(5)", "range(10**9)", "loop", "self", "super()", "dict()",
    "namespace(x=1)", "cycler(1, 2)", "''.__class__", "messages.__class__.__mro__",
    "bos_token", "eos_token", "true", "'x' * 10**16", "'%s' % 5", "(1, 2)", "joiner(' ')",
    "raise_exception('the template refuses')", "raise_exception()", "strftime_now('%Y')",
    "messages.append(1)", "messages[0].update({})", "2 ** 99999", "1 / 0", "1 // 0", "'a' + 1",
    "{}.x.y", "[][0][0]", "''.format(1)", "'{0.__class__}'.format(1)",
]  # fmt: skip
HARMLESS = ["messages", "messages[0].content", "'w1 w2'", "5", "bos_token", "true", "{'a': 1}"]
FILTERS = [
    "tojson", "length", "trim", "upper", "join(' ')", "first", "last", "sort", "list", "int",
    "map(attribute='content')", "nonesuch", "batch(0)", "slice(0)", "round(400)", "format(1, 2)",
    "replace('w', 'w')", "default('w3')", "selectattr('role')", "string", "abs", "sum", "dictsort",
    "indent(10**9)", "center(10**16)", "truncate(-1)", "wordwrap(0)", "unique", "xmlattr",
    "tojson(5)",
]  # fmt: skip
TESTS = ["defined", "string", "none", "mapping", "divisibleby 0", "nonesuch", "in 5", "sameas 1"]


def prepare(folder):
    """Make a tokenizer, whose template each case sets, and allow only a few GB of memory."""
    _model.write(folder / "good")
    prepare.tokenizer = load(folder / "good")[1]
    chat.SECONDS = SECONDS
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))


def expression(rng):
    """An expression of some value and some filters."""
    text = rng.choice(VALUES if rng.random() < 0.4 else HARMLESS)
    while rng.random() < 0.2:
        text = f"({text})|{rng.choice(FILTERS)}"
    if rng.random() < 0.15:
        text = f"({text}) {rng.choice('+-*/~%')} ({rng.choice(VALUES)})"
    return text


def block(rng, depth=0):
    """A piece of a template."""
    kind = rng.randrange(10 if depth < 3 else 3)
    inner = "" if kind < 3 else "".join(block(rng, depth + 1) for _ in range(rng.randrange(1, 3)))
    value = expression(rng)
    return [
        lambda: rng.choice(["w1 ", "w2", "w5\n"] * 5 + ["", "é", "\0", "{#", "{%", "}}", "{{"]),
        lambda: f"{{{{ {value} }}}}",
        lambda: f"{{{{ {value} }}}}",
        lambda: f"{{% for i in {value} %}}{inner}{{% endfor %}}",
        lambda: f"{{% for m in messages %}}w{depth} {{{{ m.content }}}}{inner}{{% endfor %}}",
        lambda: f"{{% if {value} is {rng.choice(TESTS)} %}}{inner}{{% else %}}w4{{% endif %}}",
        lambda: f"{{% set x = {value} %}}{inner}{{{{ x }}}}",
        lambda: f"{{% macro f(a) %}}{inner}{{{{ f(a) }}}}{{% endmacro %}}{{{{ f(1) }}}}",
        lambda: f"{{% for i in range(99999) %}}{inner}{{% endfor %}}",
        lambda: f"{{% {rng.choice(['include', 'import', 'extends', 'call', 'do'])} {value} %}}",
    ][kind]()


def template(rng):
    """A whole template, which sometimes is no text at all or is cut in two."""
    if rng.random() < 0.03:
        return rng.choice([5, True, [], {}, ["w1"], 1.5, "", b"w1"])
    text = "".join(block(rng) for _ in range(rng.randrange(1, 4)))
    return text[: rng.randrange(len(text) + 1)] if rng.random() < 0.1 else text


def through_command(folder, text):
    """Run the template from a file through the command line; returns the outcome."""
    bad = _model.clone(folder / "good", folder / "bad")
    (bad / "chat_template.jinja").write_text(text, errors="surrogatepass")
    command = ("generate", "--model", bad, "--prompt", "w7", "--max-tokens", 1)
    code, out, err = _command.run(*command)
    if code not in (0, 2) or (code == 2) != err.startswith("glm-fused: error: "):
        raise Wrong(f"exit code {code}: {out!r} {err!r}")
    if err.count("\n") > 1:
        raise Wrong(f"more than one line: {err!r}")
    return f"error: {err.strip()}" if code else "right"


def case(seed, folder):
    """Render one template, every twentieth time from a file."""
    rng = random.Random(seed)
    text = template(rng)
    if seed % 20 == 0 and isinstance(text, str):
        return through_command(folder, text)
    tokenizer = prepare.tokenizer
    tokenizer._tokenizer.chat_template = text
    prompt = rng.choice(["w7", "w1 w2 w3", "", "é" * 50])
    messages = [{"role": "user", "content": prompt}]
    try:
        tokens = chat.render(tokenizer, messages)
    except ValueError as error:
        if str(folder / "good") not in str(error):
            raise Wrong(f"{text!r}: no file is named: {error}") from error
        raise
    if tokens != list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)):
        raise Wrong(f"{text!r}: other tokens than transformers'")
    return "right"


@contextmanager
def planted():
    """Whatever a template raises goes on."""
    with mock.patch.object(chat, "foreign", lambda what: nullcontext()):
        yield
