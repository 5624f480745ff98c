"""Benchmarks of time and memory, beside the peers."""
