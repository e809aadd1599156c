"""What each neuron, head, hidden component and layer is worth: hooks on the running teacher, and their arithmetic."""
