"""``syncnorm selftest``: whether this machine computes and communicates as it should."""
