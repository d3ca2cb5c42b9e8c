"""The demo: how its learning rates were chosen, and its sweep over p and τ as a page."""
