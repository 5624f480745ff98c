"""Tables and figures for the terminal, papers and HTML."""
