"""`minitron report`: page and JSON of a run, of one stage, of half a run, of several; hostile and missing input."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest

import made_runs
from nemo_minitron.artifacts import Manifest, fingerprint
from nemo_minitron.cli import main as cli
from nemo_minitron.report.collect import collect
from nemo_minitron.report.command import draw
from nemo_minitron.report.pictures import pictures_of
from nemo_minitron.report.stages import log_file, log_files

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(1)>\"'&$\\frac{\x00\ud800"


class Page(HTMLParser):
    """Tags, attributes and text of a page, each tag's nesting checked."""

    VOID = ("meta", "img", "source")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.values, self.open, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.values += [(tag, name, value) for name, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, name: str) -> list[str]:
        return [value for _, key, value in self.values if key == name]


def page_of(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def check_self_contained(path) -> Page:
    page = page_of(path)
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    for name in ("src", "srcset", "href"):
        assert all(value.startswith("data:image/svg+xml;base64,") for value in page.of(name))
    assert not [name for _, name, _ in page.values if name.startswith("on")]
    css = re.findall(r"<style>(.*?)</style>", path.read_text(encoding="utf-8"), re.DOTALL)
    assert len(css) == 1 and "url(" not in css[0] and "@import" not in css[0]
    return page


@pytest.fixture
def run(tmp_path):
    return made_runs.flow(tmp_path / "run")


@pytest.fixture
def small(tmp_path):
    return made_runs.small(tmp_path / "run")


def test_a_run_becomes_a_page_and_its_json(run, capsys):
    assert cli.main(["report", str(run)]) == 0
    assert f"page: {run / 'report.html'}" in capsys.readouterr().out
    page = check_self_contained(run / "report.html")
    report = json.loads((run / "report.json").read_text())
    names = [picture["name"] for picture in report["pictures"]]
    assert [value for value in page.of("id") if value.startswith("picture-")] == [f"picture-{name}" for name in names]
    assert len(names) == 20 and len(set(page.of("id"))) == len(page.of("id"))
    assert page.tags.count("img") == len(names) and all(page.of("alt"))
    assert all(picture["svg"].startswith("<?xml") for picture in report["pictures"])
    losses = {row["model"].replace(" ", "-"): row["test"]["loss"] for row in report["table"]}
    assert losses == made_runs.LOSSES
    for loss in losses.values():
        assert f"{loss:.4f}" in page.texts
    for stage in report["stages"]:
        manifest = Manifest.read(run / stage["folder"])
        assert (stage["seconds"], stage["peak_memory_bytes"], stage["config"]) == (
            manifest.timings["total_seconds"], manifest.peak_memory_bytes, manifest.config,
        )  # fmt: skip
        assert stage["stage"] in page.texts
    for text in ("75.0% ± 12.5", "66.7% ± 21.1", "50.0% ± 50.0"):
        assert text in page.texts
    assert report["facts"] == made_runs.knowledge()
    assert report["missing"] == [] and report["environment"]["versions"]["torch"] == "2.13.0"


def test_a_report_may_be_written_over_itself_in_the_same_bytes(small):
    assert cli.main(["report", str(small)]) == 0
    first = {name: (small / name).read_bytes() for name in ("report.html", "report.json")}
    assert cli.main(["report", str(small)]) == 0
    assert first == {name: (small / name).read_bytes() for name in first}


@pytest.mark.parametrize("name", ["report.html", "report.json"])
def test_a_report_is_written_over_nothing_else(small, capsys, name):
    (small / name).write_text("my notes")
    assert cli.main(["report", str(small)]) == 1
    assert "is no report" in capsys.readouterr().err
    assert (small / name).read_text() == "my notes" and len(list(small.glob("report.*"))) == 1
    assert cli.main(["report", str(small), "overwrite=true"]) == 0
    assert (small / name).read_text() != "my notes"


def test_the_page_goes_where_it_is_asked(small, tmp_path):
    assert cli.main(["report", str(small), f"output={tmp_path}/pages/mine.html"]) == 0
    assert cli.main(["report", str(small), f"output={tmp_path}/folder"]) == 0
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*.*") if path.is_file()
                     and path.suffix in (".html", ".json"))  # fmt: skip
    assert written == ["folder/report.html", "folder/report.json", "pages/mine.html", "pages/mine.json"]
    assert not list(small.glob("report.*"))


