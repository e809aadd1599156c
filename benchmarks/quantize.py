"""What each format costs: a small Llama is trained, quantised to every format, and all of them are evaluated.

    python benchmarks/quantize.py [FOLDER] [STEPS]

Losses are of the dequantised weights: what a server's rounding of activations adds is not in them.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

from nemo_minitron import config as c
from nemo_minitron.data.command import prepare
from nemo_minitron.evaluation.loss import evaluate_loss
from nemo_minitron.quantization.command import quantize
from nemo_minitron.training.finetune import finetune

LENGTH = 128
ARCHITECTURE = {
    "family": "llama", "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 640, "num_attention_heads": 8,
    "num_query_groups": 4, "kv_channels": 32, "vocab_size": None, "seq_length": LENGTH,
}  # fmt: skip


def training(output: Path, data: Path, steps: int, **model) -> dict:
    """Fields of a training configuration."""
    return {
        "trainer": c.TrainerConfig(max_steps=steps, val_check_interval=steps, limit_val_batches=4, accelerator="cpu"),
        "model": c.ModelConfig(
            nemo_path=str(output),
            micro_batch_size=8,
            global_batch_size=8,
            data=c.ModelDataConfig(data_prefix=str(data), seq_length=LENGTH, num_workers=0),
            optim=c.OptimConfig(lr=2e-3, sched=c.SchedConfig(warmup_steps=10, min_lr=2e-4)),
            **model,
        ),
    }


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="quantize-"))
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    data, model = folder / "data", folder / "model"
    prepare(c.DataConfig(output=str(data), words=300_000, vocab_size=1024))
    finetune(c.FinetuneConfig(**training(model, data, steps, init="random", architecture=ARCHITECTURE)))
    print(f"{'format':<10}{'MB':>7}{'of bf16':>9}{'weight error':>14}{'test loss':>11}{'seconds':>9}", flush=True)
    base = None
    for qformat in ("bf16", "fp8", "int8_sq", "int4_awq"):
        output = folder / qformat
        source = c.CalibrationDataConfig(source=str(data))
        with contextlib.redirect_stdout(io.StringIO()):
            made = quantize(c.QuantizeConfig(source=str(model), output=str(output), qformat=qformat, data=source))
        fields = training(folder / f"{qformat}-loss", data, 1, restore_from_path=str(output))
        loss = evaluate_loss(c.LossConfig(**fields, splits=["test"], limit_batches=32)).metrics["test"]["loss"]
        size = made.metrics["weight_bytes"]
        base = base or size
        print(
            f"{qformat:<10}{size / 1e6:>7.2f}{size / base:>9.0%}{made.metrics['relative_error']:>14.2%}{loss:>11.4f}"
            f"{made.timings['total_seconds']:>9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
