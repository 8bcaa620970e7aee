"""A model and its calibration tokens become a `Sensitivity`."""
