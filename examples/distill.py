"""A tiny teacher made on the embedded corpus, cut in width, distilled and compared. A minute on a CPU."""

from nemo_minitron import compose, distill, evaluate, finetune, prune
from nemo_minitron.data.command import prepare

tiny = "{num_layers:2,hidden_size:64,ffn_hidden_size:128,num_attention_heads:4,vocab_size:512,seq_length:64}"
data = ["model.data.data_prefix=data", "model.data.seq_length=64", "trainer.accelerator=cpu"]
train = ["trainer.max_steps=20", "trainer.val_check_interval=10", "trainer.limit_val_batches=2", "model.optim.lr=2e-3"]
train += ["model.micro_batch_size=8", "model.global_batch_size=32"]
sizes = ["prune.hidden_size=48", "prune.hidden_size_divisor=16", "prune.num_samples=16", "prune.num_block_samples=16"]
pair = ["model.restore_from_path=width", "model.kd_teacher_restore_from_path=made"]
models = "models=[made,width,width-distilled]"

if __name__ == "__main__":  # Megatron starts processes that import this file
    prepare(compose("data", ["output=data", "words=20000", "vocab_size=500", "workers=1"]))
    made = ["model.init=random", f"model.architecture={tiny}", "model.nemo_path=made"]
    finetune(compose("finetune", [*made, *data, *train]))
    prune(compose("prune", ["model.restore_from_path=made", "export.save_path=width", *sizes, *data]))
    distill(compose("distill", [*pair, "model.nemo_path=width-distilled", *data, *train]))
    print(evaluate(compose("evaluate", [models, "tasks=perplexity", "corpus=data", "limit=4"])))
