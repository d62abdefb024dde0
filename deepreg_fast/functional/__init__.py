"""Definitions in plain torch: transforms (dct, hadamard, walsh) and energies (conv_chain, icnn, tv).

A definition is the reference: nothing here is optimised, everything else is compared with it.
"""
