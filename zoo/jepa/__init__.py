"""What the joint-embedding predictive architectures share."""
