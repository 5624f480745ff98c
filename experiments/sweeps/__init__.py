"""Execute many runs in parallel: task queue, executors, workers, progress."""
