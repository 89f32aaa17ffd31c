"""The GitHub workflow and the wheel settings it relies on."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[1]
WORKFLOW = REPOSITORY / ".github/workflows/ci.yml"
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def steps():
    for job in yaml.safe_load(WORKFLOW.read_text())["jobs"].values():
        yield from job["steps"]


def test_every_action_is_pinned_to_a_version():
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used
    assert [u for u in used if not re.fullmatch(r"[\w-]+/[\w-]+@v\d[\d.]*", u)] == []


def test_linux_runs_what_every_change_must_pass():
    assert any(step.get("run") == "bash .ci/run" for step in steps())


def test_the_macs_gpu_runs_the_same_tests():
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["macos"]
    commands = [step.get("run", "") for step in job["steps"]]
    has_gpu = next(i for i, c in enumerate(commands) if "assert mx.metal.is_available()" in c)
    tests = next(i for i, c in enumerate(commands) if c.startswith("python -m pytest"))
    assert has_gpu < tests
    assert commands[tests].split()[3:] == ["-q", "--durations=10"]  # none is left out


def test_wheels_are_built_for_every_python_from_the_oldest_on():
    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    wheels = yaml.safe_load(WORKFLOW.read_text())["jobs"]["wheels-linux"]
    pythons = wheels["strategy"]["matrix"]["python"]
    assert pythons[0] == oldest
    built = PYPROJECT["tool"]["cibuildwheel"]["build"]
    assert built == [f"cp{python.replace('.', '')}-*" for python in pythons]


def test_cibuildwheel_takes_the_settings():
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers"]
    command += ["--platform", "macos", str(REPOSITORY)]
    run = subprocess.run(command, text=True, capture_output=True, check=True)
    assert run.stdout.split() == [f"cp3{minor}-macosx_arm64" for minor in range(11, 15)]


def test_the_workflow_and_the_tests_use_one_cibuildwheel():
    (used,) = (s["uses"] for s in steps() if s.get("uses", "").startswith("pypa/cibuildwheel@"))
    pinned = used.replace("pypa/cibuildwheel@v", "cibuildwheel==")
    assert pinned in PYPROJECT["project"]["optional-dependencies"]["test"]


def test_ci_and_pre_commit_run_the_same_pinned_linters():
    (local,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert {hook["language"] for hook in local["hooks"]} == {"system"}
    extra = PYPROJECT["project"]["optional-dependencies"]["test"]
    pinned = {requirement.split("==")[0] for requirement in extra if "==" in requirement}
    assert {hook["entry"].split()[0] for hook in local["hooks"]} == {"ruff", "clang-format", "mypy"}
    assert {"ruff", "clang-format", "mypy", "pre-commit"} <= pinned
    assert "pre-commit run --all-files" in (REPOSITORY / ".ci/run").read_text().splitlines()
