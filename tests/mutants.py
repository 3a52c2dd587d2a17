"""Faults for the kernels: each is one changed line in a copy of `gsa_fast`, and `verify` must turn red.

    python -m tests.mutants              all of them, one line each
    python -m tests.mutants --only NAME  some of them

A check that stays green under a fault checks nothing. Exit status 1 if a fault survives or the unchanged copy fails.
"""

import argparse
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: the faults are looked for in the interpreter

import torch
import triton  # noqa: F401  imported once here, inherited by every child
from tqdm import tqdm

import gsa_ref.cases  # noqa: F401

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 120  # a fault may make a loop endless


@dataclass(frozen=True)
class Mutant:
    """Replace `original`, which occurs once in gsa_fast/<file>, by `fault`; the check of `stem` must notice."""

    name: str
    stem: str
    file: str
    original: str
    fault: str

    def apply(self, package: Path) -> None:
        path = package / self.file
        source = path.read_text()
        if (found := source.count(self.original)) != 1:
            raise ValueError(f"mutant {self.name}: expected its line once in {self.file}, found it {found} times")
        path.write_text(source.replace(self.original, self.fault))


def _of(stem: str, file: str, *faults: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(name, stem, file, original, fault) for name, original, fault in faults]


MUTANTS = [
    *_of(
        "indexer",
        "indexer.py",
        ("indexer sees one key of the future", "s[None, :] <= position[:, None]", "s[None, :] <= position[:, None] + 1"),
        ("indexer scores padded queries", " & (position < length)[:, None]", ""),
        ("indexer forgets a head", "for head in range(H_I):", "for head in range(H_I - 1):"),
        ("indexer forgets the bias", 'input_precision="ieee") + bias', 'input_precision="ieee")'),
        ("indexer forgets the scale", "z = scale * tl.dot", "z = tl.dot"),
        ("indexer head weight without sigmoid", "stable_sigmoid(w.to(tl.float32))", "w.to(tl.float32)"),
        ("indexer reads keys with the batch stride of q", "k_ptr + b * stride_kb", "k_ptr + b * stride_qb"),
        ("indexer skips the last tile", "if tile_s * BLOCK_S <= last", "if tile_s * BLOCK_S + BLOCK_S <= last"),
        ("indexer ignores start", "position = tl.load(start_ptr + b) + first_row + row", "position = first_row + row"),
        ("indexer loads channels past the width", "mask=(s < S)[:, None] & (c < d_I)[None, :]", "mask=(s < S)[:, None]"),
    ),
    *_of("indexer", "_primitives.py", ("sigmoid mirrored", "tl.where(x >= 0, 1.0, e)", "tl.where(x >= 0, e, 1.0)")),
    *_of(
        "indexed_selection",
        "indexer.py",
        ("statistics count one key too many", "n = tl.sum(counted.to(tl.float32), axis=1)", "n = tl.sum(counted.to(tl.float32), axis=1) + 1"),
        ("statistics overwrite the neighbouring tile", "3 * tiles_s + tile_s", "3 * tiles_s"),
    ),
    *_of("indexed_selection", "_primitives.py", ("query does not see itself", "position + 1, length", "position, length")),
    *_of(
        "budget",
        "budget.py",
        ("moments merged without the distance of means", " + delta * delta * n_a * share_b", ""),
        ("sample variance instead of population", "tl.store(variance_ptr + pid, m2 / tl.maximum(n, 1.0))", "tl.store(variance_ptr + pid, m2 / tl.maximum(n - 1.0, 1.0))"),
        ("proportional rule dropped", "if RULE == 0:", "if RULE == 3:"),
        ("inverse rule is proportional", "tl.div_rn(mean_variance, variance)", "tl.div_rn(variance, mean_variance)"),
        ("budget below k_min", "tl.maximum(k_base * ratio, k_min * 1.0)", "k_base * ratio"),
        ("budget above k_max", ", k_max * 1.0)", ", 1000000.0)"),
        ("budget above the visible keys", "tl.minimum(tl.floor(k).to(tl.int32), n_valid)", "tl.floor(k).to(tl.int32)"),
        ("budget rounded up", "tl.floor(k)", "tl.ceil(k)"),
        ("unset mean not noticed", "ratio = tl.where(mean_variance > 0, ratio, 1.0)", "ratio = ratio + 0.0"),
        ("NaN scores enter the variance", "counted = (x == x) & ", "counted = "),
    ),
    *_of(
        "selection",
        "selection/rows.py",
        ("minus zero below zero", "bits = tl.where(x == 0.0, 0, bits)", "bits = bits + 0"),
        ("NaN ranks by its bits", "return tl.where(x == x, key, LOWEST_KEY)", "return key"),
        ("negative scores in reverse", "bits ^ 0x7FFFFFFF", "bits"),
        ("one tie too many", "tie_rank < ties_wanted", "tie_rank <= ties_wanted"),
        ("ties restart in every tile", "ties_seen += tl.sum(tie, axis=0)", "ties_seen += 0"),
        ("slots restart in every tile", "written += tl.sum(take_int, axis=0)", "written += 0"),
        ("tail starts one slot late", "(slot >= kappa)", "(slot > kappa)"),
        ("masked positions are candidates", 'return ordered_key(x), x != float("-inf")', "return ordered_key(x), s < n_keys"),
        ("budget ignored", "tl.minimum(tl.minimum(tl.maximum(k, 0), K), n_candidates)", "tl.minimum(K, n_candidates)"),
        ("bisection stops one step early", "while low < high:", "while low + 1 < high:"),
    ),
    *_of(
        "indexed_selection",
        "selection/rows.py",
        ("chunks overwrite one another", "out_row = b * L + t", "out_row = b * L + pid % rows"),
        ("chunks start at position 0", "first_row + pid % rows", "0 * first_row + pid % rows"),
        ("statistics of the wrong row", "statistics_ptr + pid * 3 * n_tiles", "statistics_ptr + pid * n_tiles"),
    ),
    *_of(
        "indexed_selection",
        "selection/scores.py",
        ("streamed score forgets a head", "if j + 1 < H_I:", "if j + 2 < H_I:"),
        ("streamed heads swap their weights", "weight[j][:, None] * other", "weight[j + 1][:, None] * other"),
        ("streamed score overflows", "tl.minimum(x, LARGEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL)", "x * 64.0"),
        ("streamed bias in base e", ".to(tl.float32) * -LOG2_E", ".to(tl.float32) * -1.0"),
        ("approximate sigmoid of z instead of z/2", "(factor * HALF_LN_2) * tl.dot", "(factor * HALF_LN_2 * 2.0) * tl.dot"),
    ),
    *_of(
        "indexed_selection",
        "selection/shortlist.py",
        ("shortlist sees the future in a masked tile", "            if first + BLOCK_S > full:\n                scores", "            if first > full:\n                scores"),
        ("shortlist counts masked keys in the variance", "            if first + BLOCK_S > full:\n                deviation", "            if first > S:\n                deviation"),
        ("shortlist ignores start", "tl.load(start_ptr + b) + first_row + row", "first_row + row"),
        ("shortlist chunks start at position 0", "tl.load(start_ptr + b) + first_row + row", "tl.load(start_ptr + b) + row"),
        ("mean without the shift", "spans + span, shift + mean_deviation", "spans + span, mean_deviation"),
        ("mean deviation over a whole span", "row_total / tl.maximum(n_span, 1.0)", "row_total / SPAN"),
        ("spread around the shift", " - row_total * mean_deviation", ""),
        ("Σ and Σ² cancel", "shift = tl.where(lowest", "shift = -300.0 + tl.where(lowest"),
        ("spans start at the first key", "p_k + (first_key + column)", "p_k + column"),
        ("second split runs forwards", "step = 1 - 2 * (split % 2)", "step = 1 + 0 * (split % 2)"),
        ("tile of keys not advanced", "p_tile += tl.cast(stride_ks, tl.int64) * BLOCK_S", "p_tile += 0"),
        ("entries hold their run's first position", "(position + i)[None, :]", "position[None, :]"),
        ("runs on one another", "- count\n    pointer", "- 2 * count\n    pointer"),
        ("a run does not count the one before", "up_to += up_to << 16", "up_to += 0"),
        ("keys in the order of the columns", "return (c % 8 // 2) * (BLOCK_S // RUNS) + c // 8 * 2 + c % 2", "return c"),
        ("entries of a tile on one another", "p_entry += step * n_new", "p_entry += step * (n_new > 0)"),
    ),
    *_of("indexed_selection", "_primitives.py", ("entry's score and position swapped", "(bits << 32) | position.to(tl.int64)", "(position.to(tl.int64) << 32) | bits")),
    *_of("indexed_selection", "_primitives.py", ("candidates counted above the threshold", "return count + (score >= reach)", "return count + (score > reach)")),
    *_of(
        "indexed_selection",
        "selection/pick.py",
        ("short shortlist trusted", "(size < kappa) | ", ""),
        ("NaN variance trusted", " | (variance != variance)", ""),
        ("place of the second split off by one", "segment - 1 - (slot - before)", "segment - (slot - before)"),
        ("second split read forwards", "segment - 1 - (slot - before)", "(slot - before)"),
        ("one tie too few from the shortlist", "ties_wanted = kappa - tl.sum(greater, axis=0)", "ties_wanted = kappa - 1 - tl.sum(greater, axis=0)"),
        ("ties of the shortlist not counted", "counts = (equal << 16) + greater", "counts = greater"),
        ("shortlist counts above its threshold", "count = tl.sum((key >= middle)", "count = tl.sum((key > middle)"),
        ("shortlist tail starts one slot late", "mask=(slot >= kappa) & (slot < K)", "mask=(slot > kappa) & (slot < K)"),
        ("streamed chunks overwrite one another", "out_row = b * L + t", "out_row = b * L + pid % rows"),
        ("large shortlists of the first chunk only", "row // rows * L + first_row + row % rows", "row // rows * L + row % rows"),
        ("redo skips a row", "tl.load(n_failed_ptr), tl.num_programs(0)", "tl.load(n_failed_ptr) - 1, tl.num_programs(0)"),
        ("redo forgets the last keys", "for first in range(0, n_visible, BLOCK_S):", "for first in range(0, n_visible - 64, BLOCK_S):"),
        ("redo restarts its moments", "n, mean, m2 = merge_moments(n, mean, m2,", "n, mean, m2 = merge_moments(0.0, mean, m2,"),
        ("redo writes to the row of the list", "indices_ptr + out_row * K, K, BLOCK_ROW", "indices_ptr + i * K, K, BLOCK_ROW"),
    ),
    *_of(
        "attention",
        "attention/rows.py",
        ("accumulator not rescaled", "acc * rescale[:, None]", "acc"),
        ("sum not rescaled", "l * rescale", "l"),
        ("running maximum forgotten", "m_new = tl.maximum(m, tl.max(logits, axis=1))", "m_new = tl.max(logits, axis=1)"),
        ("fully masked first tile gives NaN", 'tl.where(m_new == float("-inf"), 0.0, m_new)', "m_new"),
        ("lse in base 2", "(m + tl.log2(l_safe)) * LN_2", "m + tl.log2(l_safe)"),
        ("values that are not finite kept", "mask=mask & (bad == 0)[:, None]", "mask=mask & (bad >= 0)[:, None]"),
        ("only infinity is not finite", "(~(tl.abs(x.to(tl.float32)) < float(\"inf\")))", "(tl.abs(x.to(tl.float32)) == float(\"inf\"))"),
        ("empty row divides by zero", "l_safe = tl.where(empty, 1.0, l)", "l_safe = l"),
        ("output gate without sigmoid", "out * stable_sigmoid(gate.to(tl.float32))", "out * gate.to(tl.float32)"),
        ("keys load channels past the width", "return tl.load(p, mask=(c < d_h)[None, :], other=0.0)", "return tl.load(p)"),
    ),
    *_of(
        "attention",
        "attention/__init__.py",
        ("value gate forgotten", 'v = apply_gate(v, value_gate_logits, impl="triton")', "v = v + 0"),
    ),
    *_of(
        "attention",
        "attention/gather.py",
        ("future slots attended", " & (s <= position)", ""),
        ("query heads interleaved over groups", "head = h_kv * GROUP + g", "head = g * H_kv + h_kv"),
        ("attention forgets the scale", "logits = scale_log2 * tl.dot", "logits = tl.dot"),
        ("empty slots attended", 'tl.where(filled[None, :], logits, float("-inf"))', "logits"),
        ("last slots skipped", "for first in range(0, count, BLOCK_K):", "for first in range(0, count - 1, BLOCK_K):"),
        ("values read with the strides of keys", "p_v + row * stride_vs", "p_v + row * stride_ks"),
    ),
    *_of(
        "attention",
        "attention/bits.py",
        ("masks mirrored", "<< (n % 32)", "<< (31 - n % 32)"),
        ("second word of a block not read", "tl.load(p_word + step)", "tl.load(p_word)"),
        ("bits of future slots", " & (s <= position)", ""),
        ("bits shifted by one", "tl.int32) << (s & 31)", "tl.int32) << ((s + 1) & 31)"),
        ("bits of the tile not cleared", "mask=first + k < n_words", "mask=first + k < n_words - 2"),
        ("tile sees one query less", "(row // QUERIES + 1) * QUERIES, rows) - 1", "(row // QUERIES + 1) * QUERIES, rows) - 1 - 32"),
        ("tile of bits ignores start", "tl.load(start_ptr + b) + first_row + last_row + 1", "first_row + last_row + 1"),
        ("rows with NaN not gathered", "!= 0:\n            attend_query(", "> 1:\n            attend_query("),
        ("every row has selected something", "occupied = tl.zeros([BLOCK_K], tl.int32)", "occupied = tl.full([BLOCK_K], 1, tl.int32)"),
    ),
    *_of("attention", "_primitives.py", ("popcount loses a byte", "eights * 0x01010101", "eights * 0x00010101")),
    *_of(
        "attention",
        "attention/union.py",
        ("union forgets a query", "union = union | tl.load(p_bits + i * words + w,", "union = tl.load(p_bits + i * words + w,"),
        ("union takes a bit twice", "rest = rest & (rest - 1)", "rest = rest & tl.where(rank == 0, -1, rest - 1)"),
        ("union forgets the last bit of full words", "range(tl.max(in_word, axis=0))", "range(tl.minimum(tl.max(in_word, axis=0), 2))"),
        ("union blocks overwrite one another", "before = size + tl.cumsum", "before = tl.cumsum"),
        ("masks of the neighbouring query", "p_masks + of_32[None, :] * QUERIES + query[:, None],", "p_masks + of_32[None, :] * QUERIES + (query ^ 1)[:, None],"),
        ("masks of the block behind", "selected_keys(p_masks + first // 32 * QUERIES,", "selected_keys(p_masks + (first // 32 + BLOCK_N // 32) * QUERIES,"),
        ("union padding is selected by somebody", "mask=(slot < size)[None, :] & ((query", "mask=(slot >= 0)[None, :] & ((query"),
        ("union padding not written", "mask=slot < tl.cdiv(size, BLOCK_N) * BLOCK_N", "mask=slot < size"),
        ("union counts a position too few", "size += tl.sum(in_word, axis=0)", "size += tl.maximum(tl.sum(in_word, axis=0) - 1, 0)"),
        ("union repair leaves the tile alone", "if tl.load(broken_ptr + i) != 0:", "if tl.load(broken_ptr + i) > 1:"),
        ("union repair forgets who selected it", "tl.where(selected, bad[None, :], 0)", "tl.where(selected, 0, 0)"),
        ("union tiles swap query and head", "query = r // GROUP", "query = r % QUERIES"),
        ("union heads interleaved over groups", "head = h_kv * GROUP + r % GROUP", "head = r % GROUP * H_kv + h_kv"),
        ("union skips its last keys", "range(0, tl.load(sizes_ptr + tile), BLOCK_N)", "range(0, tl.load(sizes_ptr + tile) - 1, BLOCK_N)"),
        ("union chunks start at row 0", "t = first_row + row\n", "t = row\n"),
        ("union values read with the strides of keys", "b_v = load_keys(p_v + s * stride_vs", "b_v = load_keys(p_v + s * stride_ks"),
        ("union forgets the scale", "logits = scale_log2 * tl.dot", "logits = tl.dot"),
    ),
    *_of(
        "attention_backward",
        "attention/union.py",
        ("union ranks count from the first word", "tl.store(ranks_ptr + pid * words + w, before", "tl.store(ranks_ptr + pid * words + w, before - size"),
    ),
    *_of(
        "attention_backward",
        "attention/union_backward.py",
        ("gradient of the output not gated", "(dout * stable_sigmoid(gate)).to(do_ptr", "dout.to(do_ptr"),
        ("gradient of the gate without its slope", "dout * out * stable_sigmoid(-gate)", "dout * out"),
        ("gradient of lse added instead of subtracted", "delta -= tl.load(dlse_ptr", "delta += tl.load(dlse_ptr"),
        ("output gradient read with the strides of the gate", "b * stride_ob + t * stride_ol + head * stride_oh)[:, None] + c[None, :] * stride_od", "b * stride_gb + t * stride_gl + head * stride_gh)[:, None] + c[None, :] * stride_gd"),
        ("gradients forget delta", "p * (dp - delta[:, None])", "p * dp"),
        ("gradient of keys unscaled", "dk = scale * tl.dot", "dk = tl.dot"),
        ("gradient of queries unscaled", "(scale * dq).to(", "dq.to("),
        ("gradient weights of unselected keys", "tl.where(selected, tl.exp2(logits - lse[:, None]), 0.0)", "tl.exp2(logits - lse[:, None])"),
        ("gradient weights forget lse", "tl.exp2(logits - lse[:, None])", "tl.exp2(logits)"),
        ("gradient of values by dS", "tl.dot(tl.trans(p.to(b_do.dtype)), b_do", "tl.dot(tl.trans(p.to(b_do.dtype)), b_q"),
        ("gradient skips the last block of a union", "for first in range(0, size, BLOCK_N):", "for first in range(0, size - BLOCK_N, BLOCK_N):"),
        ("gradient of values in the row of keys", "width, to_dv = 2 * H_kv * d_h, H_kv * d_h", "width, to_dv = 2 * H_kv * d_h, 0"),
        ("gradient parts of all sequences to the first", "(b * S + s)[:, None] * width", "s[:, None] * width"),
        ("gradient parts of every block in one place", "p_dkv += BLOCK_N * width", "p_dkv += 0"),
        ("gradients of a round without its first tile", "(offset >= start) & (offset < end), size, 0)", "(offset > start) & (offset < end), size, 0)"),
        ("gradient values with the strides of keys", "load_keys(p_v + s * stride_vs", "load_keys(p_v + s * stride_ks"),
    ),
    *_of(
        "attention_backward",
        "attention/partial_sums.py",
        ("parts listed without the lower keys of a word", "slot = rank[:, None] + popcount(word[:, None] & below[None, :])", "slot = rank[:, None]"),
        ("parts of later tiles over the first ones", "        before += tl.sum(member, axis=0)", "        before += 0"),
        ("parts of one tile block only", "for first in range(0, tiles, BLOCK_T):", "for first in range(0, 1, BLOCK_T):"),
        ("parts listed for the first sequence", "lists_ptr + (b * S + s)[None, :] * capacity", "lists_ptr + s[None, :] * capacity"),
        ("parts of another round summed", "mine = (row >= start) & (row < end)", "mine = row >= 0"),
        ("parts forget what earlier rounds gave", "total = tl.load(dkv_ptr + key * width + c, mask=c < width, other=0.0)", "total = tl.zeros([BLOCK_C], tl.float32)"),
        ("parts beyond the first few dropped", "for first in range(0, count, BLOCK_T):", "for first in range(0, 1, BLOCK_T):"),
        ("parts of a word's keys the other way round", "s = w * 32 + lane", "s = w * 32 + 31 - lane"),
    ),
    *_of(
        "attention_backward",
        "attention/backward.py",
        ("gradients of chunks begin at row 0", "scalars = first_row, rows,", "scalars = 0, rows,"),
    ),
    *_of(
        "attention_backward",
        "gates.py",
        ("value gate gradient without x", "(dx * x * stable_sigmoid(-gate))", "(dx * stable_sigmoid(-gate))"),
        ("value gradient not gated", "dx = dout * stable_sigmoid(gate)", "dx = dout"),
        ("value gate gradient reads x with the strides of dout", "x_ptr + i0 * stride_x0 + i1 * stride_x1 + i2 * stride_x2 + i3 * stride_x3\n    p_gate = gate_ptr + i0 * stride_g0 + i1 * stride_g1 + i2 * stride_g2 + i3 * stride_g3\n    dout", "x_ptr + i0 * stride_o0 + i1 * stride_o1 + i2 * stride_o2 + i3 * stride_o3\n    p_gate = gate_ptr + i0 * stride_g0 + i1 * stride_g1 + i2 * stride_g2 + i3 * stride_g3\n    dout"),
    ),
    *_of(
        "attention",
        "attention/masked.py",
        ("key blocks miss a query", "for i in range(tl.minimum(QUERIES, rows - row)):", "for i in range(tl.minimum(QUERIES, rows - row) - 1):"),
        ("key blocks overwrite one another", "slot = size + tl.cumsum", "slot = tl.cumsum"),
        ("bits of the neighbouring row", "row_bits = tl.minimum(row, rows - 1)", "row_bits = tl.minimum(row + 1, rows - 1)"),
        ("masked chunks start at row 0", "t = first_row + row\n", "t = row\n"),
        ("masked block not advanced", "block = next_block", "block = block + 0"),
        ("masked looks two blocks ahead", "next_block = tl.load(p_blocks + i + 1)", "next_block = tl.load(p_blocks + i + 2)"),
        ("masked skips the last block", "for i in range(tl.load(sizes_ptr + tile)):", "for i in range(tl.load(sizes_ptr + tile) - 1):"),
        ("masked logits not masked", 'tl.where(selected, logits, float("-inf"))', "logits"),
        ("masked keys of the first head", "h_kv * stride_kh", "0 * stride_kh"),
        ("masked repair takes the neighbour's word", "tl.where(selected, bad[None, :], 0)", "bad[None, :]"),
        ("masked repair skips a tile", "end_of_broken(broken_ptr, first, n_tiles * H_kv, BLOCK_I)):", "end_of_broken(broken_ptr, first, n_tiles * H_kv, BLOCK_I) - 1):"),
        ("masked forgets the scale", "logits = scale_log2 * tl.dot", "logits = tl.dot"),
    ),
    *_of(
        "gates",
        "gates.py",
        ("gate without sigmoid", "x * stable_sigmoid(gate)", "x * gate"),
        ("gate read with the strides of x", "i2 * stride_g2 + i3 * stride_g3\n    x = tl.load", "i2 * stride_x2 + i3 * stride_g3\n    x = tl.load"),
        ("gate skips the last elements", "to(out_ptr.dtype.element_ty), mask=inside)", "to(out_ptr.dtype.element_ty), mask=inside & (i < n_elements - 1))"),
    ),
    *_of(
        "decode",
        "decode/scores.py",
        ("decode scores ignore start", "count_visible(tl.load(start_ptr + b) + t, ", "count_visible(t, "),
        ("decode forgets the last head", "(col_t < L) & (col_j < H_I)", "(col_t < L) & (col_j < H_I - 1)"),
        ("decode reads every query as the first", "col_t = (col // BLOCK_H).to(tl.int64)", "col_t = (col // BLOCK_H * 0).to(tl.int64)"),
        ("decode members in one place", "member = first_member + r % BLOCK_M", "member = first_member + r % BLOCK_M * 0"),
        ("decode loses the last members", "tl.cdiv(last_key - first_group, groups), BLOCK_M", "(last_key - first_group) // groups, BLOCK_M"),
        ("decode scores the future", "visible = s[:, None] < n_visible[None, :]", "visible = s[:, None] < n_visible[None, :] + 1"),
        ("decode NaN ranks first", "x.to(tl.int32, bitcast=True), NAN_KEY)", "x.to(tl.int32, bitcast=True), 0x7FFFFFFF)"),
        ("decode mean stands still", "mean += shift", "mean += 0.0 * shift"),
        ("decode spread around the new mean", "m2 += deviation * (deviation - shift)", "m2 += (deviation - shift) * (deviation - shift)"),
        ("decode merges entries without their distance", "m2 + n * distance * distance", "m2"),
        ("decode bias in base e", ".to(tl.float32) * -LOG2_E", ".to(tl.float32) * -1.0"),
        ("decode statistics of the neighbouring row", "statistics_ptr + row * 3 * tiles + tile", "statistics_ptr + row * tiles + tile"),
        ("decode arrivals not cleared", "tl.zeros([BLOCK_C], tl.int32)", "tl.full([BLOCK_C], 1, tl.int32)"),
        ("decode arrivals of the first query cleared only", "mask=counter < counters", "mask=counter < counters // L"),
    ),
    *_of(
        "decode",
        "decode/select.py",
        ("decode chooses too few groups", "largest, kappa, kappa // 16)", "largest, tl.maximum(kappa // 2, 1), kappa // 16)"),
        ("decode bounds of all rows in one place", "tl.store(low_ptr + row, low)", "tl.store(low_ptr, low)"),
        ("decode second shard stores the budget", "if shard == 0:\n            tl.store(counts_ptr", "if shard == 1:\n            tl.store(counts_ptr"),
        ("decode with few groups keeps the best only", "(n_groups > kappa)", "(n_groups > 0)"),
        ("decode positions as if groups were contiguous", "position = member * groups + group", "position = group * MEMBERS + member"),
        ("decode gathers the first member only", "* MEMBERS + member, mask=inside, other", "* MEMBERS + member * 0, mask=inside, other"),
        ("decode candidates on one another", "        written += size", "        written += 0"),
        ("decode trusts what did not fit", "elif most <= SEGMENT:", "elif most <= 100000:"),
        ("decode trusts half a segment", "if most <= SEGMENT // 2:", "if most <= SEGMENT // 2 + 1:"),
        ("decode shards read the same groups", "group = shard + SHARDS * i", "group = SHARDS * i"),
        ("decode shards share one segment", "p_words + shard * (2 * SEGMENT), shard", "p_words, shard"),
        ("decode leaves unused candidates as they are", "mask=unused >= written", "mask=unused > 1000000"),
        ("decode shard forgets its last group", "tl.minimum(groups, n_visible) - shard, 0), SHARDS)", "tl.minimum(groups, n_visible) - shard, 0) - 1, SHARDS)"),
        ("decode rows of a tile on one another", "before[:, None] + tl.cumsum(keep, axis=1)", "before[:, None] * 0 + tl.cumsum(keep, axis=1)"),
        ("decode counts ties as better", "(both & 0xFFFF)", "(both & 0xFFFF) - ties"),
        ("decode smallest group forgotten", "-smallest, n_groups, largest", "largest, n_groups, largest"),
        ("decode takes every tie", "(greater | (equal & (position <= last_tie)))", "(greater | (equal & (position >= 0)))"),
        ("decode takes the last ties", "mirrored = tl.where(equal, last_tie - tie, -1)", "mirrored = tl.where(equal, tie, -1)"),
        ("decode row bisection above the threshold", "total += ((key > threshold) | ((key == threshold)", "total += ((key > threshold + 1) | ((key == threshold)"),
        ("decode row ties one position short", "n_visible, low, middle, MEMBERS", "n_visible, low, middle + 1, MEMBERS"),
        ("decode row writes one block", "        written += tl.sum(take, axis=0)", "        written += 0"),
        ("decode row forgets the last groups", "end = tl.minimum(groups, n_visible) * MEMBERS", "end = (tl.minimum(groups, n_visible) - 1) * MEMBERS"),
        ("decode statistics of too few tiles", "tl.cdiv(n_groups, BLOCK_G)", "n_groups // BLOCK_G"),
    ),
    *_of(
        "decode",
        "decode/attend.py",
        ("decode combines before the last arrives", "== n_splits - 1:", "== 0:"),
        ("decode splits not rescaled", "tl.exp2(m_i - m_safe[None, :])[:, :, None]", "tl.exp2(m_i * 0.0)[:, :, None]"),
        ("decode sums of splits not rescaled", "l_all * tl.exp2(m_all - m_safe[None, :])", "l_all"),
        ("decode combines all but one split", "range(0, n_splits, BLOCK_SPLITS)", "range(0, n_splits - 1, BLOCK_SPLITS)"),
        ("decode splits overlap", "tl.minimum((split + 1) * size, count)", "tl.minimum((split + 1) * size + 1, count)"),
        ("decode splits read the same slots", "range(split * size, ", "range(0 * size, "),
        ("decode heads interleaved over groups", "q_ptr, b, t, h_kv * GROUP + g, c", "q_ptr, b, t, h_kv + g * H_kv, c"),
        ("decode attends to empty slots", 'tl.where((slot < count)[None, :], logits, float("-inf"))', "logits"),
        ("decode values with the strides of keys", "p_v + s * stride_vs", "p_v + s * stride_ks"),
        ("decode empty row divides by zero", "(head >= 0) & (count == 0)", "(head >= 0) & (count < 0)"),
        ("decode partial sums in one place", "(split * GROUP + g)[:, None] * d_h", "g[:, None] * d_h"),
    ),
    *_of(
        "training",
        "training/tiles.py",
        ("loss scores forget the scale", "z = scale * tl.dot", "z = tl.dot"),
        ("loss scores forget a head", "for head in range(H_I):", "for head in range(H_I - 1):"),
        ("loss scores forget the bias", 'input_precision="ieee") + bias', 'input_precision="ieee")'),
        ("divergence without the entropy of the teacher", "p * (tl.log(p) - x)", "p * (0.0 - x)"),
        ("loss of the future", "s[None, :] <= position[:, None]", "s[None, :] <= position[:, None] + 1"),
        ("loss of padded keys", "tl.where(begin < length, tl.minimum(tl.minimum(end, length), S), 0)", "tl.minimum(end, S)"),
        ("loss reads too few keys", "tl.minimum(tl.minimum(end, length), S), 0)", "tl.minimum(tl.minimum(end - 1, length), S), 0)"),
    ),
    *_of(
        "training",
        "training/teacher.py",
        ("teacher sum not rescaled", "l * tl.exp2(m - m_safe)", "l"),
        ("teacher of interleaved key heads", "head // GROUP, c", "head % GROUP, c"),
        ("selected lse of interleaved heads", "((b * rows + row) * H_kv + h_kv) * GROUP + g", "((b * rows + row) * GROUP + g) * H_kv + h_kv"),
        ("selected teacher keeps the last heads only", "tl.load(p_row + slot, mask=slot < count, other=0.0) + p", "p"),
        ("selected teacher on empty slots", "tl.where(filled, tl.sum(tl.exp2(logits - lse[:, None]), axis=0), 0.0)", "tl.sum(tl.exp2(logits - lse[:, None]), axis=0)"),
        ("selected teacher of the first chunk's lse", "lse[:, first_row : first_row + rows]", "lse[:, :rows]"),
        ("loss takes padded rows", "tl.where(position < length, count, 0)", "count"),
        ("loss takes slots of the future", "(s >= 0) & (s < S) & (s <= position)", "(s >= 0) & (s < S)"),
    ),
    *_of(
        "training",
        "training/student.py",
        ("teacher is a sum over heads", "p / (H_kv * GROUP)", "p"),
        ("selected teacher is a sum over heads", "mask=slot < count, other=0.0) / H\n        m_new", "mask=slot < count, other=0.0)\n        m_new"),
        ("loss forgets the temperature", "x = tl.where(visible, scores * inverse_temperature,", "x = tl.where(visible, scores,"),
        ("score gradient forgets the temperature", "tl.exp(scores * inverse_temperature - lse[:, None]) - p", "tl.exp(scores - lse[:, None]) - p"),
        ("score gradient without the teacher", "inverse_temperature - lse[:, None]) - p", "inverse_temperature - lse[:, None])"),
        ("selected sum not rescaled", "l = l * tl.exp(m - m_safe) + tl.exp(x - m_safe)", "l = l + tl.exp(x - m_safe)"),
        ("selected columns not merged", "tl.sum(l * tl.exp(m - largest), axis=0)", "tl.sum(l, axis=0)"),
        ("selected gradient in the slot's column", "pid * S + s, score_gradient", "pid * S + slot, score_gradient"),
        ("selected loss without the student's lse", "tl.sum(mass, axis=0) * lse", "0.0 * lse"),
        ("selected head gradient without sigmoid'", "weight * (1.0 - weight) * weight_sum", "weight * weight_sum"),
        ("selected loss counts empty rows", "valid.to(tl.int32)", "valid.to(tl.int32) * 0 + 1"),
    ),
    *_of(
        "training",
        "training/chain.py",
        ("query gradient without sigmoid'", "dz = weighted * (1.0 - sigmoid)", "dz = weighted"),
        ("query gradient skips the last tile", "for first_key in range(0, n_keys, BLOCK_S):", "for first_key in range(0, n_keys - BLOCK_S, BLOCK_S):"),
        ("head gradients in one place", "out = (b * L + t) * H_I + j", "out = (b * L + t) * H_I"),
        ("bias gradient without the weight", "weight * bias_gradient, mask=inside", "bias_gradient, mask=inside"),
        ("key gradient without the weight", "weight[None, :] * score_gradient * sigmoid", "score_gradient * sigmoid"),
        ("key gradient of the last chunk only", "before + k_gradient *", "k_gradient *"),
        ("key gradient skips rows that see the tile", "// BLOCK_L * BLOCK_L  #", "// BLOCK_L * BLOCK_L + BLOCK_L  #"),
        ("key gradient keeps the last chunk's slots", "        if CLEAR:", "        if not CLEAR:"),
        ("key gradient of unseen rows", "end = tl.minimum(rows, ", "end = tl.minimum(rows - 1, "),
        ("key gradient forgets the scale", "k_gradient * (scale / GRADIENT_SCALE), mask", "k_gradient / GRADIENT_SCALE, mask"),
    ),
    *_of(
        "training",
        "training/__init__.py",
        ("loss is a sum over rows", "sum(dtype=torch.float64) / n_rows)", "sum(dtype=torch.float64))"),
        ("gradient forgets the temperature", "div_(temperature * n_rows)", "div_(n_rows)"),
        ("gradient ignores the loss's gradient", "(gradient * x).to(dtype)", "x.to(dtype)"),
    ),
]  # fmt: skip


