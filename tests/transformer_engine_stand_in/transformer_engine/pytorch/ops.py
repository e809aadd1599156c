"""Operations that fuse: names only."""

import torch


class FusibleOperation(torch.nn.Module):
    def __init__(self) -> None:
        raise NotImplementedError("the stand-in for Transformer Engine fuses no operations")


class Sequential(FusibleOperation):
    pass
