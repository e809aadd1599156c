"""Faces towards other programs: NeMo's connectors, NeMo-Run's command line, Jupyter notebooks.

The top of the house: nothing imports it.
"""
