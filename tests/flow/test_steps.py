"""A flow's steps as data: what they are called, what they read of each other, and what runs them."""

import dataclasses
import json
import pkgutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_minitron.artifacts.stages import COMMANDS, MODELS, STAGES, TRAININGS, model_name, stage_name
from nemo_minitron.config import commands
from nemo_minitron.config.compose import compose
from nemo_minitron.config.schemas.base import all_problems
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.flow.models import MADE_BY, as_asked, student_architecture
from nemo_minitron.flow.settle import settle, with_found
from nemo_minitron.flow.steps import KINDS, steps

#: With everything that a flow may have.
WHOLE = [
    "instruct.data=rows.jsonl",
    "prune.students.third.num_layers=4",
    "prune.students.best={search:{parameters:60%,steps:10},untie:true}",
]


def planned(*settings: str):
    return steps(settle(compose("flow", ["output_dir=run", *WHOLE, *settings])).config)


def test_every_kind_has_a_name_and_a_function_in_the_order_of_the_flow():
    assert list(KINDS) == list(STAGES)
    for kind in KINDS.values():
        for function in filter(None, (kind.function, kind.output)):
            assert callable(pkgutil.resolve_name(function)), function
    assert list(MODELS) == list(MADE_BY) and {f"evaluate {model}" for model in MODELS} < set(KINDS)
    assert set(COMMANDS.values()) <= set(commands.COMMANDS) and set(TRAININGS) < set(COMMANDS)


def test_a_flow_with_everything_has_every_kind_and_no_two_steps_share_name_or_folder():
    everything = planned()
    assert {step.kind for step in everything} == set(KINDS)
    assert len({step.name for step in everything}) == len({step.output for step in everything}) == len(everything)
    students = [step.student for step in everything if step.kind == "prune"]
    assert students == ["depth", "width", "third", "best"]
    alone = {
        step.kind for step in planned("distill.control=false", "facts=0", "instruct.data=null", "~prune.students.best")
    }
    assert set(KINDS) - alone == {"retrain", "evaluate control", "instruct", "facts", "search"}


def test_a_folder_names_its_stage():
    for step in planned():
        folder = step.output.relative_to("run").as_posix()
        if STAGES[step.kind].folder:
            assert folder == STAGES[step.kind].placed(step.student) and stage_name(folder, "?") == step.name
    assert stage_name("a-b-pruned", "prune") == "prune a-b" and stage_name("evaluations/a-b", "") == "evaluate a b"
    assert stage_name("mine", "distill") == "distill (mine)" and stage_name("", "prune") == "prune"
    assert stage_name("scores.depth-block-loss-2", "scan") == "scan blocks (block-loss-2)"
    assert model_name("a-b-control") == ("a-b control", "a-b", "control")
    assert model_name("teacher-corrected") == ("teacher corrected", None, "corrected")


@pytest.mark.parametrize("settings", [[], ["distill.control=false"], ["data.source=prose"]])
def test_a_step_reads_what_steps_before_it_made_and_writes_its_folder(settings):
    made: list[Path] = []
    for step in planned(*settings):
        writes = Path(step.config.output)
        if step.kind not in ("score", "scan", "refit"):  # theirs is the configuration of the cut that they are for
            assert writes == step.output
        for path in paths(dataclasses.asdict(step.config)):
            assert any(path.is_relative_to(folder) for folder in (*made, step.output, writes)), (step.name, path)
        made.append(step.output)


def paths(value) -> list[Path]:
    """Paths below the run's folder that a configuration names, its experiment's folder aside."""
    if isinstance(value, dict):
        return [path for name, entry in value.items() if name != "exp_dir" for path in paths(entry)]
    if isinstance(value, list):
        return [path for entry in value for path in paths(entry)]
    return [Path(value)] if isinstance(value, str) and value.startswith("run/") else []


def test_the_control_differs_from_the_distillation_by_its_losses_alone():
    by_kind = {step.kind: step.config for step in planned("distill.teach=never") if step.student == "width"}
    distilled, control = by_kind["distill"], by_kind["retrain"]
    assert control.kd.kd_weight == 0.0 and control.model.kd_teacher_restore_from_path is None
    assert distilled.model.kd_teacher_restore_from_path == "run/teacher"
    same = dataclasses.replace(control, kd=distilled.kd, exp_manager=distilled.exp_manager)
    same.model = dataclasses.replace(
        control.model,
        nemo_path=distilled.model.nemo_path,
        kd_teacher_restore_from_path=distilled.model.kd_teacher_restore_from_path,
    )
    assert same == distilled


