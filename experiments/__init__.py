"""Experiments on split and permuted MNIST, run from a clone: `python -m experiments`."""
