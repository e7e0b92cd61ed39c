"""What the README shows works: its snippets run, its commands are those of CI."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gpudcp

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_has_snippets() -> None:
    """The pattern that finds them still fits."""
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_each_snippet_runs_by_itself(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody pastes it into an empty directory."""
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert list(tmp_path.glob("checkpoints/*/.metadata"))


def test_the_training_run_saves_and_resumes(tmp_path: Path) -> None:
    """On two ranks, for fewer steps; then for some more."""
    (script,) = re.findall(r"```python torchrun\n(.*?)```", README, re.DOTALL)
    for steps in (4, 6):
        short = {'"/shared/run"': repr(str(tmp_path / "run")), "< 1000": f"< {steps}", "% 100 ": "% 2 "}
        changed = script
        for old, new in short.items():
            assert changed.count(old) == 1
            changed = changed.replace(old, new)
        (tmp_path / "train.py").write_text(changed)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        # Not its exit code: FSDP2 over gloo may abort when the interpreter is done (pytorch#190489).
        done = subprocess.run(
            [*command, str(tmp_path / "train.py")],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert gpudcp.CheckpointManager(tmp_path / "run").latest() == steps, done.stderr
    assert gpudcp.CheckpointManager(tmp_path / "run").steps() == [2, 4, 6]


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    """CI must not pass by a command that the README does not name."""
    commands = re.search(r"```sh\n(.*?)```", README, re.DOTALL)
    assert commands is not None
    script = (ROOT / ".ci" / "run").read_text()
    for command in commands[1].strip().splitlines():
        assert command.replace("pip install", "pip install --quiet") in script
