"""A job: one folder made at a time, beside and then renamed, locked, with its manifest, memory and progress.

Imports artifacts and what lies below; knows no model and no engine.
"""
