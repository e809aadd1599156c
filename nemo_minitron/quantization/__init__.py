"""`minitron quantize`: a checkpoint in FP8, INT4 or INT8 by ModelOpt, read back, compared, and made ready for a server.

Imports training, conversion and what lies below; no other stage.
"""
