"""``syncnorm selftest``: whether the layer computes and communicates correctly on this machine."""
