"""A command's configuration: conf/<command>.yaml with its presets, then `key=value` overrides, in its dataclass.

Hydra composes the files and the presets (`model=tiny`). Everything after that happens on the dataclass, so that each of
its fields can be set whether or not a file mentions it, and so that all unknown names and wrong types are reported at
once, by name.
"""

import ast
import dataclasses
import difflib
import fnmatch
import functools
import inspect
import itertools
import operator
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron import config as schemas
from nemo_minitron.config import Config, LaunchConfig, validated
from nemo_minitron.errors import ConfigError

SCHEMAS: dict[str, type[Config]] = {
    "data": schemas.DataConfig,
    "finetune": schemas.FinetuneConfig,
    "prune": schemas.PruneConfig,
    "distill": schemas.DistillConfig,
    "flow": schemas.FlowConfig,
    "convert": schemas.ConvertConfig,
    "inspect": schemas.InspectConfig,
    "download": schemas.DownloadConfig,
    "plan": schemas.PlanConfig,
    "quantize": schemas.QuantizeConfig,
    "evaluate": schemas.EvaluateConfig,
    "generate": schemas.GenerateConfig,
    "benchmark": schemas.BenchmarkConfig,
    "report": schemas.ReportConfig,
}

#: Commands that `--launch` takes; their files and overrides may hold hardware.* and slurm.* (LaunchConfig) too.
LAUNCHED = ("finetune", "prune", "distill", "flow")

#: The presets of a flow on any checkpoint and on this machine.
AUTO = "auto"

#: Commands that take the overrides of NeMo 24.07's scripts; the two tables below are for them.
NEMO_COMMANDS = ("finetune", "prune", "distill")

#: NeMo 24.07's name -> the name here.
NEMO_RENAMED = {"name": "exp_manager.name", "prune.num_calib_size": "prune.num_samples"}

#: Settings of NeMo 24.07's scripts without effect here, by the reason why; a field of the same name wins.
NEMO_UNUSED = {
    "the engine chooses kernels, fusions, recomputation and communication": """
        model.activations_checkpoint_* model.apply_rope_fusion model.async_grad_allreduce model.batch_p2p_comm
        model.bias_activation_fusion model.bias_dropout_add_fusion model.cpu_offloading* model.cross_entropy_loss_fusion
        model.fp8* model.fsdp* model.gc_interval model.grad_allreduce_chunk_size_mb model.grad_div_ar_fusion
        model.gradient_accumulation_fusion model.gradient_as_bucket_view model.masked_softmax_fusion model.mcore_gpt
        model.megatron_amp_O2 model.megatron_legacy model.native_amp_* model.nsys_profile.*
        model.num_micro_batches_with_partial_activation_checkpoints model.optim.bucket_cap_mb
        model.optim.contiguous_* model.optim.grad_sync_dtype model.optim.overlap_* model.overlap_p2p_comm
        model.persist_layer_norm model.sync_batch_comm model.transformer_engine model.ub_tp_comm_overlap*
        model.use_cpu_initialization model.use_flash_attention trainer.benchmark trainer.use_distributed_sampler""",
    "the checkpoint says what the model is": """
        model.activation model.apply_query_key_layer_scaling model.attention_dropout model.bias model.ffn_dropout
        model.ffn_hidden_size model.hidden_dropout model.hidden_size model.init_method_std model.kv_channels
        model.layernorm_epsilon model.make_vocab_size_divisible_by model.max_position_embeddings model.normalization
        model.num_attention_heads model.num_layers model.num_query_groups model.position_embedding_type
        model.post_process model.pre_process model.rotary_base model.rotary_percentage model.scale_positional_embedding
        model.seq_len_interpolation_factor model.share_embeddings_and_output_weights model.tokenizer.*""",
    "a checkpoint must hold just the weights that its configuration describes": "model.dist_ckpt_load_strictness",
    "logs and checkpoints are written the same way in every run": """
        exp_manager.checkpoint_callback_params.* exp_manager.create_checkpoint_callback
        exp_manager.create_tensorboard_logger exp_manager.create_wandb_logger exp_manager.ema.*
        exp_manager.log_step_timing exp_manager.resume_* exp_manager.step_timing_kwargs.*
        exp_manager.wandb_logger_kwargs.* model.dist_ckpt_format model.dist_ckpt_parallel_* trainer.enable_*
        trainer.logger""",
    "runs are counted in steps and whole samples": """
        model.data.data_impl model.data.dataloader_type model.data.eod_mask_loss model.data.exchange_indices_distributed
        model.data.no_seqlen_plus_one_input_tokens model.data.pad_samples_to_global_batch_size
        model.data.reset_attention_mask model.data.reset_position_ids model.data.shuffle_documents
        model.data.skip_warmup model.data.splits_string model.data.validation_drop_last model.rampup_batch_size
        trainer.accumulate_grad_batches trainer.limit_test_batches trainer.max_epochs trainer.max_time""",
    "pruning scores samples of the tokenised data and generates nothing": """
        inference.add_BOS inference.all_probs inference.compute_logprob inference.end_strings inference.greedy
        inference.max_context_length inference.min_tokens_to_generate inference.repetition_penalty
        inference.temperature inference.tokens_to_generate inference.top_k inference.top_p model.sequence_parallel
        prune.calib_dataset""",
}

