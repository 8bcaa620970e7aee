"""What runs on the GPU. Importing a module of this package imports Triton."""
