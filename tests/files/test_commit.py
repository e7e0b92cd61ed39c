"""How a checkpoint becomes visible: all at once, by one save at a time, and nobody else's files are touched."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from gpudcp.errors import CheckpointBusyError, GpuDcpError, TransferError
from gpudcp.files import commit
from gpudcp.files.commit import (
    LOCK_NAME,
    DirectoryLock,
    data_file_name,
    draw_save_id,
    is_committed,
    is_data_file_name,
    make_directory,
    metadata_file_name,
    metadata_names,
    remove_files,
    replace_file,
    stale_data_names,
)

ID = "0123456789abcdef"


class Child(Protocol):
    """A process of the ``start`` fixture."""

    process: Any

    def line(self) -> str: ...

    def go_on(self) -> None: ...


Start = Callable[[str], Child]


def record_calls(monkeypatch: pytest.MonkeyPatch, directory: Path) -> list[str]:
    """The calls that decide what a power cut leaves, in order."""
    calls: list[str] = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def name_of(path: str) -> str:
        return os.path.relpath(path, directory)

    def recorded_fsync(fd: int) -> None:
        calls.append(f"fsync {name_of(os.readlink(f'/proc/self/fd/{fd}'))}")
        fsync(fd)

    def recorded_replace(old: str, new: str) -> None:
        calls.append(f"replace {name_of(old)} {name_of(new)}")
        replace(old, new)

    def recorded_unlink(path: str) -> None:
        calls.append(f"unlink {name_of(path)}")
        unlink(path)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    monkeypatch.setattr(os, "unlink", recorded_unlink)
    return calls


def fail_with(number: int) -> Callable[..., Any]:
    """A call that the system refuses."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# --- names -----------------------------------------------------------------------------------------------------------


def test_save_ids_differ_and_fit_the_names() -> None:
    """No save ever writes to a file of another save."""
    ids = {draw_save_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(is_data_file_name(data_file_name(3, 0, save_id), has_save_id=True) for save_id in ids)


def test_a_data_file_is_named_by_rank_number_and_save() -> None:
    """As DCP names them, and the save's id."""
    assert data_file_name(12, 3, ID) == f"__12_3_{ID}.distcp"


@pytest.mark.parametrize(
    ("name", "is_ours", "is_stocks"),
    [
        (f"__0_0_{ID}.distcp", True, False),
        (f"__123_45_{ID}.distcp", True, False),
        ("__0_0.distcp", False, True),
        ("__12_7.distcp", False, True),
        (f"__0_0_{ID.upper()}.distcp", False, False),
        (f"__0_0_{ID}0.distcp", False, False),
        (f"__0_0_{ID[1:]}.distcp", False, False),
        (f"__0_{ID}.distcp", False, False),
        (f"__a_0_{ID}.distcp", False, False),
        (f"x__0_0_{ID}.distcp", False, False),
        (f"__0_0_{ID}.distcp.bak", False, False),
        (f"__0_0_{ID}.distcp\n", False, False),
        ("config.json", False, False),
        (".metadata", False, False),
    ],
)
def test_data_files_are_known_by_their_names(name: str, is_ours: bool, is_stocks: bool) -> None:
    """Ours carry a save's id, stock's do not, and everything else is somebody else's."""
    assert is_data_file_name(name, has_save_id=True) is is_ours
    assert is_data_file_name(name, has_save_id=False) is is_stocks


def test_metadata_files_are_found_by_their_names(tmp_path: Path) -> None:
    """The checkpoint's and the ranks' own; not temporary ones, not anybody else's."""
    names = [metadata_file_name(None), metadata_file_name(0), metadata_file_name(17)]
    assert names == [".metadata", "__0.metadata", "__17.metadata"]
    for name in (*names, ".metadata.tmp", "x.metadata", "__x.metadata", "metadata", "__0.metadata~"):
        (tmp_path / name).touch()
    assert metadata_names(str(tmp_path)) == sorted(names)


def test_only_our_own_data_files_are_candidates_for_a_clean_up(tmp_path: Path) -> None:
    """A rank that saves by itself cleans up after itself alone."""
    ours = [data_file_name(rank, 0, save_id) for rank in (0, 1, 10) for save_id in (ID, ID[::-1])]
    for name in (*ours, "__0_0.distcp", "config.json", ".metadata", "tokenizer.distcp", LOCK_NAME):
        (tmp_path / name).touch()
    assert stale_data_names(str(tmp_path), rank=None) == sorted(ours)
    assert stale_data_names(str(tmp_path), rank=1) == sorted(name for name in ours if name.startswith("__1_"))


# --- directories -----------------------------------------------------------------------------------------------------


def test_missing_directories_are_made_and_brought_to_stable_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each name in its own parent, the outermost first."""
    calls = record_calls(monkeypatch, tmp_path)
    make_directory(str(tmp_path / "a" / "b" / "c"), fsync=True)
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert calls == ["fsync .", "fsync a", "fsync a/b"]
    calls.clear()
    make_directory(str(tmp_path / "a" / "b" / "c"), fsync=True)
    make_directory(str(tmp_path / "d"), fsync=False)
    assert calls == []


def test_a_relative_directory_is_made_where_the_process_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trailing slashes and all."""
    monkeypatch.chdir(tmp_path)
    make_directory("run/step-7/", fsync=True)
    assert (tmp_path / "run" / "step-7").is_dir()


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_directory_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path, path: str) -> None:
    """A file in the way, at the end of the path or within it."""
    (tmp_path / "file").write_bytes(b"foreign")
    with pytest.raises(TransferError) as caught:
        make_directory(str(tmp_path / path), fsync=True)
    assert caught.value.path == str(tmp_path / path)
    assert caught.value.errno in (errno.EEXIST, errno.ENOTDIR)
    assert (tmp_path / "file").read_bytes() == b"foreign"


