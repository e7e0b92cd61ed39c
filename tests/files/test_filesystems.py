"""What is asked of the kernel about a file system, and that nothing is left behind by asking."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from gpudcp.files.filesystems import file_system_type, mount_of, opens_named_file_directly, supports_direct_io


def test_the_type_of_a_file_system_is_the_kernels_word(tmp_path: Path) -> None:
    """The same that findmnt prints."""
    if (findmnt := shutil.which("findmnt")) is None:
        pytest.skip("no findmnt command")
    for path in (str(tmp_path), "/dev/shm", "/proc"):
        named = subprocess.run([findmnt, "-n", "-o", "FSTYPE", "-T", path], capture_output=True, text=True, check=True)
        assert file_system_type(path) == named.stdout.split()[-1]
    assert file_system_type("/dev/shm") == "tmpfs"


def test_a_mounted_file_system_is_told_from_the_one_around_it(small_directory: Path) -> None:
    """The type is of the directory's own device."""
    assert file_system_type(str(small_directory)) == "tmpfs"


def test_the_type_is_unknown_where_the_kernel_does_not_say(tmp_path: Path) -> None:
    """A directory that is not there has none; that is no error here."""
    assert file_system_type(str(tmp_path / "gone")) == "unknown"


def test_supporting_direct_io_is_found_out_without_leaving_a_file(tmp_path: Path) -> None:
    """The answer is the kernel's, to an open that could be any file's."""
    assert isinstance(supports_direct_io(str(tmp_path)), bool)
    assert os.listdir(tmp_path) == []
    assert supports_direct_io("/proc") is False
    assert supports_direct_io(str(tmp_path / "gone")) is False


def test_a_mount_is_named_by_type_source_and_point(small_directory: Path) -> None:
    """What tells one file system from another of its type."""
    assert mount_of(str(small_directory)) == ("tmpfs", "tmpfs", str(small_directory))
    assert mount_of(str(small_directory / "gone")) == ("unknown", "unknown", "unknown")


def test_a_named_file_is_gone_when_the_answer_is_known(tmp_path: Path) -> None:
    """Where it can be opened directly and where it cannot be made at all."""
    assert opens_named_file_directly(str(tmp_path)) == supports_direct_io(str(tmp_path))
    assert opens_named_file_directly("/proc") is False
    assert os.listdir(tmp_path) == []
