"""A mixed-precision quantization compiler."""
