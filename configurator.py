"""Config files and `--key=value` overrides, turned into typed dataclasses.

    python train.py config/reflow_nano.py --max_steps=200 --device=cpu

A config file holds `name = expression` lines. It is parsed, never executed: a stranger's file is data. Keys
are flat and each belongs to one dataclass. A later setting wins over an earlier one, the command line over
every file. `--key value` and, for booleans, `--key` alone are understood too. `--help` prints every field
with the comment that trails it.
"""

import ast
import errno
import inspect
import json
import math
import os
import re
import sys
import textwrap
import time
import traceback
from contextlib import suppress
from dataclasses import MISSING, fields
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints


class UserError(Exception):
    """A user's mistake in one line: where, what is wrong, what to do. `run` prints it without a traceback."""


def parse(*dataclasses, argv=None, default_config=None, saved=None):
    """Return a tuple of one instance per dataclass, from config files and `--key=value` arguments.

    `argv` defaults to `sys.argv[1:]`; `default_config` is read when that names no file. `saved`, a
    function of the settings so far, {key: value}, may answer with those of an earlier run, to take the place
    of the defaults; its keys of another version are left out. Raises UserError.
    """
    kinds = {}
    for cls in dataclasses:
        hints = get_type_hints(cls)
        for field in fields(cls):
            assert key(field) not in kinds, f"{field.name} is a field of two dataclasses"
            kinds[key(field)] = hints[field.name]

    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print_help(sys.modules["__main__"].__doc__, dataclasses)
        sys.stdout.flush()
        raise SystemExit(0)
    files, overrides = read_arguments(argv, kinds)
    overrides = typed(overrides, kinds)  # first: a mistyped argument is news before the contents of a file
    values = {}
    for path in files:
        values |= typed(read_file(path), kinds)
    values |= overrides
    defaults = typed(read_file(default_config), kinds) if default_config and not files else {}
    if earlier := saved(defaults | values) if saved else None:
        settings = [("the run's own settings", k, v) for k, v in earlier.items() if k in kinds]
        defaults = typed(settings, kinds)
    values = defaults | values

    required = (key(f) for cls in dataclasses for f in fields(cls) if default(f) is MISSING)
    if missing := [name for name in required if name not in values]:
        example = default_config or "config/reflow_nano.py"
        raise UserError(f"missing {', '.join(missing)}: name a config file, for example {example}")
    arguments = [{f.name: values[key(f)] for f in fields(cls) if key(f) in values} for cls in dataclasses]
    try:
        return tuple(cls(**kwargs) for cls, kwargs in zip(dataclasses, arguments, strict=True))
    except ValueError as error:  # from a __post_init__: each value is fine, their combination is not
        raise UserError(str(error)) from error


def read_arguments(argv, kinds):
    """Split arguments into config files and (where, key, text) settings."""
    files, settings = [], []
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        key, equals, text = argument.lstrip("-").partition("=")
        following = arguments[0] if arguments else ""
        if not argument.startswith("-") and (not equals or argument.endswith(".py")):
            files.append(argument)
            continue
        if not argument.startswith("--"):
            raise UserError(f"command line: {argument} is not --key=value: write --{key}={text or '...'}")
        if not equals:
            is_flag = kinds.get(key, bool) is bool
            if is_flag and following.lower() not in BOOLS:
                text = "true"
            elif not following or following.startswith("--"):
                raise UserError(f"command line: --{key} needs a value: write --{key}=...")
            else:
                text = arguments.pop(0)
        settings.append(("command line", key, text))
    return files, settings


# What a config file may compute with: no call, attribute or subscript, so nothing reaches outside the file.
ARITHMETIC = (
    *(ast.Constant, ast.Name, ast.expr_context, ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator),
    *(ast.BoolOp, ast.boolop, ast.Compare, ast.cmpop, ast.IfExp, ast.JoinedStr, ast.FormattedValue),
)


def is_arithmetic(expression):
    return all(isinstance(node, ARITHMETIC) for node in ast.walk(expression))


