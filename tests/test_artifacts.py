"""Stage folders: what is finished is not redone, what is not leaves nothing that looks so."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from nemo_minitron.artifacts import MANIFEST, Manifest, fingerprint, versions, write_json
from nemo_minitron.errors import EngineError, MinitronError, OutputExistsError
from nemo_minitron.jobs import Job


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


def test_what_is_no_manifest_is_refused(tmp_path):
    with pytest.raises(MinitronError, match="is missing"):
        Manifest.read(tmp_path)
    for text in ("{", "[]", '{"stage": "prune"}', '{"unknown": 1}'):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(MinitronError, match="not a manifest"):
            Manifest.read(tmp_path)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"folder": tmp_path, "manifest": Manifest(stage="s", key="k", inputs={}, config={}, seed=0)})
    assert json.loads(path.read_text())["manifest"]["stage"] == "s"
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert json.loads(path.read_text())["folder"] == str(tmp_path)


# Archives


def archive_job(folder: Path, value: int = 1, **fields) -> Job:
    return Job(stage="toy", output=folder / "model.nemo", config={"value": value}, **fields)


def write_archive(value: int):
    """Work that leaves a small tar and a log."""

    def work(partial: Path) -> dict:
        (partial / "content").write_text(str(value))
        with tarfile.open(partial / "model.nemo", "w") as archive:
            member = archive.gettarinfo(partial / "content", "./content")
            member.mtime = 0
            with (partial / "content").open("rb") as file:
                archive.addfile(member, file)
        (partial / "content").unlink()
        (partial / "logs").mkdir()
        (partial / "logs" / "engine.log").write_text("said")
        return {"metrics": {"value": value}}

    return work


def test_an_archive_carries_its_manifest_and_leaves_its_logs_beside_it(tmp_path):
    made = archive_job(tmp_path).run(write_archive(1))
    with tarfile.open(tmp_path / "model.nemo") as archive:
        assert archive.getnames() == ["./content", "./manifest.json"]
    assert Manifest.read(tmp_path / "model.nemo") == made
    assert (tmp_path / "model.nemo.logs" / "logs" / "engine.log").read_text() == "said"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.nemo", "model.nemo.logs"]
    assert archive_job(tmp_path).run(pytest.fail) == made


def test_equal_archives_have_equal_fingerprints_though_their_manifests_differ(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        archive_job(tmp_path / name).run(write_archive(1))
    one, other = (tmp_path / name / "model.nemo" for name in "ab")
    assert one.read_bytes() != other.read_bytes()
    assert fingerprint(one) == fingerprint(other)
    (tmp_path / "c").mkdir()
    archive_job(tmp_path / "c").run(write_archive(2))
    assert fingerprint(tmp_path / "c" / "model.nemo") != fingerprint(one)


def test_an_archive_is_replaced_only_when_asked_for(tmp_path):
    archive_job(tmp_path).run(write_archive(1))
    with pytest.raises(OutputExistsError, match="other settings"):
        archive_job(tmp_path, 2).run(pytest.fail)
    archive_job(tmp_path, 2, overwrite=True).run(write_archive(2))
    assert Manifest.read(tmp_path / "model.nemo").metrics == {"value": 2}


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"\0" * 10240])
def test_a_file_that_is_no_archive_of_ours_is_left_alone(tmp_path, content):
    (tmp_path / "model.nemo").write_bytes(content)
    with pytest.raises(OutputExistsError, match="not the output of an earlier run"):
        archive_job(tmp_path).run(pytest.fail)
    assert (tmp_path / "model.nemo").read_bytes() == content


# Locks and full disks

HOLDER = """
import sys, time
from pathlib import Path
from nemo_minitron.jobs import Job

def work(partial):
    (partial / "half").write_text("half")
    print("working", flush=True)
    time.sleep(60)

Job(stage="toy", output=Path(sys.argv[1]), config={}).run(work)
"""


def test_two_processes_do_not_make_the_same_output_and_a_killed_one_leaves_it_free(tmp_path):
    output = tmp_path / "result"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(output)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "working\n"
        with pytest.raises(EngineError, match=rf"being made by another process \({holder.pid} on "):
            Job(stage="toy", output=output, config={}).run(pytest.fail)
        assert (tmp_path / ".result.partial" / "half").exists()
    finally:
        holder.kill()
        holder.wait()
    done = Job(stage="toy", output=output, config={}).run(lambda partial: {"metrics": {"value": 1}})
    assert done.metrics == {"value": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs import Job

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

def work(partial):
    (partial / "large").write_bytes(bytes(200_000))
    return {}

try:
    Job(stage="toy", output=Path(sys.argv[1]), config={}).run(work)
except MinitronError as error:
    print(error)
"""


def test_a_full_disk_ends_with_a_message_and_nothing_half_made(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "result")], capture_output=True, text=True, check=True
    )
    assert f"no space left on the disk of {tmp_path}/result while writing it" in done.stdout
    assert not list(tmp_path.iterdir())
