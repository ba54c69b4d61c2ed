"""Parity at the true widths and the true vocabulary: one sliding and one full layer, values and gradients."""
