"""One atomic write for the whole product: the old file or the new one, and nothing beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.stores.recording_files import RecordingFiles

STEPS = ["write", "sync_file", "rename", "sync_folder"]


@pytest.mark.parametrize("failing", range(1, 5))
def test_a_write_that_fails_leaves_the_old_file_or_the_new_one_and_nothing_else(tmp_path: Path, failing: int) -> None:
    def fail(step: int) -> None:
        if step == failing:
            raise OSError(STEPS[step - 1])

    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match=STEPS[failing - 1]):
        RecordingFiles(fail).write_atomic(target, b"new")
    assert target.read_bytes() == (b"old" if failing < 4 else b"new")
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("durable", "steps"), [(True, STEPS), (False, ["write", "rename"])])
def test_a_durable_write_is_synced_before_and_after_its_rename(tmp_path: Path, durable: bool, steps: list[str]) -> None:
    files = RecordingFiles()
    files.write_atomic(tmp_path / "file", memoryview(b"data"), durable=durable)
    assert [operation for operation, _ in files.steps] == steps
    assert (tmp_path / "file").read_bytes() == b"data"
