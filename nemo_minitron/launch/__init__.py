"""Processes: torchrun's ranks and Slurm jobs (`launcher` starts them, `torchrun` and `slurm` are the two ways, of one
`application`), the agent that watches over them, a stage spread over ranks, and what a signal does.

Imports jobs and what lies below; knows no model.
"""
