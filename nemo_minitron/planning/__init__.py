"""What a stage will need, worked out before anything is loaded: memory of each rank and arithmetic of each token."""
