"""Config files and `--key=value`: what wins, what a value may look like, and what a mistake prints."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import configurator
from configurator import UserError, parse

ROOT = Path(configurator.__file__).resolve().parent


@dataclass
class ModelConfig:
    n_layer: int
    n_kv_head: int | None = None
    vocab: Literal["factored", "topk", "dense"] = "factored"
    dropout: float = 0.0

    def __post_init__(self):
        if self.n_layer < 1:
            raise ValueError(f"n_layer={self.n_layer} must be at least 1")


@dataclass
class TrainConfig:
    max_steps: "int" = 100  # as under `from __future__ import annotations`
    compile: bool = False
    out: str = "out"
    init_from: str | None = None


def settings(*argv, **kwargs):
    """All fields of both configs in one dict."""
    model, train = parse(ModelConfig, TrainConfig, argv=argv, **kwargs)
    return vars(model) | vars(train)


def mistake(*argv, **kwargs):
    """The message of the error these arguments cause: one line, always."""
    with pytest.raises(UserError) as caught:
        settings(*argv, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a config file into a fresh working directory and return its relative name."""
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return name

    return write


# What wins


def test_keys_are_routed_to_their_dataclass():
    model, train = parse(ModelConfig, TrainConfig, argv=["--n_layer=2", "--max_steps=7"])
    assert model == ModelConfig(n_layer=2) and train == TrainConfig(max_steps=7)


def test_later_wins_and_the_command_line_wins_over_files(write):
    a = write("a.py", "n_layer = 1\nmax_steps = 1\nout = 'a'")
    b = write("b.py", "n_layer = 2\nmax_steps = 2")
    got = settings("--max_steps=3", a, b, "--max_steps=4")
    assert (got["n_layer"], got["max_steps"], got["out"]) == (2, 4, "a")


def test_default_config_is_read_only_without_a_named_file(write):
    default, other = write("default.py", "n_layer = 1\nout = 'default'"), write("other.py", "n_layer = 2")
    assert settings(default_config=default)["out"] == "default"
    assert settings(other, default_config=default)["out"] == "out"


def test_a_field_of_two_dataclasses_is_a_bug():
    with pytest.raises(AssertionError, match="n_layer"):
        parse(ModelConfig, ModelConfig, argv=[])


# Values


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--n_layer=1e3", 1000),
        ("--max_steps=9007199254740993", 2**53 + 1),
        ("--dropout=1", 1.0),
        ("--dropout=-3e-4", -3e-4),
        ("--n_kv_head=None", None),
        ("--n_kv_head=4", 4),
        ("--vocab=topk", "topk"),
        ("--compile", True),
        ("--compile=true", True),
        ("--compile=False", False),
        ("--compile=1", True),
        ("--compile=0", False),
        ("--init_from=None", None),
        ("--out=a=b", "a=b"),
        ("--out=12", "12"),
        ("--out=", ""),
    ],
)
def test_command_line_values(argument, value):
    got = settings("--n_layer=1", argument)[argument[2:].partition("=")[0]]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("n_layer = 2 * 3", 6),
        ("max_steps = 1e3", 1000),
        ("max_steps = 2**53 + 1", 2**53 + 1),
        ("dropout = 1", 1.0),
        ("n_kv_head = None", None),
        ("compile = True", True),
        ("out = f'out/{1 + 1}'", "out/2"),
    ],
)
def test_file_values(write, line, value):
    path = write("a.py", line)
    got = settings("--n_layer=1" if "n_layer" not in line else "--max_steps=1", path)[line.split(" = ")[0]]
    assert got == value and type(got) is type(value)


