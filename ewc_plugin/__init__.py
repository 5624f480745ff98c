"""Diagonal Elastic Weight Consolidation with an exact per-sample Fisher."""

__version__ = "0.1.0"
