"""Files for, and from, other programs."""