# --- replacing -------------------------------------------------------------------------------------------------------


def test_a_file_is_on_stable_storage_before_it_is_renamed_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any other order a power cut could leave an empty `.metadata` or none."""
    (tmp_path / ".metadata").write_bytes(b"old")
    calls = record_calls(monkeypatch, tmp_path)
    replace_file(str(tmp_path), ".metadata", [b"new"], fsync=True)
    assert (tmp_path / ".metadata").read_bytes() == b"new"
    assert calls == ["fsync .metadata.tmp", "replace .metadata.tmp .metadata", "fsync ."]
    calls.clear()
    replace_file(str(tmp_path), ".metadata", [b"newer"], fsync=False)
    assert calls == ["replace .metadata.tmp .metadata"]
    assert os.listdir(tmp_path) == [".metadata"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_replacement_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The error names the file that was to be, not the temporary one."""
    (tmp_path / ".metadata").write_bytes(b"old")
    monkeypatch.setattr(os, name, fail_with(errno.EIO))
    with pytest.raises(TransferError) as caught:
        replace_file(str(tmp_path), ".metadata", [b"new"], fsync=True)
    assert (caught.value.path, caught.value.errno) == (str(tmp_path / ".metadata"), errno.EIO)
    assert os.listdir(tmp_path) == [".metadata"]
    assert (tmp_path / ".metadata").read_bytes() == b"old"


def test_a_replacement_on_a_full_disk_leaves_the_old_file(small_directory: Path) -> None:
    """The real ENOSPC, and no temporary file that keeps the disk full."""
    (small_directory / ".metadata").write_bytes(b"old")
    with pytest.raises(TransferError) as caught:
        replace_file(str(small_directory), ".metadata", [bytes(2 << 20)], fsync=True)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(small_directory) == [".metadata"]
    assert (small_directory / ".metadata").read_bytes() == b"old"


def test_an_interrupt_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the metadata is written, or just before it is renamed."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / ".metadata").write_bytes(b"old")
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, interrupted)
            with pytest.raises(KeyboardInterrupt):
                replace_file(str(tmp_path), ".metadata", [b"new"], fsync=True)
        assert [path.name for path in tmp_path.iterdir()] == [".metadata"]
        assert (tmp_path / ".metadata").read_bytes() == b"old"


