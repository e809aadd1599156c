"""The configuration of every command: keyword-only dataclasses behind conf/*.yaml, and how they come about.

`schemas` has the dataclasses, which this package re-exports; `commands` the table of commands; `compose` reads files
and presets by Hydra, `merge` sets values by name, `compat` knows NeMo 24.07's names, `reflect` says what fields take
and mean, `command_line` turns a configuration back into a command. Imports packages and errors only.

A dataclass states its fields and, in ``problems()``, what makes them wrong. ``validated`` collects the problems of a
whole tree and raises them at once. Names follow the NeMo 24.07 documentation, so that its overrides work unchanged.
"""

from nemo_minitron.config.schemas.base import Config, all_problems, at_least, one_of, validated
from nemo_minitron.config.schemas.checkpoints import (
    HF_SOURCE,
    NGC_SOURCE,
    WHEEL_SOURCE,
    ConvertConfig,
    DownloadConfig,
    InspectConfig,
)
from nemo_minitron.config.schemas.data import DataConfig
from nemo_minitron.config.schemas.distillation import LIVE, DistillConfig, HiddenLossConfig, KDConfig
from nemo_minitron.config.schemas.evaluation import BenchmarkConfig, EvaluateConfig, GenerateConfig, InferenceSettings
from nemo_minitron.config.schemas.flow import (
    DistillRecipeConfig,
    FlowConfig,
    FlowDataConfig,
    FlowModelConfig,
    FlowPruneConfig,
    InstructRecipeConfig,
    RecipeConfig,
)
from nemo_minitron.config.schemas.formats import FORMATS, OUTPUT_FORMATS, format_problems, output_format
from nemo_minitron.config.schemas.hardware import SCORING, TRAINING, HardwareConfig, Ranks, TrainerConfig, is_bf16
from nemo_minitron.config.schemas.instructions import InstructConfig, PeftConfig
from nemo_minitron.config.schemas.launch import LaunchConfig, SlurmConfig
from nemo_minitron.config.schemas.planning import PLAN_STAGES, PlanConfig, PlanStudentConfig
from nemo_minitron.config.schemas.pruning import (
    ExportConfig,
    InferenceConfig,
    PruneConfig,
    PruneModelConfig,
    PruneTargets,
)
from nemo_minitron.config.schemas.quantization import CalibrationDataConfig, QuantizeConfig
from nemo_minitron.config.schemas.report import ReportConfig
from nemo_minitron.config.schemas.searching import SearchConfig, SearchCutConfig, SearchSettings
from nemo_minitron.config.schemas.teaching import AnswersConfig, TeachConfig
from nemo_minitron.config.schemas.training import (
    ExpManagerConfig,
    FinetuneConfig,
    LossConfig,
    ModelConfig,
    ModelDataConfig,
    OptimConfig,
    SchedConfig,
    StageConfig,
    TrainingConfig,
    layout_problems,
    missing_data,
)

__all__ = [
    "AnswersConfig",
    "CalibrationDataConfig",
    "BenchmarkConfig",
    "Config",
    "ConvertConfig",
    "DataConfig",
    "DistillConfig",
    "DistillRecipeConfig",
    "DownloadConfig",
    "EvaluateConfig",
    "ExpManagerConfig",
    "ExportConfig",
    "FORMATS",
    "OUTPUT_FORMATS",
    "FinetuneConfig",
    "FlowConfig",
    "FlowDataConfig",
    "FlowModelConfig",
    "FlowPruneConfig",
    "GenerateConfig",
    "HF_SOURCE",
    "HardwareConfig",
    "HiddenLossConfig",
    "InferenceConfig",
    "InferenceSettings",
    "InspectConfig",
    "InstructConfig",
    "InstructRecipeConfig",
    "KDConfig",
    "LIVE",
    "LaunchConfig",
    "LossConfig",
    "ModelConfig",
    "ModelDataConfig",
    "NGC_SOURCE",
    "OptimConfig",
    "PLAN_STAGES",
    "PlanConfig",
    "PlanStudentConfig",
    "PeftConfig",
    "PruneConfig",
    "PruneModelConfig",
    "PruneTargets",
    "QuantizeConfig",
    "Ranks",
    "RecipeConfig",
    "ReportConfig",
    "SCORING",
    "SchedConfig",
    "SlurmConfig",
    "SearchConfig",
    "SearchCutConfig",
    "SearchSettings",
    "StageConfig",
    "TeachConfig",
    "TrainingConfig",
    "TRAINING",
    "TrainerConfig",
    "WHEEL_SOURCE",
    "all_problems",
    "at_least",
    "format_problems",
    "is_bf16",
    "layout_problems",
    "missing_data",
    "one_of",
    "output_format",
    "validated",
]
