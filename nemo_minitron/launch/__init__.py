"""Processes: torchrun's ranks, Slurm jobs, the agent that watches over them, and what a signal does.

Imports jobs and what lies below; knows no model.
"""
