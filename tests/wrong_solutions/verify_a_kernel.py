"""Near misses of the hunts, which let a fault survive or refuse what is right, and of the kernels to repair."""

import numpy as np
import torch

from gsa_ref import Selection, check, equations, sparse_attention
from tests.wrong_solutions.planted import plant


def like_data():
    return [(0.8, 1.0, 500), (1.1, 1.0, 500), (1.2, 1.0, 500), (0.9, 1.0, 500)]


def no_row_without_a_mean():
    return [(1.48, 1.0, 100), (0.001, 1.0, 2), (100.0, 1.0, 100)]


def a_row_too_many():
    return [(1.48, 1.0, 100), (0.001, 1.0, 2), (100.0, 1.0, 100), (0.4, 0.0, 100), (0.0, 1.0, 1)]


def fraction_below_one_half():
    return [(1.45, 1.0, 100), (0.001, 1.0, 2), (100.0, 1.0, 100), (0.4, 0.0, 100)]


def refuses_no_selection(select):
    return True


def trusts_no_selection(select):
    return False


def normal_scores(select):
    scores, budget = np.random.default_rng(0).normal(size=(40, 18)), np.arange(40) % 20
    rows = zip(*select(scores, budget), scores, budget, strict=True)
    return all(check.topk_certificate(index, count, row, 0.0, k) for index, count, row, k in rows)


def selections_of_one_width(select):
    """Compares the slots with one of the right ones: a tail of another length is not wrong."""
    scores, budget = np.random.default_rng(0).normal(size=(40, 18)), np.full(40, 5)
    rows = equations.select_tokens(scores, budget)
    indices, _ = select(scores, budget)
    return np.array_equal(indices, np.array(rows))


def last_token_changed(budgets):
    h = np.random.default_rng(0).normal(size=(2, 24, 3))
    changed = h.copy()
    changed[:, -1] = 10
    return np.array_equal(budgets(changed)[:, :-1], budgets(h)[:, :-1])


def never_shorter(budgets):
    rng = np.random.default_rng(0)
    h = rng.normal(size=(2, 24, 3))
    changed = h.copy()
    changed[:, 11:] = 10 * rng.normal(size=(2, 13, 3))
    return np.array_equal(budgets(changed)[:, :11], budgets(h)[:, :11]) and np.array_equal(
        budgets(h[:1]), budgets(h)[:1]
    )


def one_rule(budgets):
    """Budgets that grow with the variance: one of the right rules does not."""
    h = np.random.default_rng(0).normal(size=(1, 24, 3))
    return budgets(3 * h).sum() > budgets(h).sum()


def ragged(attention, tolerance, holes=True, d_type=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 4, generator=generator) for n, h in ((3, 4), (9, 2), (9, 2)))
    start = torch.tensor([2, 6], dtype=torch.int32)
    indices = [[[1, 2, 0], [1, -1, 8], [3, 4, 8]], [[-1, -1, -1], [2, 7, 8], [2, 3, 8]]]
    counts = [[2, 3, 3], [3, 2, 3]]
    if holes:
        k[:, [0, 5]] = v[:, [0, 5]] = torch.nan
        q[0, 1] = 100 * k[0, 1].repeat_interleave(2, 0)
    selection = Selection(torch.tensor(indices, dtype=torch.int32), torch.tensor(counts, dtype=torch.int32))
    got = attention(q, k, v, selection, start)
    gold = sparse_attention(*(x.to(d_type) for x in (q, k, v)), selection, start=start)
    return all(torch.allclose(a.to(d_type), b, rtol=tolerance, atol=tolerance) for a, b in zip(got, gold, strict=True))


def too_loose(attention):
    return ragged(attention, 1e-2)


def too_tight(attention):
    return ragged(attention, 0.0)


def no_nan_and_no_large_logit(attention):
    return ragged(attention, 1e-6, holes=False)


WRONG = {
    "budget_rows": [like_data, no_row_without_a_mean, a_row_too_many, fraction_below_one_half],
    "trust_selection": [refuses_no_selection, trusts_no_selection, normal_scores, selections_of_one_width],
    "trust_causality": [last_token_changed, never_shorter, one_rule],
    "trust_attention": [too_loose, too_tight, no_nan_and_no_large_logit],
} | plant(
    "verify_a_kernel",
    {
        "keep_mask": {
            "drops_what_is_below": [
                (
                    "keep = (x >= tl.load(threshold_ptr + t))",
                    "keep = (1 - (x < tl.load(threshold_ptr + t)).to(tl.int1))",
                )
            ],
            "masked_scores_kept": [(' & (x != float("-inf"))', "")],
            "threshold_excluded": [("x >= tl.load", "x > tl.load")],
        },
        "rows_of_a_view": {
            "rows_wrap": [("tl.load(rows_ptr + i).to(tl.int64)", "tl.load(rows_ptr + i)")],
            "columns_wrap": [("c.to(tl.int64) * stride_c", "c * stride_c")],
            "product_converted": [
                ("tl.load(rows_ptr + i).to(tl.int64)", "tl.load(rows_ptr + i)"),
                ("s * stride_s", "(s * stride_s).to(tl.int64)"),
            ],
        },
        "online_average": {
            "sum_not_rescaled": [("l = l * rescale + tl.sum", "l = l + tl.sum")],
            "average_not_rescaled": [("acc = acc * rescale + ", "acc = acc + ")],
            "empty_first_tile": [('m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)', "m_safe = m_new")],
            "epsilon_in_the_division": [("acc / tl.where(l == 0.0, 1.0, l)", "acc / (l + 1e-4)")],
            "no_maximum": [("tl.exp(m - m_safe), tl.exp(x - m_safe)", "1.0, tl.exp(x)")],
        },
        "column_sums": {
            "last_program_adds_up": [
                (
                    "c = tl.arange(0, BLOCK_D)\n    total",
                    "if tl.program_id(0) != programs - 1:\n        return\n    c = tl.arange(0, BLOCK_D)\n    total",
                ),
                (
                    "    parts_kernel[(programs,)](x, parts, n, d, BLOCK=8, BLOCK_D=block_d)\n    add_parts_kernel[(1,)](parts, out, programs, d, BLOCK_D=block_d)",
                    "    one_launch_kernel[(programs,)](x, parts, out, n, d, programs, BLOCK=8, BLOCK_D=block_d)",
                ),
                (
                    "    ### END SOLUTION",
                    "\n\n@triton.jit\ndef one_launch_kernel(x_ptr, parts_ptr, out_ptr, n, d, programs, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):\n    parts_kernel(x_ptr, parts_ptr, n, d, BLOCK, BLOCK_D)\n    add_parts_kernel(parts_ptr, out_ptr, programs, d, BLOCK_D)",
                ),
            ],
            "one_program": [("triton.cdiv(n, 8), triton", "1, triton"), ("BLOCK=8", "BLOCK=triton.next_power_of_2(n)")],
            "last_part_forgotten": [("for program in range(programs):", "for program in range(programs - 1):")],
            "atomics": [
                (
                    "tl.store(parts_ptr + pid * d + c, tl.sum(x, axis=0), mask=c < d)",
                    "tl.atomic_add(parts_ptr + c, tl.sum(x, axis=0), mask=c < d)",
                ),
                ("torch.empty(programs, d)", "torch.zeros(programs, d)"),
            ],
            "no_kernel": [("    programs, block_d =", "    return x.double().sum(0).float()\n    programs, block_d =")],
        },
    },
)
