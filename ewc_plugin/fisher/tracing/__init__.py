"""Record the layer calls of a forward pass, and the gradients at their outputs."""
