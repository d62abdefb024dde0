"""Bridges to other packages, imported on first use; nothing else in this package imports them."""
