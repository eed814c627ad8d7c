"""Fast kernels. Each is tested against a readable reference, which runs where the kernel cannot."""

#: Target of a position without loss.
IGNORE_INDEX = -100
