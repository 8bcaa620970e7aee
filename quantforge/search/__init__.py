"""A `Sensitivity` and a budget become a `BitPlan`. Arithmetic only."""
