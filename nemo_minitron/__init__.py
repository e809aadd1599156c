"""Minitron pruning and knowledge distillation for the NVIDIA NeMo framework."""

__version__ = "0.1.0"
