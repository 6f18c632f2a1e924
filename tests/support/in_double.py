"""Runs a script in double precision, so that the order of a sum over ranks makes no visible difference.

Usage: in_double.py SCRIPT ...
"""

import runpy
import sys

import torch

torch.set_default_dtype(torch.float64)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
