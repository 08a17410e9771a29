"""World Models: V, M and C, trained one after the other."""
