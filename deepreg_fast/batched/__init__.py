"""Arithmetic on one number or one image per batch entry, and iteration loops without device synchronization."""