@pytest.mark.parametrize(
    ("folder", "pictures"),
    [
        ("teacher", ["losses-stage", "cost"]),
        ("scores", ["block-influence", "hidden-curve", "hidden-map", "ffn-curve", "ffn-map", "heads-map", "cost"]),
        ("depth-pruned", ["shapes", "cost"]),
        ("scores.depth-block-loss-2", ["block-losses", "cost"]),
        ("evaluations/teacher", ["cost"]),
    ],
)
def test_a_single_stage_is_a_run_too(run, folder, pictures):
    before = fingerprint(run / folder)
    assert cli.main(["report", str(run / folder)]) == 0
    report = json.loads((run / folder / "report.json").read_text())
    assert [picture["name"] for picture in report["pictures"]] == pictures and report["missing"] == []
    check_self_contained(run / folder / "report.html")
    assert fingerprint(run / folder) == before  # or every stage that reads this one would be made again


def test_half_a_run_shows_what_is_there_and_says_what_is_missing(run, capsys):
    for name in ("width-pruned", "width-distilled", "width-control", "depth-control", "depth-distilled", "scores"):
        shutil.rmtree(run / name)
    for name in ("depth-distilled", "width-distilled", "width-control", "teacher-corrected"):
        shutil.rmtree(run / "evaluations" / name)
    partial = run / ".depth-distilled.partial"
    partial.mkdir()
    (partial / "partial.json").write_text(json.dumps({"stage": "distill", "key": "k"}))
    assert cli.main(["report", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert [stage["stage"] for stage in report["unfinished"]] == ["distil depth"]
    said = "\n".join(report["missing"])
    assert "distil depth has not ended" in said
    assert "evaluate teacher corrected is not done: evaluations/teacher-corrected is missing" in said
    assert "evaluate depth distilled is not done" in said
    assert said in capsys.readouterr().out.replace("not there: ", "")
    rows = {row["model"]: row for row in report["table"]}
    assert set(rows) == {"teacher", "depth pruned", "depth control", "width pruned"}
    assert all(row["gap_closed"] is None for row in rows.values())
    assert set(report["missing"]) <= {text.strip() for text in check_self_contained(run / "report.html").texts}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: (run / "teacher" / "manifest.json").write_text("{"), "teacher/manifest.json is not a manifest"),
        (lambda run: (run / "scores" / "scores.safetensors").write_bytes(b"\x08"), "scores.safetensors cannot be read"),
        (lambda run: (run / "scores" / "scores.safetensors").unlink(), "scores.safetensors cannot be read"),
        (lambda run: change(run / "depth-pruned", details={}), "depth-pruned: its manifest does not say what was cut"),
        (lambda run: change(run / "evaluations" / "teacher", metrics={"test": 1}), "evaluations/teacher: its manifest"),
        (lambda run: change(run / "evaluations" / "facts", metrics={"facts": {}}), "evaluations/facts: its manifest"),
        (lambda run: change(run / "scores.depth-block-loss-2", details={}), "holds no scan of blocks"),
        (lambda run: change(run / "teacher", peak_memory_bytes="much"), "peak_memory_bytes is not a number"),
    ],
)
def test_what_is_damaged_is_left_out_and_said(run, damage, said):
    damage(run)
    found = collect(run)
    assert said in "\n".join(found["missing"])
    assert [picture.name for picture in pictures_of(found)]


def test_a_run_with_much_damaged_still_has_a_page(run):
    (run / "scores" / "scores.safetensors").write_bytes(b"\x08")
    for name in ("depth-pruned", "width-pruned", "scores.depth-block-loss-2"):
        change(run / name, details={})
    for name in ("teacher-corrected", "depth-pruned", "depth-distilled"):
        change(run / "evaluations" / name, metrics={})
    for name in ("teacher", "teacher-pretrained", "depth-distilled", "width-distilled"):
        change(run / name, metrics={"train": 3, "validation": [3]})
    assert cli.main(["report", str(run)]) == 0
    assert len(json.loads((run / "report.json").read_text())["missing"]) == 7
    check_self_contained(run / "report.html")


def change(folder, **fields) -> None:
    manifest = Manifest.read(folder)
    for name, value in fields.items():
        setattr(manifest, name, value)
    manifest.write(folder)


