"""Runs a script in double precision, where the order of a sum over ranks changes nothing that one sees.

in_double.py SCRIPT ...
"""

import runpy
import sys

import torch

torch.set_default_dtype(torch.float64)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
