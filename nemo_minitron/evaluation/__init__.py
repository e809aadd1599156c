"""What checkpoints know and how fast they are: `minitron evaluate`, `generate` and `benchmark`.

Imports training, report's tables and what lies below; no other stage.
"""
