"""Configurations: every file and preset reads, names and values are checked, NeMo 24.07's overrides pass."""

import itertools
import shlex

import pytest

from nemo_minitron.architecture import parse_layers
from nemo_minitron.config import HardwareConfig, compat, output_format
from nemo_minitron.config.commands import COMMANDS
from nemo_minitron.config.compose import check, compose, conf_dir, presets, read
from nemo_minitron.config.reflect import leaf_types, leaf_values, setting_docs
from nemo_minitron.errors import ConfigError

REQUIRED = {
    "data": ["output=/out"],
    "finetune": ["model.restore_from_path=/teacher", "model.data.data_prefix=/data"],
    "prune": ["model.restore_from_path=/teacher", "export.save_path=/out", "prune.num_layers=16"],
    "distill": [
        "model.restore_from_path=/student",
        "model.kd_teacher_restore_from_path=/teacher",
        "model.data.data_prefix=/data",
    ],
    "teach": ["model.restore_from_path=/teacher", "model.data.data_prefix=/data"],
    "search": [
        "model.restore_from_path=/teacher",
        "model.data.data_prefix=/data",
        "search.parameters=60%",
        "output=/out",
    ],
    "flow": [],
    "convert": ["source=/model.nemo", "output=/out"],
    "inspect": ["source=/model.nemo"],
    "download": ["source=hf://acme/llama"],
    "plan": ["model=llama31_8b"],
    "quantize": ["source=/student", "output=/out", "data.source=/data"],
    "evaluate": ["models=[/model]"],
    "generate": ["model=/model", "prompt=To be"],
    "benchmark": ["models=[/model]"],
    "report": ["runs=[run]"],
}

FINETUNE_OF_THE_TUTORIAL = """
    name=megatron_llama_ft exp_manager.exp_dir=distill_trainings exp_manager.checkpoint_callback_params.save_top_k=1
    exp_manager.checkpoint_callback_params.save_nemo_on_train_end=True trainer.max_steps=30 trainer.log_every_n_steps=1
    trainer.val_check_interval=10 trainer.limit_val_batches=5 +trainer.num_sanity_val_steps=0 trainer.precision=bf16
    trainer.devices=8 trainer.num_nodes=1 "model.data.data_prefix={train:[1.0,wiki_train],validation:[v],test:[t]}"
    model.restore_from_path=llama3_1_8b.nemo +model.dist_ckpt_load_strictness=log_all ~model.tokenizer
    +model.tokenizer='{library: huggingface, type: meta-llama/Meta-Llama-3.1-8B, use_fast: True}'
    model.tensor_model_parallel_size=8 model.sequence_parallel=True model.micro_batch_size=4
    model.global_batch_size=128 model.encoder_seq_length=8192 model.num_layers=32 model.hidden_size=4096
    model.ffn_hidden_size=14336 model.num_attention_heads=32 model.hidden_dropout=0.0 model.attention_dropout=0.0
    model.apply_query_key_layer_scaling=True model.normalization='rmsnorm' model.bias=False
    model.activation='fast-swiglu' model.position_embedding_type='rope'
    model.share_embeddings_and_output_weights=False model.num_query_groups=8 ++model.scale_positional_embedding=True
    ++model.rotary_base=500000.0 model.optim.name=distributed_fused_adam model.optim.lr=1e-4
    model.optim.sched.min_lr=1e-5 model.optim.sched.warmup_steps=2
"""
DEPTH_OF_THE_TUTORIAL = """
    model.restore_from_path=ft.nemo model.tensor_model_parallel_size=8 model.pipeline_model_parallel_size=1
    +model.dist_ckpt_load_strictness=log_all trainer.num_nodes=1 trainer.precision=bf16 trainer.devices=8
    "prune.drop_layers=[16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31]" export.save_path=depth.nemo
"""
WIDTH_OF_THE_TUTORIAL = """
    model.restore_from_path=ft.nemo model.tensor_model_parallel_size=1 model.pipeline_model_parallel_size=8
    +model.dist_ckpt_load_strictness=log_all +model.sequence_parallel=false inference.batch_size=8 trainer.num_nodes=1
    trainer.precision=bf16 trainer.devices=8 prune.ffn_hidden_size=9216 prune.num_attention_heads=null
    prune.num_query_groups=null prune.hidden_size=3072 export.save_path=width.nemo
"""
DISTILL_OF_THE_TUTORIAL = """
    name=distill_depth exp_manager.exp_dir=distill_trainings exp_manager.checkpoint_callback_params.save_top_k=1
    trainer.max_steps=30 trainer.log_every_n_steps=1 trainer.val_check_interval=10 trainer.limit_val_batches=5
    +trainer.num_sanity_val_steps=0 trainer.precision=bf16 trainer.devices=8 trainer.num_nodes=1
    "model.data.data_prefix={train:[1.0,wiki_train],validation:[v],test:[t]}" model.restore_from_path=depth.nemo
    model.kd_teacher_restore_from_path=ft.nemo model.nemo_path=out.nemo model.tensor_model_parallel_size=8
    model.sequence_parallel=True model.micro_batch_size=4 model.global_batch_size=128
    model.optim.name=distributed_fused_adam model.optim.lr=1e-4 model.optim.sched.min_lr=1e-5
    model.optim.sched.warmup_steps=2
"""


