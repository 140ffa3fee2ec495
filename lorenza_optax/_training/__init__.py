"""What a training loop needs beside update: low-rank gradients, scalars, shardings, checkpoints."""
