"""The GitHub workflow and the wheel settings it relies on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
WORKFLOW = REPOSITORY / ".github/workflows/ci.yml"


def steps():
    for job in yaml.safe_load(WORKFLOW.read_text())["jobs"].values():
        yield from job["steps"]


def test_every_action_is_pinned_to_a_version():
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used
    assert [u for u in used if not re.fullmatch(r"[\w-]+/[\w-]+@v\d[\d.]*", u)] == []


def test_linux_runs_what_every_change_must_pass():
    assert any(step.get("run") == "bash .ci/run" for step in steps())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="cibuildwheel needs Python 3.11")
def test_cibuildwheel_takes_the_settings():
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers"]
    command += ["--platform", "macos", str(REPOSITORY)]
    run = subprocess.run(command, text=True, capture_output=True, check=True)
    assert run.stdout.split() == [f"cp3{minor}-macosx_arm64" for minor in range(10, 15)]


def test_the_workflow_and_the_tests_use_one_cibuildwheel():
    (used,) = (s["uses"] for s in steps() if s.get("uses", "").startswith("pypa/cibuildwheel@"))
    pinned = re.search(r"cibuildwheel==([\d.]+)", (REPOSITORY / "pyproject.toml").read_text())
    assert pinned and used == f"pypa/cibuildwheel@v{pinned[1]}"
