"""runs/, the workflow and the citation: the scripts call what exists, their headers say what it costs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import configurator
import hardware
from data.datasets import tokenizer_of
from model import ModelConfig
from train import TrainConfig, fitted

ROOT = Path(configurator.__file__).resolve().parent
SCRIPTS = sorted(path.name for path in (ROOT / "runs").iterdir())
BASH = shutil.which("bash")
STUB = '#!/bin/sh\necho "$(basename "$0") $*" >>"$LOG"\n'
SLURM = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
SLURM |= {"SLURM_GPUS_ON_NODE": "4"}

needs_bash = pytest.mark.skipif(BASH is None, reason="no bash here")


def commands(script, home, *arguments, prepared=True):
    """(exit status, stderr, the commands that a script gives), with stand-ins for those of the outside."""
    shutil.copytree(ROOT / "runs", home / "runs")
    for data in ("offline-gpt2-8192", "openwebtext"):
        (home / "data" / data).mkdir(parents=True)
        if prepared:
            (home / "data" / data / "meta.json").write_text("{}")
    (home / "bin").mkdir()
    for name in ("python", "torchrun", "srun", "scontrol"):
        (home / "bin" / name).write_text(STUB if name != "scontrol" else "#!/bin/sh\necho n1; echo n2\n")
        (home / "bin" / name).chmod(0o755)
    env = os.environ | SLURM | {"PATH": f"{home / 'bin'}:{os.environ['PATH']}", "LOG": str(home / "log")}
    command = [BASH, home / "runs" / script, *arguments]
    env |= {"SLURM_SUBMIT_DIR": str(home)}
    done = subprocess.run(command, env=env, cwd=home / "bin", capture_output=True, text=True, timeout=60)
    log = home / "log"
    return done.returncode, done.stderr, log.read_text().splitlines() if log.exists() else []


@needs_bash
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_bash_that_stops_at_an_error(script):
    path = ROOT / "runs" / script
    subprocess.run([BASH, "-n", path], check=True)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text


@needs_bash
@pytest.mark.parametrize(
    ("script", "before", "trains"),
    [
        ("cpu.sh", "python", ["reflow_mini", "gpt2_new_mini"]),
        ("t4x4.sh", "torchrun --standalone --nproc_per_node=4", ["reflow_1"]),
        (
            "slurm.sbatch",
            "srun torchrun --nnodes=2 --nproc_per_node=4"
            " --rdzv_id=7 --rdzv_backend=c10d --rdzv_endpoint=n1:29500",
            ["reflow_1_big"],
        ),
    ],
)
def test_what_a_script_trains_can_be_trained(script, before, trains, tmp_path):
    """From any folder; each command is one that train.py takes."""
    status, err, given = commands(script, tmp_path)
    found = [line for line in given if "train.py" in line]
    assert (status, err) == (0, "")
    assert found == [f"{before} train.py config/{name}.py --resume" for name in trains]
    for line in found:
        arguments = line.partition("train.py ")[2].split()
        command = [sys.executable, "train.py", *arguments, "--device=cpu", "--dry_run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "FLOPs a token" in done.stdout, done.stderr


@needs_bash
def test_the_other_scripts_that_a_script_calls_are_there(tmp_path):
    status, err, given = commands("cpu.sh", tmp_path, prepared=False)
    called = [line.split()[1] for line in given]
    assert called[0] == "data/offline/prepare.py" and called[-1] == "experiments/report.py"
    assert all((ROOT / name).exists() for name in called)


@needs_bash
@pytest.mark.parametrize("script", ["t4x4.sh", "slurm.sbatch"])
def test_another_configuration_may_be_named(script, tmp_path):
    given = commands(script, tmp_path, "config/reflow_1_small.py")[2]
    assert given[-1].endswith("train.py config/reflow_1_small.py --resume")


@needs_bash
def test_a_job_without_data_ends_at_once(tmp_path):
    status, err, given = commands("slurm.sbatch", tmp_path, prepared=False)
    assert (status, err, given) == (2, "first: python data/openwebtext/prepare.py\n", [])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_header_says_what_dry_run_says(script, capsys, monkeypatch):
    """Tokens and FLOPs of every run, and the hours on 4 x T4."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    text = (ROOT / "runs" / script).read_text(encoding="utf-8")
    rows = re.findall(r"^# +(\w+) +([\d,]+) +([\d.e+]+) +([\d.]+)", text, re.M)
    assert rows
    for name, tokens, flops, hours in rows:
        file = str(ROOT / "config" / f"{name}.py")
        m, c = configurator.parse(ModelConfig, TrainConfig, argv=[file, "--device=cpu"])
        capsys.readouterr()
        hardware.dry_run(fitted(m, tokenizer_of(c.dataset)), c)
        out = capsys.readouterr().out
        assert f" {tokens} in {c.max_steps:,} steps" in out and f" {flops} in all" in out, name
        if script != "cpu.sh":
            assert f"time on 4 x T4: about {hours} h" in out, name


def test_the_workflow_runs_what_everybody_runs():
    """Ubuntu, the oldest and a newer Python, no secrets."""
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "secrets" not in text and os.access(ROOT / ".ci" / "run", os.X_OK)
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(text)
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads `on` as true
    job = workflow["jobs"]["test"]
    assert job["runs-on"].startswith("ubuntu") and job["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    (setup,) = (step["with"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert setup["cache"] == "pip" and setup["python-version"] == "${{ matrix.python }}"
    assert all(list(ROOT.glob(pattern)) for pattern in setup["cache-dependency-path"].split())
    assert job["steps"][-1] == {"run": ".ci/run"}


def test_the_citation_has_the_fields_that_the_format_asks_for():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["authors"] == [{"name": "The reFlow developers"}]
    assert {"message", "title", "version", "date-released", "license"} <= citation.keys()
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year"} <= reference.keys()