_TYPE_NAMES = {
    Any: "anything",
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    str: "text",
    type(None): "null",
}


def compose(
    command: str,
    overrides: Sequence[str] = (),
    config_name: str | None = None,
    config_dir: str | Path | None = None,
    note: Callable[[str], None] = lambda message: print(message, file=sys.stderr),
) -> Any:
    """The validated configuration of `command`.

    Args:
        command: one of SCHEMAS.
        overrides: `key=value`, `+key=value`, `~key` (back to the default) or `group=preset`.
        config_name: another file of conf/, or the path of a YAML file that may build on them; none: conf/<command>.
        config_dir: folder that stands for conf/.
        note: is told, in one message, which settings of NeMo 24.07 have no effect.

    Raises:
        ConfigError: with all unknown names and wrong types, or else with everything that is wrong with the values.
    """
    return validated(read(command, overrides, config_name, config_dir, note), f"minitron {command}")


def read(
    command: str,
    overrides: Sequence[str] = (),
    config_name: str | None = None,
    config_dir: str | Path | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> Any:
    """As compose, but without a look at the values."""
    source = f"minitron {command}"
    merge, _ = _merged(command, overrides, config_name, config_dir, source)
    if merge.unused:
        note(f"note: settings of NeMo 24.07 without effect here: {', '.join(merge.unused)}")
    return merge.result(source)


def read_launch(
    command: str,
    overrides: Sequence[str] = (),
    config_name: str | None = None,
    config_dir: str | Path | None = None,
) -> LaunchConfig:
    """Where `command` shall run: what `read` leaves out of the same files and overrides; values are not looked at."""
    source = f"minitron {command}"
    return _merged(command, overrides, config_name, config_dir, source)[1].result(source)


def _merged(
    command: str, overrides: Sequence[str], config_name: str | None, config_dir: str | Path | None, source: str
) -> tuple["_Merge", "_Merge"]:
    """The command's own settings, and what stands beside them; raises ConfigError with what is wrong with both."""
    schema = SCHEMAS[command]
    outside = _beside(command)
    choices, settings = _split(overrides, schema, outside, source)
    files = functools.partial(
        _compose_files, config_name or command, conf=Path(config_dir or conf_dir()).resolve(), source=source
    )
    composed = files(choices)
    if schema is schemas.FlowConfig:
        composed = _without_preset(composed, choices, settings, files)
    merge, beside = _Merge(schema, nemo_names=command in NEMO_COMMANDS), _Merge(LaunchConfig, nemo_names=False)
    if "slurm" not in outside:
        composed.pop("slurm", None)  # of a preset of hardware, for commands that start no ranks
    for name in outside:
        value = composed.pop(name, None)
        beside.set_all({name: value} if value is not None else {})
    for key, text in settings:
        if key.partition(".")[0] in outside:
            beside.override(key, text)
    merge.set_all(_with_hardware(composed, beside.given))
    for key, text in settings:
        if key.partition(".")[0] not in outside:
            merge.override(key, text)
    if merge.problems or beside.problems:
        raise ConfigError([*merge.problems, *beside.problems], source)
    return merge, beside


def _without_preset(
    composed: dict[str, Any],
    choices: list[str],
    settings: list[tuple[str, Any]],
    files: Callable[[list[str]], dict[str, Any]],
) -> dict[str, Any]:
    """A flow's files, with model=auto where a checkpoint is named and no preset of it is chosen; with hardware=auto
    where neither a command nor a file asks for other hardware than the flow's own; called like its checkpoint.

    Args:
        composed: what the files say as they stand.
        files: what they say with other choices.
    """
    given = dict(settings)
    model = composed.get("model") or {}
    checkpoint = given.get("model.restore_from_path", model.get("restore_from_path"))
    chosen = {choice.partition("=")[0] for choice in choices}
    named = checkpoint not in (None, "null") and "model" not in chosen and model.get("init") == "random"
    if not named and model.get("name") != AUTO:
        return composed
    own = (composed.get("hardware") or {}).get("name") == "cpu" and "hardware" not in chosen
    composed = files([*choices, *([f"model={AUTO}"] if named else []), *([f"hardware={AUTO}"] if own else [])])
    if checkpoint not in (None, "null") and composed["model"]["name"] == AUTO:
        place = Path(str(checkpoint).strip("'\"")).expanduser().absolute()
        composed["model"]["name"] = place.name.removesuffix(".nemo") or AUTO
    return composed


def _beside(command: str) -> list[str]:
    """The groups of LaunchConfig that `command` takes and its own configuration does not have."""
    own = typing.get_type_hints(SCHEMAS[command])
    return [name for name in typing.get_type_hints(LaunchConfig) if command in LAUNCHED and name not in own]


def _with_hardware(composed: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`composed` with what its values take from the hardware preset, `${oc.select:hardware.NAME,OTHERWISE}`, put in."""
    from omegaconf import OmegaConf

    tree = OmegaConf.create({**composed, "hardware": {}})
    for key, value in given.items():
        if value is not None:  # hardware=auto leaves it open
            OmegaConf.update(tree, key, value)

    def resolved(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict):
                value = resolved(value, f"{key}.")
            elif isinstance(value, str) and "${oc.select:hardware." in value:
                value = OmegaConf.select(tree, key)
            found[name] = value
        return found

    return resolved(composed)


def conf_dir() -> Path:
    """The folder of files and presets, which the source tree shows as conf/."""
    return Path(__file__).resolve().parent / "presets"


def presets(command: str) -> dict[str, list[str]]:
    """Group -> names of its presets, for the groups that `command` chooses from."""
    from omegaconf import OmegaConf

    file = OmegaConf.to_container(OmegaConf.load(conf_dir() / f"{command}.yaml"), resolve=False)
    groups = [group for entry in file.get("defaults", []) if isinstance(entry, dict) for group in entry]
    return {group: sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")) for group in groups}


def leaf_types(schema: type[Config], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> annotation of every field that is not itself a group of fields."""
    found = {}
    for name, annotation in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(annotation):
            found |= leaf_types(annotation, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = annotation
    return found


def leaf_values(config: Config, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every field that is not itself a group of fields."""
    found = {}
    for name, value in vars(config).items():
        found |= leaf_values(value, f"{prefix}{name}.") if isinstance(value, Config) else {f"{prefix}{name}": value}
    return found


def setting_docs(schema: type[Config], prefix: str = "") -> dict[str, str]:
    """Dotted name -> description of every field: the string that stands under it in its class."""
    docs = {name: text for base in reversed(schema.__mro__[:-1]) for name, text in _field_docs(base).items()}
    found = {}
    for name, annotation in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(annotation):
            found |= setting_docs(annotation, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = docs.get(name, "")
    return found


def _field_docs(schema: type) -> dict[str, str]:
    body = ast.parse(inspect.getsource(schema)).body[0].body
    return {
        field.target.id: " ".join(ast.literal_eval(text.value).split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def describe_type(annotation: Any) -> str:
    """What a field takes, in words."""
    if annotation in _TYPE_NAMES:
        return _TYPE_NAMES[annotation]
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is list:
        return f"a list, each {describe_type(arguments[0])}"
    if typing.get_origin(annotation) is dict:
        return "a mapping {key:value}"
    return " or ".join(map(describe_type, arguments))


def _split(
    overrides: Sequence[str], schema: type[Config], outside: list[str], source: str
) -> tuple[list[str], list[tuple[str, Any]]]:
    """Chosen presets, and (key, text) of every other override; text None: back to the default."""
    groups = [
        name for name, annotation in typing.get_type_hints(schema).items() if dataclasses.is_dataclass(annotation)
    ]
    groups += outside
    choices, settings, problems = [], [], []
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        key = key.lstrip("+")
        if key.startswith("~"):
            settings.append((key[1:], None))
        elif not equals or not key:
            problems.append(f"{override!r} is not of the form key=value")
        elif key in groups and not text.startswith("{"):
            choices.append(f"{key}={text}")
        else:
            settings.append((key, text))
    if problems:
        raise ConfigError(problems, source)
    return choices, settings


def _compose_files(config_name: str, choices: list[str], conf: Path, source: str) -> dict[str, Any]:
    """What the file and the chosen presets say, interpolations unresolved."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    folder, name = _locate(config_name, conf, source)
    searchpath = [] if folder == conf else [f"hydra.searchpath=['file://{conf}']"]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            composed = hydra.compose(name, overrides=[*choices, *searchpath])
        return OmegaConf.to_container(composed, resolve=False)
    except MissingConfigException as error:
        raise ConfigError(_missing_preset(error), source) from None
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_unusable_file(error, folder / f"{name}.yaml"), source) from None


def _locate(config_name: str, conf: Path, source: str) -> tuple[Path, str]:
    """Folder and stem of the file that `config_name` stands for."""
    path = Path(config_name).expanduser()
    if path.suffix == ".yaml" and path.is_file():
        return path.resolve().parent, path.stem
    name = config_name.removesuffix(".yaml")
    if (conf / f"{name}.yaml").is_file():
        return conf, name
    known = ", ".join(sorted(file.stem for file in conf.glob("*.yaml")))
    raise ConfigError(f"--config-name {config_name} is neither a .yaml file nor one of conf/: {known}", source)


def _missing_preset(error: Any) -> str:
    group, _, name = str(error.missing_cfg_file or "").rpartition("/")
    if not group or not error.options:
        return str(error).strip()
    return f"{group}={name} is not a preset; there are {', '.join(sorted(error.options))}"


def _unusable_file(error: Exception, file: Path) -> str:
    without_presets = re.match(r"Could not override '(\w+)'", str(error))
    if without_presets:
        group = without_presets[1]
        return f"{group} is a group of settings without presets here: set one of them, {group}.NAME=VALUE"
    return f"{file}: {str(error).strip()}"


class _Merge:
    """A configuration that takes settings by name and collects what is wrong with them."""

    def __init__(self, schema: type[Config], nemo_names: bool):
        from omegaconf import OmegaConf

        self.schema = schema
        self.types = leaf_types(schema)
        self.renamed = NEMO_RENAMED if nemo_names else {}
        self.ignored = [name for names in NEMO_UNUSED.values() for name in names.split()] if nemo_names else []
        self.values = OmegaConf.structured(schema)
        self.given: dict[str, Any] = {}
        self.problems: list[str] = []
        self.unused: list[str] = []

    def set_all(self, values: dict[str, Any]) -> None:
        """Sets every value of a tree, mappings taken apart down to the fields."""
        for key, value in self._flat(values):
            self._set(self._field_name(key), value)

    def override(self, key: str, text: str | None) -> None:
        """Sets `key` to what `text` says; None: back to its default."""
        name = self._field_name(key)
        if text is None:
            self._reset(name)
        else:
            self.set_all({name: _parse(text, self.types.get(name))})

    def result(self, source: str) -> Any:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            return _build(self.schema, OmegaConf.to_container(self.values, resolve=True))
        except OmegaConfBaseException as error:
            raise ConfigError(str(error).strip(), source) from None

    def _flat(self, values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict) and self.types.get(key) is not Any:
                yield from self._flat(value, f"{key}.")
            else:
                yield key, value

    def _field_name(self, key: str) -> str:
        return key if key in self.types else self.renamed.get(key, key)

    def _field(self, key: str) -> str | None:
        """The field that is `key`, or that is a mapping around it."""
        parts = key.split(".")
        around = (".".join(parts[:count]) for count in range(1, len(parts)))
        return key if key in self.types else next((name for name in around if _is_mapping(self.types.get(name))), None)

    def _set(self, key: str, value: Any) -> None:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        field = self._field(key)
        if field is None:
            self._unknown(key)
            return
        try:
            for mapping in _mappings_around(key, field):
                if OmegaConf.select(self.values, mapping) is None:
                    OmegaConf.update(self.values, mapping, {}, merge=False)
            OmegaConf.update(self.values, key, value)
            self.given[key] = value
        except OmegaConfBaseException:
            self.problems.append(f"{key} = {value!r} is not {describe_type(self.types[field])}")

    def _reset(self, key: str) -> None:
        from omegaconf import OmegaConf

        self.given.pop(key, None)
        if key in self.types:
            defaults = OmegaConf.to_container(OmegaConf.structured(self.schema))
            default = functools.reduce(operator.getitem, key.split("."), defaults)
            OmegaConf.update(self.values, key, default, merge=False)
        elif self._field(key) is None:
            self._unknown(key)
        else:
            parent, _, name = key.rpartition(".")
            (OmegaConf.select(self.values, parent) or {}).pop(name, None)

    def _unknown(self, key: str) -> None:
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in self.ignored):
            self.unused.append(key)
            return
        nearest = _nearest(key, list(self.types))
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ", see --help"
        self.problems.append(f"{key} is not a setting{hint}")


def _is_mapping(annotation: Any) -> bool:
    return any(typing.get_origin(choice) is dict for choice in (annotation, *typing.get_args(annotation)))


def _mappings_around(key: str, field: str) -> list[str]:
    """The mappings that `key` lies in, from the field downwards."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(field.count(".") + 1, len(parts))]


def _nearest(key: str, names: list[str]) -> list[str]:
    """Names that look like `key`, and names that end as it does."""
    last = key.rpartition(".")[2]
    same_end = [name for name in names if name.rpartition(".")[2] == last]
    return list(dict.fromkeys([*same_end, *difflib.get_close_matches(key, names, n=3, cutoff=0.75)]))[:3]


def _parse(text: str, annotation: Any) -> Any:
    """The value that `text` stands for: as it is for a field of text, else by Hydra's grammar of override values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    structured = text[:1] in tuple("[{'\"")
    if str in (annotation, *typing.get_args(annotation)) and not structured:
        return None if text == "null" else text
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return text
    return text if override.is_sweep_override() else override.value()


def _build(schema: type[Config], values: dict[str, Any]) -> Any:
    types = typing.get_type_hints(schema)
    return schema(
        **{
            name: _build(types[name], value) if dataclasses.is_dataclass(types[name]) else value
            for name, value in values.items()
        }
    )


def check() -> int:
    """Composes every command's file, and with each of its presets; returns how many configurations that were."""
    choices = [
        (command, choice)
        for command in SCHEMAS
        for choice in [[], *([f"{group}={name}"] for group, names in presets(command).items() for name in names)]
    ]
    for command, choice in choices:
        read(command, choice)
    return len(choices)


if __name__ == "__main__":
    print(f"{conf_dir()}: {check()} configurations read")
