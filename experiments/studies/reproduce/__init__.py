"""Published experiments, and whether their numbers come out."""
