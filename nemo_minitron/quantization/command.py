"""`minitron quantize`: a checkpoint of any format into what a server loads, read back and compared with its source."""

import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.checkpoints.formats.huggingface.config import write_config
from nemo_minitron.checkpoints.transformers_model import check_describable
from nemo_minitron.config import QuantizeConfig
from nemo_minitron.conversion.writing import check_room
from nemo_minitron.errors import ConfigError
from nemo_minitron.jobs.job import Job
from nemo_minitron.packages.extras import require
from nemo_minitron.quantization import calibration, export, serving
from nemo_minitron.quantization.calibration import FEW_SAMPLES, Calibration
from nemo_minitron.quantization.formats import shape_problems

BF16_BYTES = 2
#: Settings that say where things are, not what comes out.
NOT_THE_RESULT = (
    "overwrite", "source", "output", "server", "accelerator", "data.tokenizer", "batch_size",
)  # fmt: skip


def quantize(config: QuantizeConfig) -> Manifest:
    """Quantises `config.source` on text of `config.data.source` and writes `config.output`.

    Raises:
        ConfigError, CheckpointError, DataError: what is asked for cannot be, before any work.
        MissingPackageError: ModelOpt is not installed.
        EngineError: what ModelOpt wrote is not what it should be; nothing is left then.
        OutputExistsError: the output was made from something else.
    """
    source = open_checkpoint(config.source, "checkpoint to quantise")
    check(config, source)
    text = calibration.prepare(config, source) if config.calibrates else None
    job = Job(
        stage="quantize",
        output=Path(config.output),
        config=dataclasses.asdict(config),
        inputs={"source": source.path, **(text.inputs if text else {})},
        seed=config.seed,
        overwrite=config.overwrite,
        ignore=NOT_THE_RESULT
        + (("data.source",) if text and text.inputs else ())
        + (("tp_size", "pp_size") if config.export == "hf" else ()),
        sampled=("source",),
    )
    if job.finished() is None:
        check_room(config.output, 2 * BF16_BYTES * source.architecture.parameters())
    manifest = job.run(lambda partial: _quantized(partial, config, source, text))
    _show(config, manifest)
    return manifest


def check(config: QuantizeConfig, source: Checkpoint) -> None:
    """Raises ConfigError or CheckpointError where the model cannot be written or served as asked."""
    write_config(source.architecture, export.DTYPE)
    problems = shape_problems(source.architecture, config)
    if problems:
        raise ConfigError(problems, "minitron quantize")
    if config.calibrates or config.export == "trtllm":
        require("modelopt", "minitron quantize")
        check_describable(source.architecture, export.DTYPE)
    if config.accelerator == "gpu":
        export.device_of(config)
    measured = source.architecture.activation == "squared_relu" and config.qformat in ("fp8", "int8_sq")
    if measured and config.num_samples < FEW_SAMPLES:
        print(
            f"note: a squared ReLU has rare large activations, which {config.num_samples} sequences may miss; "
            f"num_samples={FEW_SAMPLES} or more is safer",
            file=sys.stderr,
        )


def _quantized(partial: Path, config: QuantizeConfig, source: Checkpoint, text: Calibration | None) -> dict[str, Any]:
    """Fills the partial folder; returns what the manifest says of it."""
    from nemo_minitron.quantization.compare import compare

    device = export.device_of(config)
    plain = partial / export.PLAIN
    timings, started = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        timings[f"{name}_seconds"], started = time.perf_counter() - started, time.perf_counter()

    export.write_plain(source, partial if config.export == "hf" and not config.calibrates else plain)
    lap("convert")
    if config.calibrates or config.export == "trtllm":
        with export.chatter_to(partial / export.LOG):
            model = export.load(plain, device)
            if text is not None:
                export.calibrate(model, text.draw(), config)
            lap("calibrate")
            export.export(model, source, plain, partial, config)
            lap("export")
            del model
    shutil.rmtree(plain, ignore_errors=True)
    report = compare(source, partial, config)
    lap("compare")
    written = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    return {
        "metrics": {
            "parameters": source.architecture.parameters(),
            "weight_bytes": written,
            "of_bf16": written / (BF16_BYTES * source.architecture.parameters()),
            "relative_error": report.error,
            "worst_step": report.worst_step,
            "tensors_unchanged": report.plain,
        },
        "timings": timings,
        "details": {
            "architecture": source.architecture.to_dict(),
            "linears": report.linears,
            "error_table": report.table() if report.linears else "",
            "sequence_length": text.length if text else None,
            "device": device,
        },
    }


def _show(config: QuantizeConfig, manifest: Manifest) -> None:
    """Prints the errors and the commands that serve the result."""
    if manifest.details.get("error_table"):
        print(f"weights, read back: relative error |written - source| / |source| ({config.qformat})")
        print(manifest.details["error_table"])
        print("of the weights alone: what rounding activations adds shows on the server only")
    for title, lines in serving.commands(config).items():
        print(f"{title}:")
        for line in lines:
            print(f"  {line}")
    for note in serving.notes(config):
        print(f"note: {note}")
