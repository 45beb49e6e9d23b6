"""Operators on features and codebooks whose N x K matrix need not exist: `index_backprop` and `nearest_code`."""

from ibq.ops.index_backprop import index_backprop
from ibq.ops.nearest_code import nearest_code

__all__ = ["index_backprop", "nearest_code"]
