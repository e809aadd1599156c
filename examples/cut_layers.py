"""Layers cut out of the checkpoint in `teacher`, the student handed over to Hugging Face. No engine, no data needed."""

from nemo_minitron import compose, convert, open_checkpoint, prune

cut = ["model.restore_from_path=teacher", "prune.drop_layers=[2]", "prune.num_layers_divisor=1"]
prune(compose("prune", [*cut, "export.save_path=student"]))
convert(compose("convert", ["source=student", "output=student-hf", "to=hf", "verify=tensors"]))
print(open_checkpoint("student-hf").architecture.describe())