def test_a_directory_that_may_not_be_listed_counts_as_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It could not be read either. Another error is raised: what is not committed may be removed."""
    (tmp_path / ".metadata").write_bytes(b"a checkpoint")
    assert is_committed(str(tmp_path))

    def refuse(path: str) -> list[str]:
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(os, "listdir", refuse)
    code = errno.EACCES
    assert not is_committed(str(tmp_path))
    assert f"{tmp_path}: may not be listed" in caplog.text
    code = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        is_committed(str(tmp_path))


def test_a_commit_that_dies_at_any_call_leaves_one_whole_checkpoint(start: Start) -> None:
    """Killed before and after each of its calls: `.metadata` is all old or all new, and what it names exists."""
    child = start("""
        import json
        old, new = data_file_name(0, 0, "0" * 16), data_file_name(0, 0, "f" * 16)
        size = 100_000
        contents = {name.encode().ljust(size, b"-"): name for name in (old, new)}

        def lay_out():
            for name in os.listdir(directory):
                os.unlink(os.path.join(directory, name))
            for name in (old, new):
                open(os.path.join(directory, name), "wb").close()
            with open(os.path.join(directory, ".metadata"), "wb") as file:
                file.write(old.encode().ljust(size, b"-"))

        def commit():
            replace_file(directory, ".metadata", [new.encode().ljust(size, b"-")], fsync=True)
            remove_files(directory, [old], fsync=True)

        def die_at(number):
            pid = os.fork()
            if pid == 0:
                passed = 0
                def count(frame, event, argument):
                    nonlocal passed
                    passed += event in ("c_call", "c_return")
                    if passed == number:
                        os._exit(9)
                sys.setprofile(count)
                commit()
                os._exit(0)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        number, status = 0, 9
        while status == 9:
            number += 1
            lay_out()
            status = die_at(number)
            with open(os.path.join(directory, ".metadata"), "rb") as file:
                named = contents.get(file.read())
            left = sorted(os.listdir(directory))
            # The next save goes through whatever is left, and then it is gone.
            commit()
            say(json.dumps([status, named, left, sorted(os.listdir(directory))]))
    """)
    old, new = data_file_name(0, 0, "0" * 16), data_file_name(0, 0, "f" * 16)
    seen, names_left = [], set()
    while line := child.line():
        status, named, left, after = json.loads(line)
        assert named in (old, new), f"after {len(seen)} calls `.metadata` is neither old nor new"
        assert named in left, f"after {len(seen)} calls `.metadata` names a file that is gone"
        assert after == [".metadata", new]
        seen.append(named)
        names_left.update(left)
    assert status == 0
    assert len(seen) > 30
    assert seen == sorted(seen), "once new, it stays new"
    assert {old, new} == set(seen)
    assert names_left == {".metadata", ".metadata.tmp", old, new}


# --- cleaning up -----------------------------------------------------------------------------------------------------


def test_a_clean_up_removes_what_it_is_told_and_left_over_temporary_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else: the rest of the directory is the user's."""
    foreign = ["config.json", "config.json.tmp", ".metadata", "__0_0.distcp", "x.metadata.tmp", LOCK_NAME]
    for name in (*foreign, "stale", ".metadata.tmp", "__7.metadata.tmp"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "model").mkdir()
    calls = record_calls(monkeypatch, tmp_path)
    remove_files(str(tmp_path), ["stale", "not there", "model"], fsync=True)
    assert sorted(os.listdir(tmp_path)) == sorted([*foreign, "model"])
    assert all((tmp_path / name).read_bytes() == name.encode() for name in foreign)
    assert calls[-1] == "fsync ."
    assert calls.count("fsync .") == 1


def test_a_rank_that_saves_by_itself_leaves_the_others_temporary_metadata(tmp_path: Path) -> None:
    """They may be in the middle of their own commits."""
    for rank in (None, 0, 1, 11):
        (tmp_path / f"{metadata_file_name(rank)}.tmp").touch()
    remove_files(str(tmp_path), [], fsync=True, rank=1)
    assert sorted(os.listdir(tmp_path)) == [".metadata.tmp", "__0.metadata.tmp", "__11.metadata.tmp"]


def test_a_clean_up_with_nothing_to_do_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No fsync for a directory that did not change."""
    (tmp_path / "config.json").touch()
    calls = record_calls(monkeypatch, tmp_path)
    remove_files(str(tmp_path), [], fsync=True)
    assert calls == []


@pytest.mark.parametrize("name", ["unlink", "fsync"])
def test_a_clean_up_that_fails_is_left_for_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The checkpoint is committed: a file too many is no reason to call it failed."""
    (tmp_path / "stale").touch()
    monkeypatch.setattr(os, name, fail_with(errno.EIO))
    remove_files(str(tmp_path), ["stale"], fsync=True)
    assert os.listdir(tmp_path) == (["stale"] if name == "unlink" else [])


