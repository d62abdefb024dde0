"""The C++ backend: bindings of the extension built from `csrc/cpu`."""
