"""The plain loop: SGD against EWC on three tasks, without Avalanche."""
