"""Stage folders: what is finished is not redone, what is not leaves nothing that looks so."""

import json
import os

import pytest

from nemo_minitron.artifacts import MANIFEST, Job, Manifest, fingerprint, versions, write_json
from nemo_minitron.errors import MinitronError, OutputExistsError


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
