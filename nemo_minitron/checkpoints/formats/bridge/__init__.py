"""Megatron-Bridge checkpoints, and Megatron-LM's, which Bridge reads too: an iteration's folder with its weights in
torch_dist, and what says of which model they are."""
