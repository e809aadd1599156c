"""NeMo-1 checkpoints: `.nemo` archives of the NeMo 24 containers and before, and their unpacked folders."""
