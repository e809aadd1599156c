"""Third-party packages: what is installed (`versions`), which extra brings it (`extras`), and wheels of the package
index (`wheels`).

Imports errors only. What differs between versions of NeMo, Megatron Core, ModelOpt and transformers is asked here.
"""
