"""Pure cores: tensors in, tensors out. No modules, hooks, devices, files or logging."""
