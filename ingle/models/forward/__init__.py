"""The forward pass over packed documents."""
