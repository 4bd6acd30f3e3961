"""Batch normalization from scratch: the library that the Batch Norm Book builds.

`bnlib.scratch` is the layer in NumPy, as the chapters derive it. `bnlib.data` holds real digits.
`bnlib.book` draws the pages. Importing `bnlib` and the first two needs NumPy alone.
"""

__version__ = "0.1.0"
