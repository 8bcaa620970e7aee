"""The outside world becomes a `Model` and calibration tokens."""
