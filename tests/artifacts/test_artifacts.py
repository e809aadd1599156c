"""Stage folders: what is finished is not redone, what is not leaves nothing that looks so."""

import errno
import fcntl
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from nemo_minitron.artifacts import MANIFEST, Manifest, fingerprint, sampled_fingerprint, versions, write_json
from nemo_minitron.config import TrainerConfig
from nemo_minitron.errors import EngineError, MinitronError, OutputExistsError
from nemo_minitron.jobs import lock as locks
from nemo_minitron.jobs.job import Job
from nemo_minitron.launch.ranks import run_stage


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "a").write_text("1")
    return folder


@pytest.fixture
def job(tmp_path, source):
    def make(**changes):
        stage = {"stage": "prune", "output": tmp_path / "out", "config": {"size": 1}, "inputs": {"teacher": source}}
        return Job(**{**stage, **changes})

    return make


def work(text="result"):
    def write(folder):
        (folder / "weights").write_text(text)
        return {"metrics": {"loss": 1.5}}

    return write


def fail(folder):
    (folder / "weights").write_text("half")
    raise RuntimeError("died")


def never(folder):
    raise AssertionError("worked again")


def left(job):
    return sorted(entry.name for entry in job.output.parent.iterdir() if entry.name != "source")


def test_a_finished_job_has_its_manifest_and_nothing_beside_it(job):
    done = job().run(work())
    assert left(job()) == ["out"]
    assert done == Manifest.read(job().output)
    assert (done.stage, done.metrics, done.config) == ("prune", {"loss": 1.5}, {"size": 1})
    assert done.inputs["teacher"]["fingerprint"] == fingerprint(job().inputs["teacher"])
    assert done.timings["total_seconds"] >= 0
    assert done.peak_memory_bytes > 0
    assert done.versions == versions()


def test_the_same_job_is_not_run_again(job):
    first = job().run(work())
    assert job().run(never) == first
    assert job(overwrite=True).run(never) == first
    assert job(config={"size": 1, "overwrite": True}).run(never) == first


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"config": {"size": 2}}, r"other settings \(size\)"),
        ({"seed": 7}, r"other settings \(seed\)"),
        ({"stage": "distill"}, "made by `prune`, not by `distill`"),
    ],
)
def test_the_output_of_another_job_is_refused_unless_overwritten(job, changes, reason):
    job().run(work("old"))
    with pytest.raises(OutputExistsError, match=reason):
        job(**changes).run(never)
    assert (job().output / "weights").read_text() == "old"
    job(**changes, overwrite=True).run(work("new"))
    assert (job().output / "weights").read_text() == "new"
    assert left(job()) == ["out"]


def test_another_input_is_another_job(job, source):
    job().run(work())
    (source / "weights" / "a").write_text("2")
    with pytest.raises(OutputExistsError, match="made from another teacher than"):
        job().run(never)


def test_a_folder_of_the_user_is_refused_and_an_empty_one_taken(job):
    job().output.mkdir()
    (job().output / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not the output of an earlier run"):
        job().run(never)
    (job().output / "notes.txt").unlink()
    job().run(work())
    assert (job().output / MANIFEST).is_file()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_files_and_links_are_replaced_only_on_demand(job, source, kind):
    if kind == "file":
        job().output.write_text("mine")
    else:
        job().output.symlink_to(source)
    with pytest.raises(OutputExistsError):
        job().run(never)
    job(overwrite=True).run(work())
    assert (job().output / "weights").read_text() == "result"
    assert (source / "weights" / "a").read_text() == "1"
    assert left(job()) == ["out"]


def test_work_that_dies_leaves_nothing(job):
    with pytest.raises(RuntimeError):
        job().run(fail)
    assert left(job()) == []


def test_work_that_dies_keeps_the_old_output(job):
    job().run(work("old"))
    with pytest.raises(RuntimeError):
        job(seed=1, overwrite=True).run(fail)
    assert (job().output / "weights").read_text() == "old"


def test_resumable_work_goes_on_where_it_died(job):
    with pytest.raises(RuntimeError):
        job().run(fail, resumable=True)
    assert not job().output.exists()

    def resume(folder):
        assert (folder / "weights").read_text() == "half"
        return {}

    job().run(resume, resumable=True)
    assert left(job()) == ["out"]


def test_resumable_work_of_another_job_starts_anew(job):
    with pytest.raises(RuntimeError):
        job().run(fail, resumable=True)

    def start(folder):
        assert not (folder / "weights").exists()
        return {}

    job(seed=9).run(start, resumable=True)


def test_a_partial_folder_that_nobody_marked_is_thrown_away(job):
    job().partial.mkdir()
    (job().partial / "weights").write_text("whose?")
    assert [entry.name for entry in job().begin().iterdir()] == ["partial.json"]


def test_a_fingerprint_is_of_names_and_contents(source):
    before = fingerprint(source)
    os.utime(source / "weights" / "a", (0, 0))
    write_json(source / MANIFEST, {"created": "now"})
    (source / "logs").mkdir()
    (source / "logs" / "events").write_text("x")
    (source / ".cache").mkdir()
    (source / ".cache" / "x").write_text("x")
    assert fingerprint(source) == before
    (source / "weights" / "a").rename(source / "weights" / "b")
    renamed = fingerprint(source)
    (source / "weights" / "b").write_text("2")
    assert len({before, renamed, fingerprint(source)}) == 3
    assert fingerprint(source / "weights" / "b") != fingerprint(source / MANIFEST)


NO_MANIFESTS = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[]",
    b"[" * 100_000,
    b'{"stage": "prune"}',
    b'{"unknown": 1}',
    b'{"stage": "s", "key": "k", "inputs": {}, "config": [], "seed": 0}',
    b'{"stage": "s", "key": "k", "inputs": {"teacher": "x"}, "config": {}, "seed": 0}',
]