# --- the lock --------------------------------------------------------------------------------------------------------

HOLD = """
    lock = DirectoryLock.acquire(directory)
    say("held")
    wait_to_go_on()
    lock.release()
    say("released")
    wait_to_go_on()
"""

TRY = """
    try:
        DirectoryLock.acquire(directory)
        say("acquired")
    except CheckpointBusyError as error:
        say(error)
"""


def test_a_second_process_is_refused_until_the_first_has_released(tmp_path: Path, start: Start) -> None:
    """The message names the directory and the file that says so."""
    child = start(HOLD)
    assert child.line() == "held"
    with pytest.raises(CheckpointBusyError, match=re.escape(f"{tmp_path}: another save")) as caught:
        DirectoryLock.acquire(str(tmp_path))
    assert LOCK_NAME in str(caught.value)
    child.go_on()
    assert child.line() == "released"
    DirectoryLock.acquire(str(tmp_path)).release()


def test_another_process_is_refused_while_this_one_holds(tmp_path: Path, start: Start) -> None:
    """And is let in afterwards."""
    lock = DirectoryLock.acquire(str(tmp_path))
    assert "another save into this directory is running" in start(TRY).line()
    lock.release()
    assert start(TRY).line() == "acquired"


def test_the_lock_of_a_dead_owner_is_free_at_once(tmp_path: Path, start: Start) -> None:
    """SIGKILL leaves the file, and nobody who holds it."""
    child = start(HOLD)
    assert child.line() == "held"
    child.process.kill()
    child.process.wait()
    assert os.listdir(tmp_path) == [LOCK_NAME]
    DirectoryLock.acquire(str(tmp_path)).release()


def test_releasing_removes_the_file_and_may_be_done_twice(tmp_path: Path) -> None:
    """A checkpoint's directory holds the checkpoint and what was there before."""
    lock = DirectoryLock.acquire(str(tmp_path))
    assert os.listdir(tmp_path) == [LOCK_NAME]
    lock.release()
    assert os.listdir(tmp_path) == []
    other = DirectoryLock.acquire(str(tmp_path))
    lock.release()
    assert os.listdir(tmp_path) == [LOCK_NAME]
    other.release()


def test_two_directories_are_two_locks(tmp_path: Path) -> None:
    """A run may save several checkpoints at a time."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    locks = [DirectoryLock.acquire(str(tmp_path / name)) for name in ("a", "b")]
    assert [os.listdir(tmp_path / name) for name in ("a", "b")] == [[LOCK_NAME]] * 2
    for lock in locks:
        lock.release()


def test_the_same_thread_takes_its_own_lock_over(tmp_path: Path, start: Start) -> None:
    """It can only be back because its first save failed where nobody told the writer; a link is the same place."""
    (tmp_path / "link").symlink_to(tmp_path)
    first = DirectoryLock.acquire(str(tmp_path))
    second = DirectoryLock.acquire(str(tmp_path / "link"))
    assert not first.release.alive
    first.release()
    assert "another save" in start(TRY).line()
    second.release()
    assert start(TRY).line() == "acquired"


def test_another_thread_is_refused(tmp_path: Path) -> None:
    """Two saves of one process get in each other's way like those of two."""
    lock = DirectoryLock.acquire(str(tmp_path))
    errors: list[BaseException] = []

    def acquire() -> None:
        try:
            DirectoryLock.acquire(str(tmp_path))
        except GpuDcpError as error:
            errors.append(error)

    thread = threading.Thread(target=acquire)
    thread.start()
    thread.join()
    assert [type(error) for error in errors] == [CheckpointBusyError]
    assert lock.release.alive
    lock.release()


def test_another_thread_may_release(tmp_path: Path) -> None:
    """A save in the background ends on a thread of its own."""
    lock = DirectoryLock.acquire(str(tmp_path))
    thread = threading.Thread(target=lock.release)
    thread.start()
    thread.join()
    assert os.listdir(tmp_path) == []
    DirectoryLock.acquire(str(tmp_path)).release()


