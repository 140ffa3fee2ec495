"""Where the loss rises, and the gradient there."""
