"""Published experiments, one file each, with their sources and reference numbers."""
