"""Figures over runs."""

# Okabe and Ito's palette, readable by colour-blind people.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
