"""EWC beside the true posterior, on problems of two parameters."""
