"""Fast kernels. Each is tested against a readable reference, which runs where the kernel cannot."""

#: Target of a position without a loss.
IGNORE_INDEX = -100