def test_nothing_in_a_run_becomes_markup(run):
    shutil.rmtree(run / "scores")
    shutil.rmtree(run / "width-pruned")
    for folder in (run / "teacher", run / "depth-pruned", run / "evaluations" / "depth-pruned"):
        manifest = Manifest.read(folder)
        change(folder, config={HOSTILE: {HOSTILE: [HOSTILE]}}, versions={HOSTILE: HOSTILE}, created=HOSTILE,
               seed=HOSTILE, inputs={HOSTILE: {"path": HOSTILE, "fingerprint": HOSTILE}},
               metrics=manifest.metrics | {HOSTILE: "x"}, timings=manifest.timings | {HOSTILE: HOSTILE})  # fmt: skip
    manifest = Manifest.read(run / "teacher")
    history = {
        split: [{**line, "<b>loss": 1.0} for line in manifest.metrics[split]] for split in ("train", "validation")
    }
    change(run / "teacher", metrics=manifest.metrics | history)
    told = {"stages": [{"folder": "teacher", "stage": HOSTILE}], "table": [1], "config": {HOSTILE: HOSTILE},
            "environment": {HOSTILE: HOSTILE}, "cuts": HOSTILE}  # fmt: skip
    (run / "report.json").write_text(json.dumps(told))
    assert cli.main(["report", str(run)]) == 0
    page = check_self_contained(run / "report.html")
    assert any("<script>alert(1)</script>" in text for text in page.texts)
    assert "<script" not in (run / "report.html").read_text(encoding="utf-8")


def test_numbers_that_are_none_and_none_that_are_not_finite_are_left_out(small):
    manifest = Manifest.read(small / "teacher")
    lines = [*manifest.metrics["train"], {"step": 21, "lm_loss": float("nan")}, {"step": "x", "lm_loss": 1.0}, 3,
             {"step": 22, "lm_loss": True}]  # fmt: skip
    change(small / "teacher", metrics=manifest.metrics | {"train": lines, "result_step": "last"})
    history = collect(small)["histories"]["teacher"]
    assert [line["step"] for line in history["train"] if "lm_loss" in line] == list(range(1, 21))
    assert history["result_step"] is None
    assert cli.main(["report", str(small)]) == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "no such run"),
        (lambda path: path.mkdir(), "is not a run"),
        (lambda path: path.write_text("text"), "is not a run"),
        (lambda path: (path / "data").mkdir(parents=True), "is not a run"),
    ],
)
def test_what_is_no_run_is_refused_and_nothing_written(tmp_path, capsys, make, said):
    make(tmp_path / "thing")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["report", str(tmp_path / "thing")]) == 1
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib_a_report_says_what_to_install_and_a_flow_is_done_all_the_same(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(small)]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    draw(small)
    assert f"then `minitron report {small}`" in capsys.readouterr().err
    assert not list(small.glob("report.*"))
    monkeypatch.undo()
    (small / "report.html").write_text("my notes")
    draw(small)
    assert "is no report" in capsys.readouterr().err and (small / "report.html").read_text() == "my notes"


def test_arguments_are_checked(small, tmp_path, capsys):
    assert cli.main(["report"]) == 2 and "runs is missing" in capsys.readouterr().err
    assert cli.main(["report", str(small), f"{small}/"]) == 2 and "named twice" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert cli.main(["report", str(small), f"output={tmp_path}/file/page.html"]) == 2
    assert "is a file" in capsys.readouterr().err


def test_runs_are_compared_on_one_page(run, tmp_path, monkeypatch):
    other = made_runs.flow(tmp_path / "elsewhere" / "run", students=("depth",), shift=0.5)
    third = made_runs.flow(tmp_path / "third", shift=0.25)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(run), str(other), str(third)]) == 0
    page = check_self_contained(tmp_path / "compare.html")
    report = json.loads((tmp_path / "compare.json").read_text())
    # Two of the same name are told apart by their paths.
    assert [entry["name"] for entry in report["runs"]] == [str(run), str(other), "third"]
    assert len([text for text in page.texts if text == "depth distilled"]) == 3
    for shift in (0.0, 0.5, 0.25):
        assert f"{1.25 + shift:.4f}" in page.texts
    assert report["differences"] == [
        {"stage": "teacher correction", "setting": "model.optim.lr", "values": [1e-3, 1e-3 + 0.5, 1e-3 + 0.25]}
    ]
    assert not list(run.glob("report.*"))


def test_log_files_are_named(run):
    for folder in ("teacher/logs", ".width-control.partial/logs", "evaluations/teacher/logs", "student.nemo.logs/logs"):
        (run / folder).mkdir(parents=True)
        (run / folder / "engine.log").write_text("chatter")
    found = log_files(run)
    assert set(found) == {"teacher", "width-control", "evaluations/teacher", "student.nemo.logs"}
    assert all(path.read_text() == "chatter" for path in found.values())
    assert log_file(run / "student.nemo") == run / "student.nemo.logs" / "logs" / "engine.log"
    assert log_file(run / "data") is None
    stages = {stage["folder"]: stage["log"] for stage in collect(run)["stages"]}
    assert stages["teacher"] == "teacher/logs/engine.log" and stages["data"] is None
