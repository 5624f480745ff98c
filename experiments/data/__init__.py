"""Images and the benchmark streams made of them."""
