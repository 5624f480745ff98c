"""Our EWC beside Avalanche's EWC."""
