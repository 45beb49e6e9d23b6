"""Operators on features and codebooks whose N x K matrix need not exist. One door each; `index_backprop` picks its backend."""

from ibq.ops.door import index_backprop, nearest_code

__all__ = ["index_backprop", "nearest_code"]
