"""Batch normalization in NumPy, written to be read beside the formulas."""