def problems(command, *overrides, **kwargs):
    with pytest.raises(ConfigError) as caught:
        compose(command, overrides, **kwargs)
    return caught.value.problems


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes_and_validates(command):
    assert type(compose(command, REQUIRED[command])) is COMMANDS[command].schema


def test_every_file_of_conf_is_a_command_or_a_preset():
    offered = {f"{group}/{name}" for group, names in presets("flow").items() for name in names}
    files = {path.relative_to(conf_dir()).with_suffix("").as_posix() for path in conf_dir().rglob("*.yaml")}
    assert files == offered | set(COMMANDS)
    assert check() > len(COMMANDS)


@pytest.mark.parametrize("model, hardware", itertools.product(presets("flow")["model"], presets("flow")["hardware"]))
def test_flow_presets_validate_together(model, hardware):
    own = ["model.restore_from_path=/models/auto", "data.source=/text"] if model == "auto" else []
    config = compose("flow", [f"model={model}", f"hardware={hardware}", *own])
    assert (config.model.name, config.hardware.name) == (model, hardware)
    assert config.output_dir == f"runs/{model}"


def test_recipes_follow_the_model_and_can_be_chosen_alone():
    assert compose("flow", ["model=llama31_8b"]).prune.students["width"]["hidden_size"] == 3072
    assert compose("flow", ["model=llama31_8b", "prune=tiny"]).prune.students["width"]["hidden_size"] == 128


def test_a_checkpoint_without_a_preset_is_a_flow_of_its_own(tmp_path):
    """Named by a setting or a file of the user's, it brings model=auto and hardware=auto; what is chosen wins."""
    named = ["model.restore_from_path=/models/Llama-3.2-1B", "data.source=/text"]
    config = compose("flow", named)
    assert (config.model.name, config.hardware.name, config.output_dir) == (
        "Llama-3.2-1B", "auto", "runs/Llama-3.2-1B",
    )  # fmt: skip
    assert config.model.init == "checkpoint" and config.finetune.max_steps is None and config.model.seq_length is None
    assert config.prune.students == {"depth": {"layers": "60%"}, "width": {"parameters": "60%"}}
    assert compose("flow", ["model.restore_from_path=/m/a.nemo", "data.source=/text"]).output_dir == "runs/a"
    assert compose("flow", [*named, "hardware=cpu"]).hardware.name == "cpu"
    assert compose("flow", [*named, "prune=tiny", "finetune.max_steps=7"]).finetune.max_steps == 7
    preset = compose("flow", ["model=llama31_8b", named[0]])
    assert (preset.model.name, preset.hardware.name, preset.finetune.max_steps) == ("llama31_8b", "cpu", 30)
    file = tmp_path / "mine.yaml"
    file.write_text("defaults:\n  - flow\n  - _self_\nmodel:\n  restore_from_path: /m/b\ndata:\n  source: /text\n")
    config = compose("flow", config_name=str(file))
    assert (config.model.name, config.hardware.name, config.prune.students["width"]) == (
        "b", "auto", {"parameters": "60%"},
    )  # fmt: skip
    assert problems("flow", "model=tiny", named[0])[0].startswith("model.init = random makes a teacher, but")
    assert problems("flow", named[0]) == ["data.source is missing: name the text to teach on, data.source=PATH"]


def test_hardware_that_is_left_open_gives_stages_their_defaults():
    config = compose("finetune", [*REQUIRED["finetune"], "hardware=auto"])
    assert (config.trainer.devices, config.model.micro_batch_size) == (1, 4)


@pytest.mark.parametrize("command", ["flow", "plan"])
def test_hardware_of_an_unknown_kind_is_refused(command):
    assert problems(command, *REQUIRED[command], "hardware.accelerator=tpu", "hardware.precision=fp8") == [
        "hardware.accelerator = 'tpu' must be one of auto, gpu, cpu",
        "hardware.precision = 'fp8' must be one of auto, bf16, bf16-mixed, 32",
    ]


