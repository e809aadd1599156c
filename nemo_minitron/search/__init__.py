"""From a budget to the best student: `minitron search`. Shapes, what they cost, and rounds of candidates.

Imports the stages (pruning, distillation, evaluation, planning) and what lies below.
"""
