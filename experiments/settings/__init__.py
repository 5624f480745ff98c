"""Settings of one run, tuned values, and the commands' grids."""