def test_a_file_computes_with_its_own_names(write):
    path = write(
        "a.py", '"""Header."""\n\n_tokens = 1e6  # local\nn_layer = 4\nmax_steps = _tokens / (n_layer * 10)\n'
    )
    assert settings(path)["max_steps"] == 25_000


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--n_layer=abc", "command line: n_layer=abc: expected an int"),
        ("--n_layer=1.5", "command line: n_layer=1.5: expected an int"),
        ("--n_layer=inf", "command line: n_layer=inf: expected an int"),
        ("--n_kv_head=x", "command line: n_kv_head=x: expected an int or None"),
        ("--dropout=", "command line: dropout=: expected a finite float"),
        ("--dropout=nan", "command line: dropout=nan: expected a finite float"),
        ("--dropout=-inf", "command line: dropout=-inf: expected a finite float"),
        ("--dropout=1e999", "command line: dropout=1e999: expected a finite float"),
        ("--max_steps=99999999999999999999", "command line: max_steps=99999999999999999999: expected an int"),
        ("--max_steps=1e999999999", "command line: max_steps=1e999999999: expected an int"),
        ("--compile=yes", "command line: compile=yes: expected true or false"),
        ("--vocab=full", "command line: vocab=full: expected one of factored, topk, dense"),
    ],
)
def test_wrong_type_on_the_command_line(argument, message):
    assert mistake("--n_layer=1", argument) == message


@pytest.mark.parametrize(
    ("line", "expected"),
    [("n_layer = True", "an int"), ("out = 3", "a string"), ("dropout = None", "a finite float")],
)
def test_wrong_type_in_a_file_names_its_line(write, line, expected):
    key, value = line.split(" = ")
    assert mistake(write("a.py", f"\n{line}")) == f"a.py:2: {key}={value}: expected {expected}"


# Mistakes


def test_unknown_key_suggests_the_nearest(write):
    assert mistake("--max-steps=3") == "command line: unknown key max-steps: did you mean max_steps?"
    assert (
        mistake(write("a.py", "n_layer = 1\nn_layers = 1"))
        == "a.py:2: unknown key n_layers: did you mean n_layer?"
    )
    assert "--help" in mistake("--zzz=3")


def test_missing_file_suggests_the_nearest(write):
    write("config/reflow_nano.py", "n_layer = 1")
    wanted = "did you mean config/reflow_nano.py?"
    assert mistake("config/reflow_nan.py") == f"no config file config/reflow_nan.py: {wanted}"
    assert mistake("reflow_nano") == f"no config file reflow_nano: {wanted}"
    assert mistake("elsewhere/zzz") == "no config file elsewhere/zzz"
    assert mistake("config") == "no config file config: a run's folder is given as --run=config"


@pytest.mark.parametrize(
    ("argv", "spelling"),
    [
        (["--max_steps", "--compile"], "--max_steps=..."),
        (["--max_steps"], "--max_steps=..."),
        (["max_steps=200"], "--max_steps=200"),
        (["-max_steps=200"], "--max_steps=200"),
    ],
)
def test_a_misspelt_argument_is_shown_the_right_spelling(argv, spelling):
    assert mistake(*argv).endswith(f"write {spelling}")


def test_a_value_may_follow_its_key_after_a_space():
    """`--key value` is `--key=value`, negative numbers included; a boolean takes true or false alone."""
    found = settings("--n_layer", "2", "--dropout", "-1e-3", "--compile", "--max_steps", "7", "--out", "a=b")
    expected = {"n_layer": 2, "dropout": -1e-3, "compile": True, "max_steps": 7, "out": "a=b"}
    assert expected.items() <= found.items()
    assert settings("--n_layer", "2", "--compile", "false")["compile"] is False
    assert mistake("--compile", "maybe") == "no config file maybe"


def test_missing_required_field():
    message = mistake(default_config=None)
    assert message == "missing n_layer: name a config file, for example config/reflow_nano.py"


def test_post_init_errors_are_the_users():
    assert mistake("--n_layer=0") == "n_layer=0 must be at least 1"


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "print(1)",
        "n_layer = int('3')",
        "n_layer = ().__class__",
        "n_layer = [1 for _ in 'a']",
        "n_layer: int = 3",
        "n_layer = max_steps = 3",
        "'not a docstring'",
        "n_layer = (",
        "n_layer = undefined",
        "n_layer = 1 / 0",
    ],
)
def test_a_file_holds_only_assignments(write, line):
    assert mistake(write("a.py", f"max_steps = 1\n\n{line}\n")).startswith("a.py:3: ")


