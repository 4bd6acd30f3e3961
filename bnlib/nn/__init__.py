"""Batch normalization in PyTorch: drop-in modules with torch.nn's names and states."""
