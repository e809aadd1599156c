"""The commands that serve what was written, by server. Sources and versions: docs/deployment.rst."""

import shlex
from pathlib import Path

from nemo_minitron.config import QuantizeConfig
from nemo_minitron.config.schemas.quantization import LOADS, NAMES
from nemo_minitron.quantization.export import TOKENIZER


def commands(config: QuantizeConfig) -> dict[str, list[str]]:
    """Title -> lines of shell for each server that loads the result, or for the one that was chosen."""
    if config.export == "trtllm":
        return {"TensorRT-LLM before 1.0, engine build": _engine_build(config)}
    servers = [config.server] if config.server else LOADS[config.export, config.qformat]
    makers = {"trtllm": _trtllm_serve, "vllm": _vllm, "sglang": _sglang}
    return {NAMES[server]: makers[server](config) for server in servers}


def notes(config: QuantizeConfig) -> list[str]:
    """What a user should know of serving the result."""
    lines = []
    if not LOADS[config.export, config.qformat]:
        lines.append(
            "none of TensorRT-LLM 1.x, vLLM and SGLang loads INT8 SmoothQuant from a Hugging Face directory of "
            "ModelOpt's: export=trtllm is for trtllm-build of older releases"
        )
    if config.qformat == "fp8":
        lines.append("FP8 products need an Ada, Hopper or Blackwell GPU")
    return lines


def _trtllm_serve(config: QuantizeConfig) -> list[str]:
    return [f"trtllm-serve {_path(config)}{_given('--tp_size', config.tp_size)}{_given('--pp_size', config.pp_size)}"]


def _vllm(config: QuantizeConfig) -> list[str]:
    how = " --quantization modelopt" if config.qformat == "fp8" else ""
    tp, pp = _given("--tensor-parallel-size", config.tp_size), _given("--pipeline-parallel-size", config.pp_size)
    return [f"vllm serve {_path(config)}{how}{tp}{pp}"]


def _sglang(config: QuantizeConfig) -> list[str]:
    how = " --quantization modelopt_fp8" if config.qformat == "fp8" else ""
    tp, pp = _given("--tp-size", config.tp_size), _given("--pp-size", config.pp_size)
    return [f"python -m sglang.launch_server --model-path {_path(config)}{how}{tp}{pp}"]


def _engine_build(config: QuantizeConfig) -> list[str]:
    folder = config.output.rstrip("/")
    engine, tokenizer = shlex.quote(f"{folder}-engine"), shlex.quote(f"{folder}/{TOKENIZER}")
    world = config.tp_size * config.pp_size
    ranks = f"mpirun -n {world} --allow-run-as-root " if world > 1 else ""
    plugin = "" if config.qformat == "fp8" else " --gemm_plugin bfloat16"
    workers = f" --workers {world}" if world > 1 else ""
    return [
        f"trtllm-build --checkpoint_dir {_path(config)} --output_dir {engine} --gpt_attention_plugin bfloat16{plugin}"
        f"{workers}",
        f"{ranks}python examples/run.py --engine_dir {engine} --tokenizer_dir {tokenizer} --max_output_len 64 "
        '--input_text "..."',
        f"{ranks}python examples/summarize.py --test_trt_llm --engine_dir {engine} --hf_model_dir {tokenizer} "
        "--data_type bf16",
    ]


def _given(option: str, size: int) -> str:
    return f" {option} {size}" if size > 1 else ""


def _path(config: QuantizeConfig) -> str:
    return shlex.quote(str(Path(config.output)))
