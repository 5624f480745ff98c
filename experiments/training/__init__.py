"""One run: networks, training, checkpoints, loggers."""