@dataclass
class Ranged:
    beta: float = 0.9
    steps: int = 10
    warmup: int | None = None

    def __post_init__(self):
        configurator.check(self, "0 <= beta < 1", "0 <= warmup <= steps")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--beta=1", "beta=1.0: must satisfy 0 <= beta < 1"),
        ("--beta=-0.1", "beta=-0.1: must satisfy 0 <= beta < 1"),
        ("--warmup=11", "warmup=11 and steps=10: must satisfy 0 <= warmup <= steps"),
    ],
)
def test_a_rule_that_does_not_hold_is_shown_with_the_values(argument, message):
    with pytest.raises(UserError) as error:
        parse(Ranged, argv=[argument])
    assert str(error.value) == message


def test_rules_that_hold():
    """At both ends; a rule about None holds, and what is not a number holds nothing."""
    for argument in ("--beta=0", "--beta=0.999", "--warmup=10", "--warmup=None"):
        parse(Ranged, argv=[argument])
    with pytest.raises(ValueError, match="beta=nan"):
        Ranged(beta=float("nan"))


def test_settings_of_an_earlier_run(write):
    """They take the place of the defaults and of the default config; what is given now wins over them."""
    default, other = write("default.py", "n_layer = 1\nout = 'x'"), write("other.py", "max_steps = 8")
    asked = []

    def saved(given):
        asked.append(given)
        return {"n_layer": 3, "max_steps": 7, "dropout": 0.5, "a key of old": 1}

    got = settings("--dropout=0.1", default_config=default, saved=saved)
    assert (got["n_layer"], got["max_steps"], got["dropout"], got["out"]) == (3, 7, 0.1, "out")
    assert asked == [{"n_layer": 1, "out": "x", "dropout": 0.1}]
    assert settings(other, saved=saved)["max_steps"] == 8
    assert settings("--compile", default_config=default, saved=lambda given: {})["out"] == "x"
    with pytest.raises(UserError, match="the run's own settings: max_steps=x: expected an int"):
        settings(saved=lambda given: {"n_layer": 1, "max_steps": "x"})


# What a run prints


def test_differences_and_description():
    model, train = ModelConfig(n_layer=2, dropout=0.5), TrainConfig()
    assert configurator.differences(model, train) == {"n_layer": 2, "dropout": 0.5}
    assert (
        configurator.describe(model, train) == "ModelConfig: --n_layer=2 --dropout=0.5\nTrainConfig: defaults"
    )


SCRIPT = '''"""
Train a little.

    python script.py
    python script.py --steps=2
    python script.py --steps=3

Method
    Descend.
"""
import configurator
from dataclasses import dataclass

@dataclass
class ScriptConfig:
    steps: int = 1  # of the optimiser
    lr: float | None = 6e-4  # the peak
    block_size: int = 2**10
    plain: str = "a#b"


def main():
    (config,) = configurator.parse(ScriptConfig)
    exec(config.plain if config.plain != "a#b" else 'print("steps", config.steps)')


if __name__ == "__main__":
    configurator.run(main)
'''


