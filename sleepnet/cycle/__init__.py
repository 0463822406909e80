"""The cycle of Lee et al. 2026: wake over a window, sleep on it, and training through both."""
