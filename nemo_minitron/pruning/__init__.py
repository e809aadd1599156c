"""Pruning: `minitron prune`, what is cut and how (Minitron, compensated), and the arithmetic behind it.

Imports training, conversion, megatron and what lies below; no other stage.
"""
