"""Measuring a checkpoint."""
