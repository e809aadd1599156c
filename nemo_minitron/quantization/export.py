"""ModelOpt at work: a Hugging Face model in memory, calibrated, and written in the layout that is asked for."""

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.formats.huggingface.config import CONFIG, write_config
from nemo_minitron.checkpoints.formats.huggingface.directory import HuggingFace
from nemo_minitron.checkpoints.generation import FILE as GENERATION
from nemo_minitron.checkpoints.tensors import Cast
from nemo_minitron.checkpoints.transformers_model import load_model, quiet_loading
from nemo_minitron.config import QuantizeConfig
from nemo_minitron.conversion.writing import progress
from nemo_minitron.errors import EngineError
from nemo_minitron.jobs.progress import Progress
from nemo_minitron.quantization.formats import DECODERS, MODELOPT

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

DTYPE = "bfloat16"
PLAIN, TOKENIZER, LOG = ".plain", "tokenizer", "logs/modelopt.log"


def write_plain(source: Checkpoint, folder: Path) -> None:
    """Writes the model as a Hugging Face directory in bf16, tensor by tensor: what ModelOpt starts from."""
    tensors = {
        name: tensor if tensor.dtype == DTYPE else Cast(tensor, DTYPE) for name, tensor in source.tensors.items()
    }
    with progress(tensors, f"{source.format} -> bf16") as watched:
        write_checkpoint(
            folder, HuggingFace.name, source.architecture, watched, source.tokenizer_files, source.generation
        )


@contextlib.contextmanager
def chatter_to(log: Path) -> Iterator[None]:
    """Sends what ModelOpt and transformers print and warn of in the body to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        handlers: list[logging.Handler] = [logging.StreamHandler(file)]
        root = logging.getLogger()
        saved, root.handlers = root.handlers, handlers
        logging.captureWarnings(True)
        try:
            with contextlib.redirect_stdout(file), warnings.catch_warnings(), quiet_loading():
                warnings.simplefilter("default")
                yield
        finally:
            logging.captureWarnings(False)
            root.handlers = saved


def device_of(config: QuantizeConfig) -> str:
    """`cuda` or `cpu`; raises EngineError where a GPU is asked for and there is none."""
    import torch

    there = torch.cuda.is_available()
    if config.accelerator == "gpu" and not there:
        raise EngineError("accelerator = gpu: torch sees no GPU here; give accelerator=cpu, or leave it")
    return "cuda" if there and config.accelerator != "cpu" else "cpu"


def load(folder: Path, device: str) -> "PreTrainedModel":
    """transformers' model of a plain directory, in bf16, ready for inference."""
    import torch
    import transformers

    model = load_model(open_checkpoint(folder), getattr(torch, DTYPE))
    # Settings of generation are copied as they are; transformers would refuse to save some that it reads.
    model.generation_config = transformers.GenerationConfig()
    return model.to(device)


def calibrate(model: "PreTrainedModel", sequences: "torch.Tensor", config: QuantizeConfig) -> None:
    """Runs ModelOpt's algorithm of the format over the sequences [n, s]; changes the model in place."""
    import modelopt.torch.quantization as mtq
    import torch

    batches = sequences.split(config.batch_size)

    def run(model: "PreTrainedModel") -> None:
        with torch.no_grad(), Progress("calibrate", len(sequences), unit="sample") as progress:
            for batch in batches:
                # With a mask that hides nothing transformers knows that attention is causal, and makes no mask [s, s].
                tokens = batch.to(model.device)
                model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, logits_to_keep=1)
                progress.advance(len(batch), tokens=batch.numel())

    mtq.quantize(model, getattr(mtq, MODELOPT[config.qformat]), run)


def export(model: "PreTrainedModel", source: Checkpoint, plain: Path, folder: Path, config: QuantizeConfig) -> None:
    """Writes the quantised model into `folder`, with what a server needs beside the weights."""
    import torch
    from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint

    tokenizer = source.tokenizer_files
    with torch.inference_mode():
        if config.export == "hf":
            export_hf_checkpoint(model, dtype=getattr(torch, DTYPE), export_dir=folder)
            _complete_config(folder / CONFIG)
            shutil.copyfile(plain / GENERATION, folder / GENERATION)
            if tokenizer is not None:
                tokenizer.copy_to(folder)
        else:
            _state_rotary(model.config, source.architecture)
            export_tensorrt_llm_checkpoint(
                model,
                DECODERS[source.architecture.family],
                getattr(torch, DTYPE),
                folder,
                inference_tensor_parallel=config.tp_size,
                inference_pipeline_parallel=config.pp_size,
            )
            if tokenizer is not None:
                tokenizer.copy_to(folder / TOKENIZER)


def _state_rotary(config: "PretrainedConfig", architecture: Architecture) -> None:
    """States the rotary embedding in transformers 4's words, which ModelOpt's older export looks for and transformers 5
    keeps in `rope_parameters`."""
    described = write_config(architecture, DTYPE)
    for name in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
        if described.get(name) is not None:
            config.__dict__.setdefault(name, described[name])


def _complete_config(path: Path) -> None:
    """States the dtype under the older name too: servers with transformers before 4.56 know no other."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.setdefault("torch_dtype", DTYPE)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
