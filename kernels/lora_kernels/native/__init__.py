"""The C kernels: compiled once for this machine with the C compiler at hand, and called through ctypes."""