def check_copy(mutant: Mutant | None) -> tuple[str, str]:
    """(verdict, detail) of the check on a copy with this fault; None runs every check on an unchanged copy.

    Runs in a fresh child process, which imports the copy under the name gsa_fast.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "gsa_fast"
        shutil.copytree(ROOT / "gsa_fast", package, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            mutant.apply(package)
        sys.path.insert(0, folder)
        sys.dont_write_bytecode = True
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        run = importlib.import_module("gsa_fast.verification.run")
        main = importlib.import_module("gsa_fast.__main__")
        interpreter = importlib.import_module("gsa_fast.verification.interpreter")
        if Path(run.__file__).parents[1] != package:
            raise RuntimeError(f"expected gsa_fast from {package}, got {run.__file__}")
        run.SHRINK_SECONDS = 0.0  # any failure will do
        interpreter.enable_interpreter_checks()
        stems = run.STEMS if mutant is None else (mutant.stem,)
        with interpreter.small_tiles():
            for stem in stems:
                row = run.verify_row(
                    stem, "float32", "cpu", main.INTERPRETER_EXAMPLES[stem] // (1 if mutant else 3), seed=0
                )
                if row.failed:
                    return row.verdict, row.detail.splitlines()[0]
        return "pass", ""


def run_in_children(work: list[Mutant | None], jobs: int) -> list[tuple[str, str]]:
    """`check_copy` for each, in forked processes: a fault may write out of bounds and take its process with it."""
    context = multiprocessing.get_context("fork")
    outcomes: dict[int, tuple[str, str]] = {}
    running: dict[Any, tuple[int, Any, float]] = {}

    def child(pipe: Any, mutant: Mutant | None) -> None:
        pipe.send(check_copy(mutant))

    waiting = list(enumerate(work))[::-1]
    with tqdm(total=len(work), unit="fault", leave=False, disable=None) as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                i, mutant = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=child, args=(sender, mutant))
                process.start()
                sender.close()
                running[process.sentinel] = (i, (process, receiver), time.monotonic())
            connection.wait(list(running), timeout=1)
            for sentinel, (i, (process, receiver), started) in list(running.items()):
                # The unchanged copy runs the checks of every stem.
                expired = time.monotonic() - started > TIMEOUT_SECONDS * (10 if work[i] is None else 1)
                if process.is_alive() and not expired:
                    continue
                del running[sentinel]
                bar.update()
                if process.is_alive():
                    process.kill()
                    outcomes[i] = ("TIMEOUT", f"no verdict after {TIMEOUT_SECONDS} s")
                    continue
                try:
                    outcomes[i] = receiver.recv()
                except EOFError:  # it died before it could answer
                    outcomes[i] = ("CRASH", f"the process ended with status {process.exitcode}")
    return [outcomes[i] for i in range(len(work))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="faults whose name contains NAME")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    options = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if not options.only or any(part in m.name for part in options.only)]
    if not chosen:
        parser.error(f"argument --only: no fault is named like {options.only}")
    work: list[Mutant | None] = [None, *chosen]
    control, *outcomes = run_in_children(work, options.jobs)
    survivors = 0
    for mutant, (verdict, detail) in zip(chosen, outcomes, strict=True):
        killed = verdict != "pass"
        survivors += not killed
        status = "killed  " if killed else "SURVIVED"
        print(f"{status}  {mutant.stem:18s} {mutant.name:48s} {detail[:90]}")
    print(f"\n{len(chosen) - survivors} of {len(chosen)} faults turn `verify` red; the unchanged copy: {control[0]}.")
    return 1 if survivors or control[0] != "pass" else 0


if __name__ == "__main__":
    sys.exit(main())
