"""Smaller and faster: what of a trained network is left, how it recovers, which runtime computes it, and what that costs."""
