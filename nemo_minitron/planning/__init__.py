"""Memory and arithmetic of a run from sizes alone: `minitron plan`, and what a flow chooses by.

Imports architecture, layouts and what lies below; reads no weights.
"""
