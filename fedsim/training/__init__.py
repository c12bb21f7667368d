"""What one client does with one model: losses, optimizers, the local loop, evaluation."""
