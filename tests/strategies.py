"""Strategies that several test files draw from. Those of whole cases are in `gsa_ref.cases`."""

from hypothesis import strategies as st

SEEDS = st.integers(0, 2**16)
RULES = st.sampled_from(("proportional", "inverse", "fixed"))
NUMBERS = st.floats(width=32, allow_nan=False)  # ±0, denormals and infinities among them
# Scores of one row: often the same, often one of the values that a comparison of bits or of halves would misplace.
SCORES = st.sampled_from((0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan"))) | st.floats(width=32)
ROWS_OF_SCORES = st.lists(SCORES, min_size=1, max_size=40)
