"""Many runs: which are missing, on which process, and what became of them."""