def test_what_is_no_manifest_is_refused(tmp_path):
    with pytest.raises(MinitronError, match="is missing"):
        Manifest.read(tmp_path)
    for text in NO_MANIFESTS:
        (tmp_path / MANIFEST).write_bytes(text)
        with pytest.raises(MinitronError, match="not a manifest"):
            Manifest.read(tmp_path)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"folder": tmp_path, "manifest": Manifest(stage="s", key="k", inputs={}, config={}, seed=0)})
    assert json.loads(path.read_text())["manifest"]["stage"] == "s"
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    path.with_name("folder").mkdir()
    with pytest.raises(OSError):
        write_json(path.with_name("folder"), {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.json", "folder"]
    assert json.loads(path.read_text())["folder"] == str(tmp_path)


# Archives


def archive_job(folder: Path, value: int = 1, **fields) -> Job:
    folder.mkdir(exist_ok=True)
    return Job(stage="toy", output=folder / "model.nemo", config={"value": value}, **fields)


def write_tar(path: Path, name: str, content: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def write_archive(value: int, size: int = 1):
    """Work that leaves a tar and a log, and measures something else each time."""

    def work(partial: Path) -> dict:
        write_tar(partial / "model.nemo", "./content", str(value).encode() * size)
        (partial / "logs").mkdir()
        (partial / "logs" / "engine.log").write_text("said")
        return {"metrics": {"value": value}, "details": {"noise": os.urandom(value + os.urandom(1)[0]).hex()}}

    return work


def test_an_archive_carries_its_manifest_and_leaves_its_logs_beside_it(tmp_path):
    made = archive_job(tmp_path).run(write_archive(1))
    with tarfile.open(tmp_path / "model.nemo") as archive:
        assert archive.getnames() == ["./content", "./manifest.json"]
    assert Manifest.read(tmp_path / "model.nemo") == made
    assert (tmp_path / "model.nemo.logs" / "logs" / "engine.log").read_text() == "said"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.nemo", "model.nemo.logs"]
    assert archive_job(tmp_path).run(pytest.fail) == made


@pytest.mark.parametrize("size", [1, 3_000_000])
@pytest.mark.parametrize("digest", [fingerprint, sampled_fingerprint])
def test_equal_archives_have_equal_fingerprints_though_their_manifests_differ(tmp_path, digest, size):
    for name in "ab":
        archive_job(tmp_path / name).run(write_archive(1, size))
    one, other = (tmp_path / name / "model.nemo" for name in "ab")
    assert one.read_bytes() != other.read_bytes()
    assert digest(one) == digest(other)
    archive_job(tmp_path / "c").run(write_archive(2, size))
    assert digest(tmp_path / "c" / "model.nemo") != digest(one)


@pytest.mark.parametrize("digest", [fingerprint, sampled_fingerprint])
@pytest.mark.parametrize("name", ["other.json", MANIFEST])
def test_the_last_member_of_a_strange_archive_is_content(tmp_path, digest, name):
    path, found = tmp_path / "model.nemo", set()
    for content in (b"1", b"2"):
        write_tar(path, name, content)
        found.add(digest(path))
    assert len(found) == 2


def test_an_archive_is_replaced_only_when_asked_for(tmp_path):
    archive_job(tmp_path).run(write_archive(1))
    with pytest.raises(OutputExistsError, match="other settings"):
        archive_job(tmp_path, 2).run(pytest.fail)
    with pytest.raises(RuntimeError):
        archive_job(tmp_path, 2, overwrite=True).run(fail)
    assert Manifest.read(tmp_path / "model.nemo").metrics == {"value": 1}
    archive_job(tmp_path, 2, overwrite=True).run(write_archive(2))
    assert Manifest.read(tmp_path / "model.nemo").metrics == {"value": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.nemo", "model.nemo.logs"]


def damaged_archives() -> dict[str, bytes]:
    """Files that are no output of ours, or no longer one."""
    named = {name: io.BytesIO() for name in ("truncated", "large")}
    for name, size in (("truncated", 2000), ("large", 17 << 20)):
        with tarfile.open(fileobj=named[name], mode="w") as archive:
            member = tarfile.TarInfo(MANIFEST)
            member.size = size
            archive.addfile(member, io.BytesIO(b" " * size))
    backwards = tarfile.TarInfo("x")
    backwards.size, backwards.type = -512, tarfile.XHDTYPE
    return {
        "empty": b"",
        "garbage": b"garbage" * 100,
        "zeros": bytes(10240),
        "truncated": named["truncated"].getvalue()[:1500],
        "large": named["large"].getvalue(),
        "backwards": backwards.tobuf(tarfile.GNU_FORMAT) * 2,
    }


@pytest.mark.parametrize("name", damaged_archives())
def test_a_file_that_is_no_archive_of_ours_is_left_alone(tmp_path, name):
    content = damaged_archives()[name]
    (tmp_path / "model.nemo").write_bytes(content)
    with pytest.raises(OutputExistsError, match="not the output of an earlier run"):
        archive_job(tmp_path).run(pytest.fail)
    assert (tmp_path / "model.nemo").read_bytes() == content
    archive_job(tmp_path, overwrite=True).run(write_archive(1))
    assert Manifest.read(tmp_path / "model.nemo").metrics == {"value": 1}


@pytest.mark.parametrize("text", NO_MANIFESTS, ids=range(len(NO_MANIFESTS)))
def test_an_archive_with_a_manifest_of_somebody_else_is_left_alone(tmp_path, text):
    write_tar(tmp_path / "model.nemo", MANIFEST, text)
    with pytest.raises(OutputExistsError, match="not the output of an earlier run"):
        archive_job(tmp_path).run(pytest.fail)


# Locks

HOLDER = """
import sys, time
from pathlib import Path
from nemo_minitron.jobs.job import Job

def work(partial):
    (partial / "half").write_text("half")
    print("working", flush=True)
    time.sleep(60)

Job(stage="toy", output=Path(sys.argv[1]), config={}).run(work)
"""


def test_an_output_below_a_file_is_refused_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MinitronError, match="file/result cannot be made: .*; name another folder"):
        Job(stage="toy", output=tmp_path / "file" / "result", config={}).run(pytest.fail)


def test_two_processes_do_not_make_the_same_output_and_a_killed_one_leaves_it_free(tmp_path):
    output = tmp_path / "result"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(output)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "working\n"
        message = rf"{output} is being made by another process \({holder.pid} on {socket.gethostname()}\): wait"
        with pytest.raises(EngineError, match=message):
            Job(stage="toy", output=output, config={}).run(pytest.fail)
        with pytest.raises(EngineError, match=message):
            Job(stage="toy", output=output, config={}).begin()
        assert (tmp_path / ".result.partial" / "half").exists()
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / ".result.lock").exists()
    done = Job(stage="toy", output=output, config={}).run(lambda partial: {"metrics": {"value": 1}})
    assert done.metrics == {"value": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result"]


RACER = """
import sys, time
from pathlib import Path
from nemo_minitron.errors import EngineError
from nemo_minitron.jobs.job import Job

folder = Path(sys.argv[1])

def work(partial):
    with (folder / "runs").open("a") as runs:
        runs.write("run\\n")
    return {}

print("ready", flush=True)
sys.stdin.readline()
while True:
    try:
        Job(stage="toy", output=folder / "result", config={}).run(work)
        break
    except EngineError:
        time.sleep(0.001)
"""


def test_of_many_processes_one_does_the_work(tmp_path):
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        racer.communicate(timeout=60)
    assert [racer.returncode for racer in racers] == [0] * 4
    assert (tmp_path / "runs").read_text() == "run\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result", "runs"]


def test_what_another_process_ended_just_before_the_lock_is_not_made_again(job, monkeypatch):
    take = locks.take

    def after_another(output):
        monkeypatch.setattr(locks, "take", take)
        job().run(work("first"))
        return take(output)

    monkeypatch.setattr(locks, "take", after_another)
    assert job().run(never).metrics == {"loss": 1.5}
    monkeypatch.setattr(locks, "take", after_another)
    with pytest.raises(OutputExistsError):
        job(seed=1).run(never)
    assert (job().output / "weights").read_text() == "first"
    assert left(job()) == ["out"]


def test_a_lock_file_that_was_removed_by_its_holder_is_not_trusted(tmp_path, monkeypatch):
    """Between opening and locking, the holder may remove the file, and a third process make a new one."""
    first, flock = locks.take(tmp_path / "out"), fcntl.flock

    def late(*arguments):
        monkeypatch.setattr(fcntl, "flock", flock)
        locks.release(first)
        return flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    second = locks.take(tmp_path / "out")
    with pytest.raises(EngineError, match="being made"):
        locks.take(tmp_path / "out")
    locks.release(second)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def launched(monkeypatch):
    """Runs a job as one of two ranks that a launcher started; one inside the other, so that none can wait for long."""
    monkeypatch.setattr("nemo_minitron.launch.ranks.WAIT_SECONDS", 1)

    def run(rank: int, job: Job, work, resumable: bool = True):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        trainer = TrainerConfig(devices=2)
        return run_stage(job, work, stage="none", config=None, trainer=trainer, resumable=resumable)

    return run


def test_the_first_rank_alone_takes_the_lock(job, launched):
    def first(partial):
        with pytest.raises(EngineError, match="being made by another process"):
            launched(0, job(), never)
        assert launched(1, job(), lambda shared: {"metrics": {"same": shared == partial}}).metrics == {"same": True}
        return work()(partial)

    assert launched(0, job(), first).metrics == {"loss": 1.5}
    assert left(job()) == ["out"]


@pytest.mark.parametrize("resumable", [True, False])
def test_a_rank_that_fails_frees_the_lock_and_keeps_what_can_go_on(job, launched, resumable):
    with pytest.raises(RuntimeError):
        launched(0, job(), fail, resumable)
    assert left(job()) == ([".out.partial"] if resumable else [])
    assert launched(0, job(), work()).metrics == {"loss": 1.5}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_told_by_every_rank(job, launched, rank):
    def full(partial):
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 1:
        job().begin()
    with pytest.raises(MinitronError, match="no space left on the disk"):
        launched(rank, job(), full)


# Full disks

FULL_DISK = """
import io, resource, sys, tarfile
from pathlib import Path
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.job import Job

output, resumable, large = Path(sys.argv[1]), sys.argv[2] == "resumable", int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (92160, 92160))

def work(partial):
    (partial / "done").write_text("step 1")
    with tarfile.open(partial / output.name, "w") as archive:
        member = tarfile.TarInfo("./content")
        member.size = large
        archive.addfile(member, io.BytesIO(bytes(large)))
    print("worked")
    return {}

try:
    Job(stage="toy", output=output, config={}).run(work, resumable=resumable)
except MinitronError as error:
    print(error)
"""


def fill_disk(output: Path, resumable: bool = False, large: int = 200_000) -> str:
    """Runs out of space where files may have 92160 bytes, at once or after the work; returns the message."""
    kind = "resumable" if resumable else "once"
    command = [sys.executable, "-c", FULL_DISK, str(output), kind, str(large)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", ["result", "model.nemo"])
def test_a_full_disk_ends_with_a_message_and_nothing_half_made(tmp_path, name):
    assert fill_disk(tmp_path / name) == (
        f"no space left on the disk of {tmp_path / name} while writing it: free some, or give another output\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_when_the_manifest_is_written_is_no_different(tmp_path):
    said = fill_disk(tmp_path / "model.nemo", large=90624)  # a tar of 92160 bytes, and no room for a member more
    assert said.startswith("worked\nno space left on the disk")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_what_can_go_on(tmp_path):
    assert "no space left on the disk" in fill_disk(tmp_path / "result", resumable=True)
    assert [path.name for path in tmp_path.iterdir()] == [".result.partial"]
    assert not (tmp_path / ".result.partial" / MANIFEST).exists()

    def resume(partial):
        return {"metrics": {"found": (partial / "done").read_text()}}

    done = Job(stage="toy", output=tmp_path / "result", config={}).run(resume, resumable=True)
    assert done.metrics == {"found": "step 1"}
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
