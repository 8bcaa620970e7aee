"""Low-bit operators: one definition in plain torch, and fast backends that must equal it."""
