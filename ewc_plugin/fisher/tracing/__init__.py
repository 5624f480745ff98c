"""How a forward pass is recorded: layer calls, and the gradients behind them."""
