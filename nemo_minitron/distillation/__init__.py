"""Knowledge distillation: `minitron distill`, what is put on ModelOpt's model and taken off again, and the losses.

Imports training, megatron and what lies below; no other stage.
"""
