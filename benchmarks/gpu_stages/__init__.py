"""The stages of `gpu_session.py`."""
