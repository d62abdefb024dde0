"""Stages of `gpu_session.py`."""
