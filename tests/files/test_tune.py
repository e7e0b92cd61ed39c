"""How files are written on which file system, and what is said about it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from gpudcp.errors import BackendUnavailableError
from gpudcp.files import tune
from gpudcp.files.tune import WriteChoice, choose_write, file_system_type, supports_direct_io


def refuse_open(monkeypatch: pytest.MonkeyPatch, refused: dict[int, int]) -> None:
    """Opening with one of these flags fails with its error, as on file systems that lack it."""
    real = os.open

    def call(path: str, flags: int, mode: int = 0o777) -> int:
        for flag, number in refused.items():
            if flags & flag == flag:
                if flag == os.O_DIRECT and flags & os.O_CREAT and flags & os.O_TMPFILE != os.O_TMPFILE:
                    # As Linux does it: the name is made before the flag is refused.
                    os.close(real(path, flags & ~os.O_DIRECT, mode))
                raise OSError(number, os.strerror(number), path)
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", call)


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


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_auto_writes_directly_on_local_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Where direct writes were measured to win."""
    monkeypatch.setattr(tune, "file_system_type", lambda _: kind)
    monkeypatch.setattr(tune, "supports_direct_io", lambda _: True)
    assert choose_write(str(tmp_path), "auto") == WriteChoice(True, f"direct writes on {kind}")
    monkeypatch.setattr(tune, "supports_direct_io", lambda _: False)
    assert choose_write(str(tmp_path), "auto") == WriteChoice(
        False, f"buffered writes: O_DIRECT refused, though this is {kind}"
    )


@pytest.mark.parametrize("kind", ["tmpfs", "lustre", "nfs4", "overlay", "unknown"])
def test_auto_writes_buffered_everywhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Some of them open files with O_DIRECT, and are several times slower then."""
    monkeypatch.setattr(tune, "file_system_type", lambda _: kind)
    assert choose_write(str(tmp_path), "auto") == WriteChoice(False, f"buffered writes on {kind}")


def test_off_is_buffered_anywhere(tmp_path: Path) -> None:
    """The user's word needs no other reason."""
    assert choose_write(str(tmp_path), "off") == WriteChoice(False, "Options(direct_io='off')")


def test_on_is_direct_where_that_is_possible(tmp_path: Path) -> None:
    """Also on file systems that auto would write buffered."""
    if not supports_direct_io(str(tmp_path)):
        pytest.skip(f"no O_DIRECT in {tmp_path}")
    assert choose_write(str(tmp_path), "on") == WriteChoice(True, "Options(direct_io='on')")


def test_on_is_refused_where_no_file_opens_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name it is no fallback's turn: the message has the remedy, and nothing is left behind."""
    refuse_open(monkeypatch, {os.O_DIRECT: errno.EINVAL})
    with pytest.raises(BackendUnavailableError) as caught:
        choose_write(str(tmp_path), "on")
    assert str(caught.value).startswith(f"{tmp_path}: {file_system_type(str(tmp_path))} opens no file with O_DIRECT")
    assert str(caught.value).endswith("use Options(direct_io='auto') or 'off'")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR])
def test_on_is_direct_where_only_unnamed_files_are_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """NFS and Lustre know O_DIRECT, and no O_TMPFILE."""
    if not supports_direct_io(str(tmp_path)):
        pytest.skip(f"no O_DIRECT in {tmp_path}")
    refuse_open(monkeypatch, {os.O_TMPFILE: number})
    assert choose_write(str(tmp_path), "on") == WriteChoice(True, "Options(direct_io='on')")
    assert os.listdir(tmp_path) == []


def test_on_is_refused_where_neither_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that the kernel makes before it refuses the flag is removed."""
    refuse_open(monkeypatch, {os.O_TMPFILE: errno.EOPNOTSUPP, os.O_DIRECT: errno.EINVAL})
    with pytest.raises(BackendUnavailableError):
        choose_write(str(tmp_path), "on")
    assert os.listdir(tmp_path) == []
