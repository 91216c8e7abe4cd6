"""What goes on top of any method: weight masks, optimizers, invariance."""
