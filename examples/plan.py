"""What Llama 3.1 8B, cut to the width of Llama-3.1-Minitron-4B, needs on eight GPUs of 80 GB. No engine needed."""

from nemo_minitron import compose, plan

sizes = ["student.hidden_size=3072", "student.ffn_hidden_size=9216", "hardware=8x80gb"]
for stage, needs in plan(compose("plan", ["model=llama31_8b", *sizes]))["stages"].items():
    print(f"{stage}: {needs['total'] / 1e9:.1f} GB on the fullest rank")