def test_a_lock_that_becomes_garbage_is_released(tmp_path: Path, start: Start) -> None:
    """A writer that is thrown away in mid-save must not keep its directory for ever."""
    lock = DirectoryLock.acquire(str(tmp_path))
    cycle = [lock]
    cycle.append(cycle)  # type: ignore[arg-type]
    del lock, cycle
    gc.collect()
    assert os.listdir(tmp_path) == []
    assert start(TRY).line() == "acquired"


FORK = """
    lock = DirectoryLock.acquire(directory)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write_end)
        {in_child}
        os.read(read_end, 1)  # until the parent is gone
        os._exit(0)
    os.close(read_end)
    {in_parent}
    wait_to_go_on()
"""


@pytest.mark.parametrize(
    "in_child",
    [
        "lock.release()",
        "del lock; import gc; gc.collect()",
        "sys.exit()",
        "os._exit(0)",
        "os.execv('/bin/true', ['true'])",
    ],
)
def test_a_forked_child_does_not_release_its_parents_lock(start: Start, in_child: str) -> None:
    """Neither by hand, nor as garbage, nor when it ends: the parent is in mid-save."""
    said = "say('child')" if "exit" not in in_child and "exec" not in in_child else ""
    waits = "os.waitpid(pid, 0); say('child')" if not said else ""
    parent = start(FORK.format(in_child=f"{in_child}; {said}".rstrip("; "), in_parent=waits or "pass"))
    assert parent.line() == "child"
    assert "another save" in start(TRY).line()


def test_a_forked_child_does_not_keep_what_its_parent_released(start: Start) -> None:
    """A data loader's worker lives longer than the save that it was forked in."""
    parent = start(FORK.format(in_child="pass", in_parent="lock.release(); say('released')"))
    assert parent.line() == "released"
    assert start(TRY).line() == "acquired"


def test_a_forked_child_does_not_keep_what_its_dead_parent_held(start: Start) -> None:
    """Nor longer than a parent that was killed: its own descriptor would be the lock's last one."""
    parent = start(FORK.format(in_child="say('child'); import time; time.sleep(20)", in_parent="pass"))
    assert parent.line() == "child"
    parent.process.kill()
    parent.process.wait()
    assert start(TRY).line() == "acquired"


def test_a_forked_child_can_hold_locks_of_its_own(tmp_path: Path, start: Start) -> None:
    """Also if another of the parent's threads was just acquiring one, whose guard nobody in the child would let go."""
    (tmp_path / "other").mkdir()
    child = start("""
        import signal
        DirectoryLock._guard.acquire()
        pid = os.fork()
        if pid == 0:
            signal.alarm(5)
            DirectoryLock.acquire(directory + "/other")
            os._exit(0)
        say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """)
    assert child.line() == "0"


def test_a_lock_on_a_file_that_was_just_removed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    """The owner before may remove it between our open and our lock: that lock would be on a file nobody sees."""
    flock, opened = fcntl.flock, []

    def release_of_another(fd: int, operation: int) -> None:
        if not opened:
            (tmp_path / LOCK_NAME).unlink()
        elif len(opened) == 1:
            (tmp_path / LOCK_NAME).unlink()
            (tmp_path / LOCK_NAME).touch()
        opened.append(fd)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", release_of_another)
    lock = DirectoryLock.acquire(str(tmp_path))
    assert len(opened) == 3
    assert "another save" in start(TRY).line()
    monkeypatch.undo()
    lock.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_saved_to_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """Refusing every save there would be worse than not refusing a second one."""
    monkeypatch.setattr(fcntl, "flock", fail_with(number))
    with caplog.at_level(logging.WARNING, logger=commit.__name__):
        lock = DirectoryLock.acquire(str(tmp_path))
    assert "this file system has no locks" in caplog.text
    lock.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.EINTR])
def test_a_lock_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """With the system's number, and without a descriptor left open."""
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", fail_with(number))
    with pytest.raises(TransferError) as caught:
        DirectoryLock.acquire(str(tmp_path))
    assert (caught.value.path, caught.value.errno) == (str(tmp_path / LOCK_NAME), number)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_directory_that_does_not_exist_cannot_be_held(tmp_path: Path) -> None:
    """It is made before it is locked; if it is gone, that is an error with its name."""
    with pytest.raises(TransferError) as caught:
        DirectoryLock.acquire(str(tmp_path / "gone"))
    assert caught.value.errno == errno.ENOENT