@pytest.fixture
def script(tmp_path):
    """Run a small script in its own process; returns the finished process."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def script(*argv, stdout=subprocess.PIPE, **env):
        env = os.environ | {"PYTHONPATH": str(ROOT)} | env
        command = [sys.executable, tmp_path / "script.py", *argv]
        return subprocess.run(command, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)

    return script


def test_help_shows_question_two_examples_options_and_the_method_last(script):
    process = script("--help", "--steps=no number")  # help wins over a mistake
    assert (process.returncode, process.stderr) == (0, "")
    assert [" ".join(line.split()) for line in process.stdout.splitlines()] == [
        "Train a little.",
        "",
        "python script.py",
        "python script.py --steps=2",
        "",
        "ScriptConfig",
        "--steps int 1 of the optimiser",
        "--lr float | None 6e-4 the peak",
        "--block_size int 2**10",
        '--plain str "a#b"',
        "",
        "More examples",
        "python script.py --steps=3",
        "",
        "Method",
        "Descend.",
    ]


def test_exit_status_and_one_line(script):
    process = script("--steps=2")
    assert (process.returncode, process.stdout, process.stderr) == (0, "steps 2\n", "")
    process = script("--step=2")
    assert process.returncode == 2
    assert process.stderr == "error: command line: unknown key step: did you mean steps?\n"
    assert script("--step=2", RANK="1").stderr.startswith("[rank 1] error: ")
    process = script("--plain=raise KeyboardInterrupt")
    assert (process.returncode, process.stderr) == (130, "interrupted\n")


def test_torchrun_is_told_the_line(script, tmp_path):
    """It ends its own report with the line, in place of a link to its manual."""
    script("--step=2", TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told["message"] == "error: command line: unknown key step: did you mean steps?"
    assert told["extraInfo"]["timestamp"].isdecimal()


@pytest.mark.parametrize("python", ["print('a' * 9)", "for i in range(10**5): print(i)"])
def test_a_closed_pipe_is_quiet(script, python):
    """Whether the pipe is noticed at the end or in the middle."""
    read, write = os.pipe()
    os.close(read)
    process = script(f"--plain={python}", stdout=write)
    os.close(write)
    assert (process.returncode, process.stderr) == (141, "")


MACHINE = {
    "open('no/such')": "no/such: No such file or directory: name another place",
    "import os; os.mkdir('script.py/x')": "script.py/x: Not a directory: name another place",
    "import os; raise PermissionError(13, 'x', 'a', None, 'b')": (
        "b: Permission denied: change its permissions, or name another place"
    ),
    "import os; os.write(os.open('/dev/full', os.O_WRONLY), b'a')": (
        "<string>:1: No space left on device: free some space, or write elsewhere"
    ),
    "raise OSError('two\\nlines')": "<string>:1: two lines: try again",
    "raise MemoryError('of 8 GiB')": "out of memory: of 8 GiB: take smaller batches or a smaller model",
}


@pytest.mark.parametrize("python", MACHINE)
def test_an_error_of_the_machine_is_one_line(script, python, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "/dev/full" in python and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    process = script(f"--plain={python}")
    assert (process.returncode, process.stderr) == (2, f"error: {MACHINE[python]}\n")


def test_torch_has_errors_of_its_own_for_memory():
    import torch

    with pytest.raises(RuntimeError) as memory:
        torch.empty(10**15)
    line = configurator.explain(memory.value)
    assert line.startswith("out of memory: ") and line.endswith("smaller model") and "\n" not in line
    cuda = torch.OutOfMemoryError("CUDA out of memory")
    assert configurator.explain(cuda).startswith("out of memory: CUDA")


@pytest.mark.parametrize("error", ["ValueError", "RuntimeError", "KeyError", "AssertionError"])
def test_a_bug_keeps_its_traceback(script, error):
    process = script(f"--plain=raise {error}('planted')")
    assert process.returncode == 1 and process.stderr.count("Traceback") == 1
    assert process.stderr.splitlines()[-1].startswith(f"{error}: ") and "planted" in process.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_what_stdout_cannot_encode_is_escaped(script, encoding):
    """The line comes out, and so does what is after it; likewise in the line of an error."""
    text = "print('a \u2500 b'); print('end'); raise configurator.UserError('\u2500')"
    process = script(f"--plain={text}", PYTHONIOENCODING=encoding)
    assert process.stdout == "a \\u2500 b\nend\n"
    assert (process.returncode, process.stderr) == (2, "error: \\u2500\n")


def test_a_line_is_in_the_log_before_the_program_ends(script):
    """Killed without a chance to flush, as a long run may be: what it had said is there."""
    process = script("--plain=print('step 5'); import os; os.kill(os.getpid(), 9)", PYTHONUNBUFFERED="")
    assert (process.stdout, process.returncode) == ("step 5\n", -9)
