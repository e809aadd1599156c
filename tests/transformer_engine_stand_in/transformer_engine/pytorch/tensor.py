"""Quantised tensors: a class that no tensor is of."""


class QuantizedTensor:
    pass
