"""Near misses of the puzzles on writing kernels."""

from tests.wrong_solutions.planted import plant

WRONG = plant(
    "from_equation_to_kernel",
    {
        "gate_rows": {
            "contiguous_x": [("x_ptr + t * stride_xt + c * stride_xc", "x_ptr + i")],
            "strides_of_x_for_the_gate": [("t * stride_gt + c * stride_gc", "t * stride_xt + c * stride_xc")],
            "load_without_a_mask": [("c * stride_xc, mask=i < n, other=0.0)", "c * stride_xc)")],
            "store_without_a_mask": [("stable_sigmoid(gate), mask=i < n)", "stable_sigmoid(gate))")],
            "last_element_forgotten": [("stable_sigmoid(gate), mask=i < n)", "stable_sigmoid(gate), mask=i < n - 1)")],
        },
        "row_statistics": {
            "maximum_filled_with_zero": [('other=float("-inf")', "other=0.0")],
            "sum_filled_with_a_number": [("mask=s < length, other=0.0", "mask=s < length, other=1.0")],
            "first_tile_only": [("for first in range(0, S, BLOCK):", "for first in range(0, BLOCK, BLOCK):")],
            "mask_of_the_width": [("p_x, mask=s < length, other=0.0", "p_x, mask=s < S, other=0.0")],
            "columns_side_by_side": [("s * stride_s", "s")],
        },
        "group_logits": {
            "keys_loaded_for_each_head": [
                (
                    "    for h in range(G):\n",
                    "    for h in range(G):\n        keys = tl.load(p_k, mask=s[:, None] < S, other=0.0)\n",
                ),
                (
                    "p_k = k_ptr + s[:, None] * stride_ks + c[None, :] * stride_kd",
                    "p_k = k_ptr + s[:, None] * stride_ks + tl.minimum(c, d_h - 1)[None, :] * stride_kd",
                ),
            ],
            "a_program_for_each_head_as_well": [
                ("for h in range(G):", "for h in range(tl.program_id(1), tl.program_id(1) + 1):"),
                ("group_kernel[(triton.cdiv(S, 16),)]", "group_kernel[(triton.cdiv(S, 16), G)]"),
            ],
            "scale_forgotten": [("scale * tl.sum", "tl.sum")],
            "channels_past_the_width": [("mask=(s < S)[:, None] & (c < d_h)[None, :]", "mask=(s < S)[:, None]")],
            "no_kernel": [
                (
                    "    (G, d_h), S = q.shape, len(k)",
                    "    return q @ k.T * len(q[0]) ** -0.5\n    (G, d_h), S = q.shape, len(k)",
                )
            ],
        },
        "two_sigmoids": {
            "two_divisions": [("(a * e_z + b * e_y) / (e_y * e_z)", "a / e_y + b / e_z")],
            "overflow": [("tl.minimum(-1.4426950408889634 * y, 63.0)", "-1.4426950408889634 * y")],
            "exponents_stop_too_early": [("* y, 63.0)", "* y, 15.0)")],
            "base_e_read_as_base_2": [("-1.4426950408889634 * z", "-z")],
            "weights_swapped": [("(a * e_z + b * e_y)", "(a * e_y + b * e_z)")],
        },
        "batch_scores": {
            "padded_queries_see": [
                ("& (position < tl.load(lengths_ptr + b))[:, None]", "& (s < tl.load(lengths_ptr + b))[None, :]")
            ],
            "padding_ignored": [(" & (position < tl.load(lengths_ptr + b))[:, None]", "")],
            "start_of_sequence_0": [("tl.load(start_ptr + b)", "tl.load(start_ptr)")],
            "does_not_see_itself": [("(s[None, :] <= position[:, None])", "(s[None, :] < position[:, None])")],
            "output_without_batch": [("out_ptr + b * L * S + row", "out_ptr + row")],
            "zero_for_the_unseen": [('float("-inf")', "0.0")],
            "channels_past_the_width": [("mask=(s < S)[:, None] & (c < d_I)[None, :]", "mask=(s < S)[:, None]")],
        },
        "threshold_by_counting": {
            "negative_numbers_in_reverse": [("key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)", "key = bits")],
            "minus_zero_below_zero": [
                ("tl.where(x == 0.0, 0, x.to(tl.int32, bitcast=True))", "x.to(tl.int32, bitcast=True)")
            ],
            "padding_counts": [("((s < S) & (key >= middle))", "(key >= middle)")],
            "positive_scores_only": [("tl.full([], -(2**31), tl.int64)", "tl.full([], 0, tl.int64)")],
            "one_rank_too_low": [("axis=0) >= k", "axis=0) > k")],
            "ties_counted": [("k - above", "tl.sum(((s < S) & (key == low)).to(tl.int32), axis=0)")],
        },
        "attend_selected": {
            "ends_at_the_first_hole": [
                (
                    "for first in range(0, K, BLOCK):",
                    "for first in range(0, (tl.load(indices_ptr) >= 0).to(tl.int32) * K, BLOCK):",
                ),
            ],
            "holes_have_weight": [
                (
                    'tl.where(s >= 0, scale * tl.sum(keys * query[None, :], axis=1), float("-inf"))',
                    "scale * tl.sum(keys * query[None, :], axis=1)",
                )
            ],
            "not_rescaled": [("acc = acc * rescale + ", "acc = acc + ")],
            "empty_first_tile": [('m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)', "m_safe = m_new")],
            "empty_list_divides_by_zero": [("acc / l_safe", "acc / l")],
            "hole_is_the_last_key": [
                (
                    "filled = (s >= 0)[:, None] & ",
                    "s = tl.where((s < 0) & (slot < K), 11, s)\n        filled = (s >= 0)[:, None] & ",
                )
            ],
            "lse_without_maximum": [("m + tl.log(l_safe)", "tl.log(l_safe)")],
            "unselected_values_read": [
                (
                    "stride_vd, mask=filled, other=0.0)",
                    "stride_vd, mask=(c < d_h)[None, :] & (s >= -1)[:, None], other=0.0)",
                ),
                ("v_ptr + s[:, None] * stride_vs", "v_ptr + tl.maximum(s, 0)[:, None] * stride_vs"),
            ],
        },
    },
)
