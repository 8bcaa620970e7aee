"""How good a network is: perplexity, KL to the float model, agreement, size."""