def read_file(path):
    """Return the (where, key, value) settings of a config file; names starting with `_` stay local to it."""
    path = Path(path)
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except OSError:
        # Its own folder and config/, so that a bare `reflow_nano` finds its file too.
        files = {file.name: file for folder in (Path("config"), path.parent) for file in folder.glob("*.py")}
        hint = "".join(f": did you mean {files[name]}?" for name in get_close_matches(path.name, files, n=1))
        if path.is_dir():
            hint = f": a run's folder is given as --run={path}"
        raise UserError(f"no config file {path}{hint}") from None
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a Python text file: {error}") from None

    settings, names = [], {}
    for i, statement in enumerate(body):
        where = f"{path}:{statement.lineno}"
        match statement:
            case ast.Expr(ast.Constant(str())) if i == 0:
                continue
            case ast.Assign([ast.Name(key)], value) if is_arithmetic(value):
                pass
            case _:
                raise UserError(f"{where}: a config file holds only `name = value`, with plain arithmetic")
        try:
            names[key] = eval(compile(ast.Expression(value), where, "eval"), {"__builtins__": {}}, names)
        except Exception as error:
            raise UserError(f"{where}: {error}") from None
        if not key.startswith("_"):
            settings.append((where, key, names[key]))
    return settings


def typed(settings, kinds):
    """Turn (where, key, value) settings into {key: value of the field's type}; the last of a key wins."""
    values = {}
    for where, key, value in settings:
        if key not in kinds:
            nearest = get_close_matches(key, kinds, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see --help"
            raise UserError(f"{where}: unknown key {key}: {hint}")
        try:
            values[key] = convert(value, kinds[key])
        except ValueError as error:
            raise UserError(f"{where}: {key}={value}: expected {error}") from None
    return values


def check(config, *rules):
    """Raise ValueError for the first of `rules` that does not hold: comparisons such as "0 <= beta1 < 1".

    Their names are fields of `config`. A rule about a field that is None holds. For __post_init__.
    """
    for rule in rules:
        code = compile(rule, rule, "eval")
        values = {name: getattr(config, name) for name in code.co_names}
        if None not in values.values() and not eval(code, {"__builtins__": {}}, values):
            given = " and ".join(f"{name}={value}" for name, value in values.items())
            raise ValueError(f"{given}: must satisfy {rule}")


SEED = "0 <= seed < 2**31"  # a rule for `check`: what torch, numpy and scikit-learn take


BOOLS = {"true": True, "false": False, "1": True, "0": False}
EXPECTED = {int: "an int", float: "a finite float", bool: "true or false", str: "a string", NoneType: "None"}


def convert(value, kind):
    """Return `value`, text from the command line or an object from a config file, as a `kind`.

    `kind` is int, float, bool, str, None, a Literal or a union of these. ValueError says what was expected.
    A float is finite, an int fits into 64 bits.
    """
    if get_origin(kind) in (Union, UnionType):
        expected = []
        for member in sorted(get_args(kind), key=lambda k: k is not NoneType):  # "None" is a str, too
            try:
                return convert(value, member)
            except ValueError as error:
                expected.insert(0, str(error))
        raise ValueError(" or ".join(expected))
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if value in (choice, str(choice)):
                return choice
        raise ValueError("one of " + ", ".join(map(str, get_args(kind))))
    if kind is NoneType and value in (None, "None"):
        return None
    if kind is bool and str(value).lower() in BOOLS:
        return BOOLS[str(value).lower()]
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float) and type(value) in (int, float, str):  # a bool is not a number here
        with suppress(ValueError, ArithmeticError):
            number = Decimal(value)  # exact where a float is not, and `1e3` is an int, too
            if kind is float and math.isfinite(float(value)):
                return float(value)
            if kind is int and abs(number) < 2**63 and number == int(number):
                return int(number)
    raise ValueError(EXPECTED[kind])


def key(field):
    """A field's name on the command line and in files: without the `_` that a word of Python's own needs."""
    return field.name.rstrip("_")