STAGES = [name for name, command in COMMANDS.items() if command.hardware]


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_takes_of_the_hardware_are_settings_of_both(stage):
    takes = COMMANDS[stage].hardware
    assert takes.keys() <= leaf_types(COMMANDS[stage].schema).keys()
    assert {*takes.values()} <= leaf_types(HardwareConfig).keys()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset", presets("flow")["hardware"])
def test_a_stage_takes_the_same_of_a_preset_alone_and_in_a_flow(stage, preset):
    if preset == "auto":  # open: the flow chooses
        return
    alone, flow = compose(stage, [*REQUIRED[stage], f"hardware={preset}"]), compose("flow", [f"hardware={preset}"])
    takes, values = COMMANDS[stage].hardware, leaf_values(alone)
    in_flow = {f"trainer.{name}": value for name, value in flow.hardware.trainer(takes).items()}
    in_flow |= {f"model.{name}": value for name, value in flow.hardware.model(takes).items()}
    in_flow |= {f"model.data.{name}": value for name, value in flow.hardware.loader().items() if stage != "prune"}
    assert in_flow == {setting: values[setting] for setting in takes}


@pytest.mark.parametrize("builds_on", ["distill", None])
def test_overrides_win_over_files_and_files_over_hardware(tmp_path, builds_on):
    file = tmp_path / "mine.yaml"
    defaults = "defaults:\n  - distill\n  - _self_\n" if builds_on else ""
    file.write_text(
        f"{defaults}trainer: {{devices: 2, num_nodes: 2}}\nhardware: {{precision: bf16, micro_batch_size: null}}\n"
    )
    overrides = ["hardware.num_nodes=3", "hardware.devices=4", "trainer.num_nodes=5", "hardware.accelerator=cpu"]
    config = read("distill", [*REQUIRED["distill"], *overrides], config_name=str(file))
    trainer = config.trainer
    assert (trainer.devices, trainer.num_nodes, trainer.precision, trainer.accelerator) == (2, 5, "bf16", "cpu")
    assert config.model.micro_batch_size == (4 if builds_on else 1)


def test_a_file_may_ask_for_the_hardware_by_name(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "defaults:\n  - hardware: null\n  - _self_\ntrainer:\n  devices: ${oc.select:hardware.devices,3}\n"
        "  max_steps: ${oc.select:hardware.micro_batch_size,5}\n"
    )
    for chosen, expected in (([], (3, 5)), (["hardware=8x80gb"], (8, 4)), (["hardware=auto"], (3, 5))):
        trainer = read("distill", [*REQUIRED["distill"], *chosen], config_name=str(file)).trainer
        assert (trainer.devices, trainer.max_steps) == expected
    file.write_text("hardware: {devices: '${nowhere}'}\n")
    assert "'nowhere' not found" in problems("distill", config_name=str(file))[0]


def test_fields_that_no_file_mentions_can_be_set():
    overrides = ["trainer.gradient_clip_val=0.5", "+model.optim.betas=[0.9,0.95]", "model.data.seq_length=null"]
    config = compose("finetune", REQUIRED["finetune"] + overrides)
    assert (config.trainer.gradient_clip_val, config.model.optim.betas) == (0.5, [0.9, 0.95])
    assert config.model.data.seq_length is None


def test_mappings_take_new_keys_and_lose_old_ones():
    config = compose("flow", ["prune.students.half.num_layers=4", "~prune.students.width", "model.architecture.x.y=1"])
    assert config.prune.students == {"depth": {"num_layers": 3}, "half": {"num_layers": 4}}
    assert config.model.architecture["x"] == {"y": 1}
    config = compose("finetune", ["model.init=random", "model.architecture.num_layers=4", "model.data.data_prefix=/d"])
    assert config.model.architecture == {"num_layers": 4}


def test_tilde_goes_back_to_the_default():
    assert compose("flow", ["seed=1", "~seed"]).seed == 1234
    assert problems("flow", "~sede") == ["sede is not a setting; did you mean seed?"]
    assert problems("data", "output=x", "~output") == ["output is missing: name the folder to make, output=DIR"]


@pytest.mark.parametrize("path", ["/a/b (1)", "a=b", "007", "C,D", "~/x", "'quoted'", "1e3"])
def test_text_is_taken_as_it_stands(path):
    config = compose("data", [f"output={path}"])
    assert config.output == path.strip("'")


