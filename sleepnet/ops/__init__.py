"""Pure array functions: the local rule, window attention, short convolution, positions, norms."""