def test_the_teacher_answers_once_where_that_pays(monkeypatch):
    """For two students and more, or several epochs, if the disk has room; distill.teach says otherwise."""
    one = [
        *(f"~prune.students.{name}" for name in ("depth", "third", "best")),
        "data.words=2000000",
        "distill.max_steps=10",
    ]
    monkeypatch.setattr("nemo_minitron.flow.answers.shutil.disk_usage", lambda place: SimpleNamespace(free=10**13))
    for settings, keeps in (
        ([], True),
        (["distill.teach=never"], False),
        (one, False),
        ([*one, "distill.teach=always"], True),
        ([*one, "distill.max_steps=100000"], True),
        (["distill.kd.hidden.weight=1"], False),
        (["distill.kd.teacher=elsewhere"], False),
    ):
        made = planned(*settings)
        assert ("teach" in [step.kind for step in made]) is keeps, settings
        (distilled,) = (step.config for step in made if step.kind == "distill" and step.student == "width")
        assert (distilled.kd.teacher == "run/answers") is keeps
        assert (distilled.model.kd_teacher_restore_from_path is None) is keeps
        control = next(step.config for step in made if step.kind == "retrain")
        assert control.model.data.windows == distilled.model.data.windows == ("fixed" if keeps else "auto")
    monkeypatch.setattr("nemo_minitron.flow.answers.shutil.disk_usage", lambda place: SimpleNamespace(free=10**7))
    assert "teach" not in [step.kind for step in planned()]


def test_a_searched_student_is_planned_for_its_budget_and_then_for_the_winner(tmp_path):
    """In proportion to the teacher first; then as search.json says, with no scan where the winner has all layers."""
    output = f"output_dir={tmp_path}"
    settled = settle(compose("flow", [output, *WHOLE]))
    teacher, config = settled.teacher, settled.config
    assumed = student_architecture(config, teacher, "best")
    assert abs(assumed.parameters() / (0.6 * teacher.parameters()) - 1) < 0.05
    assert assumed.num_layers < teacher.num_layers and assumed.hidden_size < teacher.hidden_size
    before = {step.kind: step for step in steps(config) if step.student == "best"}
    search = before["search"].config
    assert (search.search.parameters, search.search.steps, search.prune.untie) == ("60%", 10, True)
    assert search.kd == config.distill.kd and search.model.optim == before["distill"].config.model.optim
    assert before["prune"].config.prune.refit == "once" and "refit" not in before and "scan" in before
    for part in ("num_samples", "num_block_samples", "scores_path"):
        assert getattr(search.prune, part) == getattr(before["prune"].config.prune, part), part
    assert before["distill"].config.model.restore_from_path == f"{tmp_path}/best-search/student"
    assert before["retrain"].config.model.restore_from_path == f"{tmp_path}/best-pruned"
    winner = teacher.with_sizes(ffn_hidden_size=192)
    told = {"teacher": {"architecture": teacher.to_dict()}, "winner": {"architecture": winner.to_dict()}}
    (tmp_path / "best-search").mkdir()
    (tmp_path / "best-search" / "search.json").write_text(json.dumps(told))
    assert with_found(settled).config == config  # no search that has ended
    (tmp_path / "best-search" / "manifest.json").write_text("{}")
    for found in (with_found(settled), settle(compose("flow", [output, *WHOLE]))):
        after = {step.kind: step for step in steps(found.config) if step.student == "best"}
        assert before.keys() - after.keys() == {"scan"} and after["search"] == before["search"]
        assert after["prune"].config.prune.ffn_hidden_size == 192 and after["prune"].config.prune.hidden_size is None
        assert found.work.keys() == {step.name for step in steps(found.config)}
        assert as_asked(found.config)["prune"]["students"]["best"] == {
            "search": {"parameters": "60%", "steps": 10},
            "untie": True,
        }
    (tmp_path / "best-search" / "search.json").write_text("[]")
    with pytest.raises(MinitronError, match="search.json names no winner: remove .*best-search"):
        settle(compose("flow", [output, *WHOLE]))


def test_a_flow_on_a_blend_reads_it_in_every_stage(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_text("some text\n" * 400)
    sources = {"wiki": str(tmp_path / "a"), "code": str(tmp_path / "b")}
    named = ",".join(f"{name}:{path}" for name, path in sources.items())
    blend = {"wiki": 1, "code": 2, "rows.jsonl": 1}
    settings = [f"data.sources={{{named}}}", "data.blend={wiki:1,code:2,rows.jsonl:1}", "data.dynamic=true"]
    settings.append("~prune.students.best")
    with pytest.raises(ConfigError, match="distill: dynamic shares .* after 2 x val_check_interval = 150 steps"):
        planned(*settings)
    of = {step.kind: step.config for step in planned(*settings, "distill.val_check_interval=50")}
    assert not {"broad", "facts"} & set(of) and of["data"].sources == sources and of["data"].source == "embedded"
    for kind in ("pretrain", "correct", "score", "scan", "refit", "prune", "distill", "retrain"):
        assert of[kind].model.data.blend == blend, kind
        assert of[kind].model.data.dynamic == (kind == "distill"), kind
    for kind in (kind for kind in of if kind.startswith("evaluate")):
        assert of[kind].model.data.blend == {"wiki": 1, "code": 2}, kind
    assert of["instruct"].model.data.instructions == "rows.jsonl" and of["instruct"].model.data.blend is None
    assert not [problem for config in of.values() for problem in all_problems(config)]
    with pytest.raises(ConfigError, match="gives code of sources no weight"):
        planned(settings[0], "data.blend={wiki:1}")
    with pytest.raises(ConfigError, match="sources and blend go together"):
        planned(settings[1])
    with pytest.raises(ConfigError, match="students.best: a search reads one text, and data.sources names several"):
        planned(*settings[:2])
