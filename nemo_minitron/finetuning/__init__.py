"""Training with the language-model loss: a teacher from random weights, and teacher correction."""
