"""DIAMOND: an agent that learns in the dreams of a diffusion model."""
