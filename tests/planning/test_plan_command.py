"""`minitron plan`: its table, its JSON, what it refuses, and that it loads nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import save
from nemo_minitron.architecture import Architecture
from nemo_minitron.cli import main as cli
from nemo_minitron.megatron.layout import Layout
from nemo_minitron.planning.machine import free_memory
from nemo_minitron.planning.memory import stage_memory
from nemo_minitron.planning.run import Run
from nemo_minitron.published import KNOWN

ROOT = Path(__file__).resolve().parents[2]
WIDTH = ["student.hidden_size=3072", "student.ffn_hidden_size=9216"]


def planned(capsys, *arguments) -> dict:
    assert cli.main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments) -> str:
    assert cli.main(["plan", *arguments]) != 0
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_the_table_shows_stages_and_layouts(capsys):
    assert cli.main(["plan", "llama31_8b", *WIDTH]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].startswith("teacher  llama, 32 layers, hidden 4096") and "8.03B parameters" in lines[0]
    assert lines[1].endswith("56.2% of the teacher")
    assert lines[2].startswith("ranks    8 GPUs of 80 GB, bf16 with fp32 main parameters; sequence 8192, micro batch 4")
    starts = [line.split("  ")[0] for line in lines]
    assert [name for name in starts if name in ("finetune", "prune", "distill")] == ["finetune", "prune", "distill"]
    listed = [line for line in lines if line.split("  ")[0].count(" x ") == 2 and not line.startswith("TP")]
    assert len(listed) == 10
    fits = [line.endswith("yes") for line in listed]
    assert fits == sorted(fits, reverse=True) and any(fits) and not all(fits)
    assert "1 x 1 x 8" in text and "finetune needs" in text


def test_json_holds_what_the_functions_give(capsys):
    plan = planned(capsys, "llama31_8b", *WIDTH, "micro_batch_size=2")
    layout = Layout(
        cuda=True, bf16=True, devices=8, tensor_parallel=8, sequence_parallel=True, micro_batch_size=2,
        global_batch_size=128,
    )  # fmt: skip
    run = Run(layout=layout, seq_length=8192, fused_loss=False)
    student = KNOWN["llama31_minitron_4b_width"]
    for stage in ("finetune", "distill"):
        peak = stage_memory(stage, KNOWN["llama31_8b"], student, run).peak
        assert plan["stages"][stage]["bytes"] == peak.by_kind()
        assert plan["stages"][stage]["total"] == sum(peak.by_kind().values())
        assert plan["stages"][stage]["fits"] is (peak.total <= 80e9)
    assert plan["student"]["parameters"] == student.parameters()
    assert Architecture.from_dict(plan["student"]["architecture"]) == student
    assert plan["stages"]["prune"]["layout"]["pipeline_parallel"] == 8
    assert plan["layouts_of"] == ["finetune", "distill"] and len(plan["layouts"]) == 10
    assert "tokens_per_second" not in plan["stages"]["distill"]


def test_time_is_estimated_only_where_the_speed_is_given(capsys):
    distill = planned(capsys, "llama31_8b", *WIDTH, "stage=distill", "tflops_per_gpu=400")["stages"]["distill"]
    assert distill["tokens_per_second"] == pytest.approx(8 * 400e12 / distill["flops_per_token"])
    assert distill["seconds_per_step"] == pytest.approx(128 * 8192 / distill["tokens_per_second"])


def test_a_teachers_answers_have_a_size_and_take_a_pass(capsys):
    sizes = planned(capsys, "llama31_8b", *WIDTH)["teach"]
    assert sizes["bytes_per_token"] == {"hidden": 8194, "fp8": 4102, "sampled": 260} and "hours" not in sizes
    whole = planned(capsys, "llama31_8b", *WIDTH, "tokens=1e9", "tflops_per_gpu=400")["teach"]
    assert whole["bytes"]["hidden"] == 8194e9 + 2 * 128256 * 4096
    assert whole["hours"] == pytest.approx(1e9 * whole["flops_per_token"] / (8 * 400e12) / 3600)
    assert cli.main(["plan", "llama31_8b", "tokens=1e9", "layouts=false"]) == 0
    assert "hidden states in bf16 8,195.1 GB" in capsys.readouterr().out


def test_a_student_may_be_a_known_model_or_drop_layers(capsys):
    by_name = planned(capsys, "llama31_8b", "student.model=llama31_minitron_4b_depth", "layouts=false")
    by_size = planned(capsys, "llama31_8b", "student.num_layers=16", "layouts=false")
    assert by_name == by_size and by_name["layouts"] == []
    alone = planned(capsys, "llama31_8b")
    assert alone["student"] is None and list(alone["stages"]) == ["finetune", "prune"]


def test_scoring_alone_lists_how_many_ranks_share_the_layers(capsys):
    plan = planned(capsys, "llama31_70b", "stage=prune")
    assert plan["layouts_of"] == ["prune"]
    fits = {row["pipeline_parallel"]: row["problem"] is None for row in plan["layouts"]}
    assert sorted(fits) == list(range(1, 9)) and not fits[1] and fits[8]


def test_a_cluster_lists_layouts_within_a_node(capsys):
    plan = planned(capsys, "llama31_70b", "hardware.num_nodes=4", "hardware.pipeline_model_parallel_size=4",
                    "stage=finetune", "micro_batch_size=1")  # fmt: skip
    assert max(row["tensor_parallel"] for row in plan["layouts"]) == 8
    assert max(row["pipeline_parallel"] for row in plan["layouts"]) == 32
    for row in plan["layouts"]:
        assert row["tensor_parallel"] * row["pipeline_parallel"] * row["data_parallel"] == 32


@pytest.mark.parametrize("form", ["hf", "directory that is named like a known model"])
def test_a_checkpoint_is_read_by_its_description(tmp_path, capsys, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    folder = save("llama31", torch.float32, tmp_path / ("model" if form == "hf" else "tiny"))
    plan = planned(capsys, folder.name, "hardware=cpu", "student.num_layers=1", "global_batch_size=8")
    assert plan["teacher"]["architecture"]["hidden_size"] == 64
    assert plan["student"]["architecture"]["num_layers"] == 1
    free = plan["hardware"].pop("memory_gb")
    assert 0.1 < free < 0.9 * (free_memory() or 0) / 1e9 + 1
    assert plan["hardware"] == {
        "devices": 1, "num_nodes": 1, "accelerator": "cpu", "precision": "32", "transformer_engine": False,
    }  # fmt: skip
    assert plan["stages"]["distill"]["fits"] is True and plan["layouts"][0]["problem"] is None
    assert cli.main(["plan", folder.name, "hardware=cpu"]) == 0
    assert "MB on the fullest rank" in capsys.readouterr().out


def test_sizes_may_be_given_outright(capsys):
    sizes = "{num_layers:4,hidden_size:256,ffn_hidden_size:704,num_attention_heads:4,vocab_size:8192,seq_length:512}"
    plan = planned(capsys, f"architecture={sizes}", "hardware=cpu")
    assert plan["teacher"]["architecture"]["kv_channels"] == 64 and plan["batch"]["seq_length"] == 512


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            [],
            "model is missing: name a checkpoint or a known model, minitron plan MODEL, or give its sizes, "
            "architecture={num_layers:32,...}",
        ),
        (
            ["llama31_9b"],
            f"model = llama31_9b is no checkpoint, and no known model: {', '.join(sorted(KNOWN))}",
        ),
        (
            ["architecture={num_layers:4,hidden_size:64}"],
            "model.architecture: missing 3 required keyword-only arguments: 'ffn_hidden_size', "
            "'num_attention_heads', and 'vocab_size'",
        ),
        (
            ["tiny", "architecture={num_layers:4}"],
            "model and architecture are both given: name one of them",
        ),
        (
            ["llama31_8b", "student.hidden_size=5000"],
            "student.hidden_size 5000 is above the teacher's 4096: pruning only makes a model smaller",
        ),
        (
            ["llama31_8b", "student.model=minitron_8b"],
            "teacher and student have different vocabularies, 128256 and 256000 rows: the distillation loss compares "
            "their logits",
        ),
        (
            ["llama31_8b", "student.model=x", "student.num_layers=3"],
            "student.model and num_layers are both given: name the student, or its sizes, not both",
        ),
        (
            ["llama31_8b", "stage=distill"],
            "student is missing: give its sizes, student.hidden_size=3072, or student.model=NAME",
        ),
        (
            ["llama31_8b", "stage=train"],
            "stage = 'train' must be one of finetune, prune, distill, all",
        ),
        (
            ["llama31_8b", "hardware.tensor_model_parallel_size=3"],
            "world size 8 = 8 x 1 is not a multiple of tensor 3 x pipeline 1 = 3",
        ),
        (
            ["llama31_8b", "hardware.num_nodes=2", "hardware.devices=16", "hardware.tensor_model_parallel_size=16"],
            "the model does not fit the layout: num_query_groups 8 is not a multiple of tensor parallel 16 "
            "(8 mod 16 = 8)",
        ),
        (
            ["llama31_8b", "global_batch_size=6"],
            "global_batch_size 6 is not a multiple of micro batch 4 x data parallel 1 = 4",
        ),
        (
            ["tiny", "hardware=cpu", "hardware.sequence_parallel=true", "hardware.tensor_model_parallel_size=2",
             "hardware.devices=2"],
            "hardware.sequence_parallel needs Transformer Engine on a GPU; give hardware.sequence_parallel=false",
        ),
        (
            ["tiny", "hardware=cpu", "hardware.prune_pipeline_model_parallel_size=8", "stage=prune"],
            "the model does not fit the layout: 6 layers cannot be spread over 8 pipeline stages",
        ),
        (["tiny", "hardware.memory_gb=0"], "hardware.memory_gb = 0.0 must be above 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_message(capsys, arguments, message):
    assert refused(capsys, *arguments) == f"minitron plan: {message}\n"


def test_it_loads_no_torch_and_takes_less_than_a_second_of_work():
    code = (
        "import json, sys, time; started = time.process_time(); from nemo_minitron.cli.main import main; "
        f"code = main(['plan', 'llama31_8b', *{WIDTH!r}]); "
        "print(json.dumps([code, time.process_time() - started, *sys.modules]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    code, seconds, *modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0 and seconds < 2
    assert not {"torch", "nemo", "megatron", "modelopt", "transformers"} & {*modules}
