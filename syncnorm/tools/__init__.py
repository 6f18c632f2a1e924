"""What stands behind the command ``syncnorm``. Nothing outside of this package imports it."""
