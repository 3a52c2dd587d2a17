"""Strategies that several test files draw from. Those of whole cases are in `gsa_ref.cases`."""

from hypothesis import strategies as st

SEEDS = st.integers(0, 2**16)
RULES = st.sampled_from(("proportional", "inverse", "fixed"))
NUMBERS = st.floats(width=32, allow_nan=False)  # ±0, denormals and infinities among them
# The scores of one row and a budget that leaves some of them out. A row repeats a few numbers, so that the budget ends
# among ties; many are among those that a comparison of bits, or of halves, would misplace.
SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 1.0, float("inf"), -float("inf"), float("nan"))
ROWS_WITH_BUDGETS = (
    st.lists(st.sampled_from(SPECIAL) | st.floats(width=32), min_size=1, max_size=4)
    .flatmap(lambda numbers: st.lists(st.sampled_from(numbers), min_size=2, max_size=40))
    .flatmap(lambda row: st.tuples(st.just(row), st.integers(1, len(row) - 1)))
)