@pytest.mark.parametrize(
    "text, layers",
    [
        ("[16-31]", list(range(16, 32))),
        ("[16,17]", [16, 17]),
        ("16-31", list(range(16, 32))),
        ("[1,3-5]", [1, 3, 4, 5]),
        ("16,17", [16, 17]),
        ("7", [7]),
    ],
)
def test_forms_of_drop_layers(text, layers):
    config = compose("prune", ["model.restore_from_path=/t", "export.save_path=/o", f"prune.drop_layers={text}"])
    assert parse_layers(config.prune.drop_layers) == layers


def test_data_prefix_takes_a_folder_and_a_mapping():
    assert compose("finetune", REQUIRED["finetune"]).model.data.data_prefix == "/data"
    mapping = "model.data.data_prefix={train:[1.0,/a/b],validation:[/c],test:[/d]}"
    config = compose("finetune", ["model.restore_from_path=/t", mapping])
    assert config.model.data.data_prefix == {"train": [1.0, "/a/b"], "validation": ["/c"], "test": ["/d"]}


def test_unknown_names_and_wrong_types_are_reported_together():
    messages = problems(
        "prune", "trainer.device=2", "devices=3", "trainer.devices=abc", "prune.num_layers=2.5", "qqq=1"
    )
    assert messages == [
        "trainer.device is not a setting; did you mean trainer.devices?",
        "devices is not a setting; did you mean trainer.devices?",
        "trainer.devices = 'abc' is not a whole number",
        "prune.num_layers = 2.5 is not a whole number or null",
        "qqq is not a setting, see --help",
    ]


def test_all_values_off_range_are_reported_together():
    messages = problems("data", "words=0", "workers=-1", "domain=legal", "vocab_size=10")
    assert {problem.split()[0] for problem in messages} == {"workers", "words", "domain", "vocab_size", "output"}


def test_a_preset_that_does_not_exist_names_those_that_do():
    assert problems("flow", "model=foo") == [
        "model=foo is not a preset; there are auto, llama31_8b, llama32_1b, llama32_3b, minitron_4b, minitron_8b, "
        "qwen3_0.6b, qwen3_1.7b, qwen3_4b, qwen3_8b, smollm2_135m, tiny"
    ]
    assert "without presets" in problems("finetune", "model=tiny")[0]


@pytest.mark.parametrize("override", ["seed", "=3", "~"])
def test_what_is_no_override_is_refused(override):
    assert len(problems("flow", override)) == 1


def test_a_file_of_the_user_builds_on_conf(tmp_path):
    folder = tmp_path / "my conf"
    folder.mkdir()
    file = folder / "mine.yaml"
    file.write_text("defaults:\n  - flow\n  - _self_\nseed: 7\n")
    config = compose("flow", ["hardware=1x80gb"], config_name=str(file))
    assert (config.seed, config.hardware.name, config.model.name) == (7, "1x80gb", "tiny")
    file.write_text("seed: 7\nsede: 8\nlimit_test_batches: many\n")
    assert len(problems("flow", config_name=str(file))) == 2
    file.write_text("seed: [7\n")
    assert str(file) in problems("flow", config_name=str(file))[0]
    assert "convert, data, distill, download, evaluate, finetune, flow" in problems("flow", config_name="nowhere")[0]


@pytest.mark.parametrize(
    "command, line",
    [
        ("finetune", FINETUNE_OF_THE_TUTORIAL),
        ("prune", DEPTH_OF_THE_TUTORIAL),
        ("prune", WIDTH_OF_THE_TUTORIAL),
        ("distill", DISTILL_OF_THE_TUTORIAL),
    ],
)
def test_commands_of_the_nemo_tutorial_pass_unchanged(command, line):
    notes = []
    config = compose(command, shlex.split(line), note=notes.append)
    assert config.trainer.devices == 8
    assert len(notes) <= 1
    if command != "prune":
        assert config.exp_manager.exp_dir == "distill_trainings"
        assert "exp_manager.checkpoint_callback_params.save_top_k" in notes[0]


@pytest.mark.parametrize("name", " ".join(compat.UNUSED.values()).split())
def test_unused_settings_of_nemo_are_no_fields_here(name):
    fields = [leaf_types(command.schema) for command in COMMANDS.values() if command.nemo_names]
    assert any(name not in known for known in fields)


