"""Definitions in plain torch: transforms (dct, hadamard, walsh) and energies (conv_chain, icnn, tv).

The definitions are the reference: nothing here is optimized, and everything else is tested against it.
"""
