"""A disk that fills up: the run stops, looks unfinished, and goes on once there is room."""

import gc
import resource
import subprocess

import pytest

from actors.storage.files import Directory
from orchestrator.backend.local import LocalExecutor
from orchestrator.phases.open_run import open_run
from orchestrator.run import run_on
from orchestrator.rundir.layout import READY
from planners.errors import StorageError
from tests.bad_input.refusals import attempt
from tests.builders import compress_local, result_files

IGNORE = [].append


@pytest.fixture
def disk(tmp_path):
    """A small file system; returns a function that gives it a size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"may not mount a file system: {done.stderr.strip()}")

    def resize(kilobytes):
        size = f"remount,size={kilobytes}k"
        subprocess.run(["mount", "-o", size, folder], check=True)
        return folder

    yield resize
    gc.collect()  # the frames of what failed, which hold pages of files there
    subprocess.run(["umount", folder], check=True)


def go_on(model, out):
    prepared = attempt(model, out, calibration__microbatch_tokens=96)
    open_run(prepared)
    return run_on(prepared, LocalExecutor(), listener=IGNORE)


def unfinished(out):
    """See that nothing in a run directory looks finished."""
    assert not (out / READY).exists()
    assert not (out / "report.json").exists()
    return not list(out.rglob("*.tmp"))


def test_a_run_on_a_disk_that_fills_up_goes_on_once_there_is_room(sound, disk, tmp_path):
    compress_local(sound, tmp_path / "undisturbed")
    out = disk(64) / "run"
    stopped = set()
    for kilobytes in (64, 200, 360, 520):
        disk(kilobytes)
        with pytest.raises(StorageError, match="no space left on the disk") as caught:
            go_on(sound, out)
        assert caught.value.exit_code == 6
        assert str(out) in str(caught.value)
        assert unfinished(out)
        stopped.add(len(list((out / "records").glob("*.json"))) if out.exists() else 0)
    assert len(stopped) > 2, "it got further each time"
    disk(50_000)
    assert go_on(sound, out)["verdict"] == "READY"
    assert result_files(out) == result_files(tmp_path / "undisturbed")


def test_a_full_disk_is_found_out_before_a_cluster_is_asked_for(sound, disk):
    folder = disk(64)
    with pytest.raises(OSError, match="No space left"):
        (folder / "other").write_bytes(bytes(10**6))
    prepared = attempt(sound, folder / "run")
    with pytest.raises(StorageError, match="no space left on the disk"):
        open_run(prepared)
    assert unfinished(folder / "run")


def write_in_pieces(directory, name):
    with directory.writing(name) as stream:
        for _ in range(100):
            stream.write(bytes(1000))


def test_a_file_is_whole_or_not_there_when_the_disk_fills_up(disk):
    folder = disk(64)
    directory = Directory(str(folder))
    directory.write("old", b"x" * 1000)
    with pytest.raises(StorageError, match="new: no space left on the disk"):
        write_in_pieces(directory, "new")
    with pytest.raises(StorageError, match="old: no space left on the disk"):
        directory.write("old", bytes(100_000))
    assert directory.names() == ["old"]
    assert directory.read("old") == b"x" * 1000


def test_a_limit_on_the_size_of_files_is_no_traceback(sound, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large") as caught:
            go_on(sound, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / "run") in str(caught.value)
    assert unfinished(tmp_path / "run")