def test_unused_settings_are_told_once_and_a_field_wins():
    notes = []
    prune = ["model.sequence_parallel=true", "inference.greedy=true", "inference.batch_size=3"]
    config = compose("prune", REQUIRED["prune"] + prune, note=notes.append)
    assert config.inference.batch_size == 3
    assert notes == ["note: settings of NeMo 24.07 without effect here: model.sequence_parallel, inference.greedy"]
    assert read("distill", ["model.sequence_parallel=true"]).model.sequence_parallel is True
    assert problems("flow", "inference.greedy=true") == ["inference.greedy is not a setting, see --help"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_is_documented(command):
    docs = setting_docs(COMMANDS[command].schema)
    assert docs.keys() == leaf_types(COMMANDS[command].schema).keys()
    assert all(docs.values()), [name for name, text in docs.items() if not text]


@pytest.mark.parametrize(
    "path, to, written",
    [
        ("/a/model.nemo", None, "nemo1"),
        ("model.nemo/", None, "nemo1"),
        ("/a.nemo/model", None, "nemo2"),
        ("model", None, "nemo2"),
        ("model", "hf", "hf"),
        ("model.nemo", "nemo1", "nemo1"),
    ],
)
def test_a_path_decides_the_format_unless_to_does(path, to, written):
    assert output_format(path, to) == written
    asked = [] if to is None else [f"to={to}"]
    assert compose("convert", ["source=/s", f"output={path}", *asked]).target_format == written
    assert compose("finetune", [*REQUIRED["finetune"], f"model.nemo_path={path}", *asked]).target_format == written
    prune = [f"export.save_path={path}" if "save_path" in entry else entry for entry in REQUIRED["prune"]]
    assert compose("prune", [*prune, *asked]).target_format == written


@pytest.mark.parametrize(
    "command, place", [("convert", "output"), ("finetune", "model.nemo_path"), ("prune", "export.save_path")]
)
def test_a_format_that_does_not_fit_the_name_is_refused(command, place):
    for to, path, said in [
        ("hf", "m.nemo", "leave .nemo off"),
        ("nemo2", "m.nemo", "leave .nemo off"),
        ("nemo1", "m/", "name it m.nemo"),
        ("onnx", "m", "must be one of nemo2, nemo1, hf"),
    ]:
        messages = problems(command, *REQUIRED[command], f"{place}={path}", f"to={to}")
        assert len(messages) == 1 and said in messages[0]


def test_convert_names_all_that_is_wrong():
    messages = problems("convert", "verify=maybe", "weights=npz", "dtype=int8", "shard_size_gb=0", "vocab_size=0")
    assert {problem.split()[0] for problem in messages} == {
        "source", "output", "verify", "weights", "dtype", "shard_size_gb", "vocab_size",
    }  # fmt: skip
    assert messages[0] == "source is missing: name the checkpoint to read, source=PATH"


def test_convert_takes_what_fits_the_target():
    assert compose("convert", ["source=/s", "output=/m.nemo", "weights=zarr", "dtype=32"]).dtype == "32"
    assert compose("convert", ["source=/s", "output=/m", "to=hf", "vocab_size=5"]).vocab_size == 5
    assert compose("convert", ["source=/s", "output=/m", "pad_vocab_to_multiple_of=128"]).target_format == "nemo2"


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["output=/m", "weights=zarr"], "weights = zarr is for .nemo archives; the result is nemo2"),
        (["output=/m", "to=hf", "weights=zarr"], "weights = zarr is for .nemo archives; the result is hf"),
        (["output=/m.nemo", "vocab_size=5"], "vocab_size is for Hugging Face; the result is nemo1"),
        (["output=/m", "to=hf", "pad_vocab_to_multiple_of=128"], "pad_vocab_to_multiple_of is for nemo1, nemo2"),
        (["output=/s/."], "output = /s/. is the source itself"),
        (["output=/s/../"], "output = '/s/../' has no name of its own"),
    ],
)
def test_convert_refuses_what_has_no_use_for_the_target(overrides, said):
    messages = problems("convert", "source=/s", *overrides)
    assert any(problem.startswith(said) for problem in messages), messages


def test_convert_refuses_to_replace_its_source(tmp_path):
    model = tmp_path / "models" / "one"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    assert "is the source itself" in problems("convert", f"source={model}", f"output={tmp_path / 'link'}")[0]
    assert "is a folder around the source" in problems("convert", f"source={model}", f"output={model.parent}")[0]
    assert compose("convert", [f"source={model}", f"output={model}-hf", "to=hf"]).target_format == "hf"


def test_inspect_takes_its_source_and_what_to_show():
    assert problems("inspect") == ["source is missing: name the checkpoint to look at, source=PATH"]
    config = compose("inspect", ["source=/m", "json=true", "values=true"])
    assert (config.source, config.json, config.values) == ("/m", True, True)


@pytest.mark.parametrize("choice", ["hardware=null", "model=1", "data=true", "model=[tiny,auto]", "model=tiny,auto"])
def test_a_group_that_is_given_no_name_is_a_configuration_error(choice):
    with pytest.raises(ConfigError):
        read("flow", [choice])
