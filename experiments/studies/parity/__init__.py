"""Our EWC beside Avalanche's built-in."""
