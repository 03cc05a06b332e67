"""qsweep: find the compressed version of a PyTorch model to ship."""
