"""What the README shows works: its snippets run, its commands are those of CI."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    """CI must not pass by a command that the README does not name."""
    commands = re.search(r"```sh\n(.*?)```", README, re.DOTALL)
    assert commands is not None
    script = (ROOT / ".ci" / "run").read_text()
    for command in commands[1].strip().splitlines():
        assert command.replace("pip install", "pip install --quiet") in script
