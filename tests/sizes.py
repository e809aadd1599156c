"""Sizes of small architectures that several tests share."""

SMALL = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 32, "vocab_size": 256, "seq_length": 32,
}  # fmt: skip
NEMOTRON = {
    "family": "nemotron", "normalization": "LayerNorm", "layernorm_zero_centered_gamma": True,
    "activation": "squared_relu", "gated_linear_unit": False, "rotary_percent": 0.5,
}  # fmt: skip
