"""One module or folder per study: `python -m experiments <study>`."""