def default(field):
    """The default of a dataclass field, MISSING if it is required."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def differences(*instances):
    """Return {key: value} for the fields that differ from their defaults; required fields always do."""
    values = ((f, getattr(x, f.name)) for x in instances for f in fields(x))
    return {key(f): value for f, value in values if value != default(f)}


def describe(*instances):
    """Return `differences` as text, one line per dataclass, in the spelling of the command line."""
    lines = []
    for instance in instances:
        settings = [f"--{key}={value}" for key, value in differences(instance).items()]
        lines.append(f"{type(instance).__name__}: {' '.join(settings) or 'defaults'}")
    return "\n".join(lines)


def print_help(doc, dataclasses):
    """Print a script's question, two examples and its options; the rest of its docstring comes last."""
    question, examples, rest = read_docstring(doc or "")
    print(question)
    if examples:
        print("\n" + "\n".join(examples[:2]))
    for cls in dataclasses:
        rows = options(cls)
        print(f"\n{cls.__name__}")
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:3]
        for *cells, comment in rows:
            left = "  " + "".join(f"{cell:{width}}  " for cell, width in zip(cells, widths, strict=True))
            width = max(110, len(left) + 40)
            print(textwrap.fill(left + comment, width, subsequent_indent=" " * len(left)).rstrip())
    if examples[2:]:
        print("\nMore examples\n" + "\n".join(examples[2:]))
    if rest:
        print("\n" + rest)


def read_docstring(doc):
    """(question, example lines, the rest) of a script's docstring.

    Its first paragraph asks, its first indented paragraph shows commands.
    """
    paragraphs = inspect.cleandoc(doc).split("\n\n")
    at = next((i for i, paragraph in enumerate(paragraphs) if paragraph.startswith("    ")), None)
    if at is None:
        return paragraphs[0], [], "\n\n".join(paragraphs[1:])
    return paragraphs[0], paragraphs[at].split("\n"), "\n\n".join(paragraphs[1:at] + paragraphs[at + 1 :])


def options(cls):
    """[(--field, type, default, comment)] of a dataclass, in the spelling of its source: 6e-4, not 0.0006."""
    source = inspect.cleandoc(inspect.getsource(cls))
    lines = source.splitlines()
    rows = []
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        initial = ast.get_source_segment(source, node.value) if node.value else "required"
        comment = lines[node.end_lineno - 1][node.end_col_offset :].strip().removeprefix("#").strip()
        rows.append((f"--{node.target.id.rstrip('_')}", ast.unparse(node.annotation), initial, comment))
    return rows


REMEDIES = {  # what to do about an error of the operating system
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "free some space, or write elsewhere",
    (errno.EACCES, errno.EPERM, errno.EROFS): "change its permissions, or name another place",
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY): "name another place",
}
NO_MEMORY = r"allocate memory|not enough memory|bad_alloc"  # a RuntimeError of torch says one of these


def explain(error):
    """One line (where, what, what to do) for an error that the machine made, None for any other.

    Such are an OSError and memory that ran out.
    """
    kind, text = type(error).__name__, " ".join(str(error).split())
    if (
        isinstance(error, MemoryError)
        or kind == "OutOfMemoryError"  # torch's, on a GPU
        or (isinstance(error, RuntimeError) and re.search(NO_MEMORY, text))
    ):
        return f"out of memory: {text or kind}: take smaller batches or a smaller model"
    if not isinstance(error, OSError):
        return None
    where = error.filename2 or error.filename
    if where is None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}:{last.lineno}"
    what = os.strerror(error.errno) if error.errno else text or kind
    remedy = next((remedy for numbers, remedy in REMEDIES.items() if error.errno in numbers), "try again")
    return f"{where}: {what}: {remedy}"


def run(main):
    """Call `main()` as a script's last line.

    A mistake of the user's or an error of the machine's is one line on stderr and exit status 2; a bug of the
    program keeps its traceback. Characters that stdout cannot encode are written as \\u2019. Lines are
    written as they end, so that a log file shows how far a long run is.
    """
    with suppress(AttributeError):  # a stream of somebody's own
        # both as stderr does from the start
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
        sys.stdout.flush()  # here, not at interpreter exit, so that a closed pipe is caught below
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # `sample.py | head` is no error. The interpreter flushes stdout again as it exits: let that succeed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        line = error if isinstance(error, UserError) else explain(error)
        if line is None:
            raise
        rank = os.environ.get("RANK", "0")  # set by torchrun
        print(f"[rank {rank}] error: {line}" if rank != "0" else f"error: {line}", file=sys.stderr)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun ends its own long report with it
            reason = {"message": f"error: {line}", "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(report).write_text(json.dumps({"message": reason}), encoding="utf-8")
        sys.exit(2)
