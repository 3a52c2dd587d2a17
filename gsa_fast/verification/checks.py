"""One check per stem: run the kernels on a case and compare with gold, the equations in float64 on the same inputs.

Up to `ALL_ROWS` queries every row is compared, above that a sample with both ends and the tile edges: the equations are
written to be read, not to be fast.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import gsa_fast
import gsa_ref
from gsa_fast.attention import METHODS
from gsa_fast.verification.interpreter import attention_method, poisoned_memory
from gsa_ref import Selection, cases, equations
from gsa_ref.check import (
    Verdict,
    attention_gradient_tolerance,
    attention_tolerance,
    budget_interval,
    error_budget,
    gate_tolerance,
    kl_tolerance,
    score_tolerance,
    score_verdict,
    topk_certificate,
    unit_roundoff,
    variance_interval,
)
from gsa_ref.indexer import visible

ALL_ROWS = 128
SAMPLED_ROWS = 48


def numpy(x: Tensor) -> np.ndarray:
    """A tensor as float64 (or integer) NumPy array; exact for every dtype that the kernels take."""
    return (x.double() if x.is_floating_point() else x).detach().cpu().numpy()


def row_slices(L: int, seed: int) -> list[slice]:
    """Which query rows to compare: all of them, or single rows of a long sequence."""
    if L <= ALL_ROWS:
        return [slice(0, L)]
    edges = {t for edge in (0, 64, 128, L - 64, L) for t in (edge - 1, edge) if 0 <= t < L}
    rows = edges | set(random.Random(seed).sample(range(L), SAMPLED_ROWS))
    return [slice(t, t + 1) for t in sorted(rows)]


def sequence_value(value: int | Tensor | None, b: int, default: int) -> int:
    """`start` or `lengths` of sequence b."""
    return default if value is None else int(value[b]) if isinstance(value, Tensor) else value


def check_indexer(case: cases.IndexerCase, device: str) -> Iterator[Verdict]:
    """Scores within ε of Eq. 7, entry by entry, and −inf exactly where a query may not look."""
    arguments = case.arguments(device)
    with poisoned_memory():
        scores = gsa_fast.indexer_scores(**arguments, scale=case.scale, impl="triton")
    for b, rows, gold, tolerance in gold_scores(arguments, case.scale, case.seed):
        yield score_verdict(numpy(scores[b, rows]), gold, tolerance)


def gold_scores(
    arguments: dict[str, Any], scale: float, seed: int, sigmoid_mode: str = "exact"
) -> Iterator[tuple[int, slice, np.ndarray, np.ndarray]]:
    """(b, rows, Eq. 7, its ε) for the rows to compare."""
    q_idx, k_idx, head_logits, bias = (arguments[name] for name in ("q_idx", "k_idx", "head_logits", "bias"))
    (B, L), S = q_idx.shape[:2], k_idx.shape[1]
    for b in range(B):
        key = numpy(k_idx[b])
        start, length = sequence_value(arguments["start"], b, 0), sequence_value(arguments["lengths"], b, S)
        for rows in row_slices(L, seed):
            inputs = numpy(q_idx[b, rows]), key, numpy(head_logits[b, rows]), numpy(bias)
            gold = equations.indexer_scores(*inputs, scale=scale, start=start + rows.start, length=length)
            yield b, rows, gold, score_tolerance(*inputs, scale=scale, sigmoid_mode=sigmoid_mode)


def check_budget(case: cases.BudgetCase, device: str) -> Iterator[Verdict]:
    """The variance inside its interval; the budget bit for bit the reference's, and in the interval of Eq. 8."""
    scores = case.scores(device)
    sizes: dict[str, Any] = {"k_base": case.k_base, "k_min": case.k_min, "k_max": case.k_max, "rule": case.rule}
    n_valid = (scores != -torch.inf).sum(-1, dtype=torch.int32)
    with poisoned_memory():
        variance = gsa_fast.score_variance(scores, impl="triton")
        budget = gsa_fast.token_budget(variance, case.mean_variance, n_valid, **sizes, impl="triton")
    expected = gsa_ref.token_budget(variance, case.mean_variance, n_valid, **sizes)
    different = int((budget != expected).sum())
    yield Verdict(different == 0, float(different), 0.0, f"{different} budgets differ from the reference")
    for b in range(case.B):
        for rows in row_slices(case.L, case.seed):
            row_scores = numpy(scores[b, rows])
            yield from variance_and_budget_verdicts(
                numpy(variance[b, rows]),
                numpy(budget[b, rows]),
                row_scores,
                np.zeros_like(row_scores),
                (row_scores != -np.inf).sum(-1),
                case.mean_variance,
                sizes,
            )


def variance_and_budget_verdicts(
    variance: np.ndarray,
    budget: np.ndarray,
    gold: np.ndarray,
    tolerance: np.ndarray,
    n_valid: np.ndarray,
    mean_variance: float,
    sizes: dict[str, Any],
) -> Iterator[Verdict]:
    """Variance and budget of some rows against the intervals that scores within `tolerance` of gold allow."""
    gold_variance = equations.score_variance(gold)
    counted = np.isfinite(gold)
    largest = np.where(counted, np.abs(gold), 0).max(-1, initial=0)
    epsilon = np.where(counted, tolerance, 0).max(-1, initial=0)
    low, high = variance_interval(gold_variance, epsilon, largest, n_valid)
    error = np.abs(variance - gold_variance)
    allowed = np.maximum(high - gold_variance, gold_variance - low)
    worst = int(np.argmax(error - allowed))
    inside = bool(((low <= variance) & (variance <= high)).all())
    yield Verdict(inside, float(error[worst]), float(allowed[worst]), "" if inside else f"variance of row {worst}")
    k_low, k_high = budget_interval(gold_variance, epsilon, largest, mean_variance, n_valid, **sizes)
    wrong = np.flatnonzero((budget < k_low) | (budget > k_high))
    detail = f"k_t is {budget[wrong[0]]}, expected {k_low[wrong[0]]} to {k_high[wrong[0]]}" if len(wrong) else ""
    yield Verdict(not len(wrong), float(len(wrong)), 0.0, detail)


def check_selection(case: cases.SelectionCase, device: str) -> Iterator[Verdict]:
    """Given scores, exactly the reference's selection, and the certificate with tolerance 0."""
    scores, budget = case.arguments(device)
    with poisoned_memory():
        selection = gsa_fast.select_tokens(scores, budget, width=case.width, impl="triton")
    expected = gsa_ref.select_tokens(scores, budget, width=case.width)
    different = int((selection.indices != expected.indices).any(-1).sum() + (selection.counts != expected.counts).sum())
    yield Verdict(different == 0, float(different), 0.0, f"{different} rows differ from the reference")
    for b in range(case.B):
        for rows in row_slices(case.L, case.seed):
            wanted = np.minimum(numpy(budget[b, rows]), case.width)
            row_scores = numpy(scores[b, rows])
            yield from selection_verdicts(selection, b, rows, row_scores, np.zeros_like(row_scores), wanted)


def selection_verdicts(
    selection: Selection, b: int, rows: slice, gold: np.ndarray, tolerance: np.ndarray, budget: np.ndarray
) -> Iterator[Verdict]:
    """The certificate, row by row. The error is the largest inversion: a better score left out for a worse one."""
    indices, counts = numpy(selection.indices[b, rows]), numpy(selection.counts[b, rows])
    for t in range(len(gold)):
        certificate = topk_certificate(indices[t], int(counts[t]), gold[t], tolerance[t], int(budget[t]))
        inversion, allowed = 0.0, 0.0
        if certificate:
            finite = np.isfinite(gold[t])
            inside = np.zeros(len(finite), bool)
            inside[indices[t][: counts[t]]] = True
            kept, left_out = gold[t][finite & inside], gold[t][finite & ~inside]
            if len(kept) and len(left_out):
                inversion = max(0.0, float(left_out.max() - kept.min()))
                allowed = 2 * float(tolerance[t][finite].max())
        detail = "" if certificate else f"row [{b}, {rows.start + t}]: {certificate.reason}"
        yield Verdict(certificate.passed, inversion, allowed, detail)


def check_indexed_selection(case: cases.IndexedSelectionCase, device: str) -> Iterator[Verdict]:
    """Variance and k_t in their intervals, and the certificate on the selection for the k_t that it took.

    The seed decides between streamed and stored scores, and between the exact and the approximate sigmoid.
    """
    arguments = case.arguments(device)
    sigmoid_mode = gsa_fast.selection.SIGMOID_MODES[case.seed // 4 % 2]
    with poisoned_memory(), stored_scores() if case.seed % 4 == 3 else nullcontext():
        selection, variance = gsa_fast.indexed_selection(
            **arguments,
            mean_variance=case.mean_variance,
            config=case.config,
            sigmoid_mode=sigmoid_mode,
            impl="triton",
        )
    yield from indexed_selection_verdicts(
        arguments, case.config, case.mean_variance, selection, variance, case.seed, sigmoid_mode
    )


def stored_scores() -> AbstractContextManager[Any]:
    """Make `indexed_selection` store the scores of a chunk, as it does where no shortlist would fit."""
    return mock.patch.object(gsa_fast.selection, "shortlist_plan", return_value=None)


def indexed_selection_verdicts(
    arguments: dict[str, Any],
    config: gsa_ref.GSAConfig,
    mean_variance: float,
    selection: Selection,
    variance: Tensor,
    seed: int,
    sigmoid_mode: str = "exact",
) -> Iterator[Verdict]:
    """Verdicts on rows of an `indexed_selection` for given arguments."""
    sizes: dict[str, Any] = {"k_base": config.k_base, "k_min": config.k_min, "k_max": config.k_max, "rule": config.rule}
    for b, rows, gold, tolerance in gold_scores(arguments, config.effective_indexer_scale, seed, sigmoid_mode):
        counts = numpy(selection.counts[b, rows])
        n_valid = (gold != -np.inf).sum(-1)
        yield from variance_and_budget_verdicts(
            numpy(variance[b, rows]), counts, gold, tolerance, n_valid, mean_variance, sizes
        )
        yield from selection_verdicts(selection, b, rows, gold, tolerance, counts)


def check_attention(case: cases.AttentionCase, device: str) -> Iterator[Verdict]:
    """Output and lse of every kernel within twice the error of the reference in the same dtype (and 8u·max|v'|).

    Or within proven bounds. And values that are not finite reach exactly the queries that selected them.
    """
    arguments = case.arguments(device)
    results = []
    for method in METHODS:
        with poisoned_memory(), attention_method(method):
            results.append(gsa_fast.sparse_attention(**arguments, impl="triton"))
    yield from nonfinite_verdicts(arguments, results, case.seed % case.B, case.seed % case.S)
    dtype = results[0][0].dtype
    q, k, v, selection = (arguments[name] for name in ("q", "k", "v", "selection"))
    value_gate, output_gate = arguments["value_gate_logits"], arguments["output_gate_logits"]
    for b in range(case.B):
        key, value = numpy(k[b]), numpy(v[b])
        if value_gate is not None:
            value = equations.apply_gate(value, numpy(value_gate[b]))
        cap = 8 * unit_roundoff(dtype) * float(np.abs(value).max())
        for rows in row_slices(case.L, case.seed):
            first = case.S - case.L + rows.start
            chosen = Selection(*(x[b : b + 1, rows] for x in selection))
            S_t = filled(chosen, first, case.S)
            gold, gold_lse = equations.sparse_attention(numpy(q[b, rows]), key, value, S_t)
            tolerance, lse_tolerance = attention_tolerance(numpy(q[b, rows]), key, value, S_t, dtype)
            if value_gate is not None:  # v' is rounded once more
                tolerance = tolerance + 2 * unit_roundoff(dtype) * np.abs(value).max()
            gate = None if output_gate is None else output_gate[b : b + 1, rows]
            if gate is not None:
                gold = equations.apply_gate(gold, numpy(gate[0]))
                tolerance = tolerance + gate_tolerance(gold, numpy(gate[0]), dtype)
            baseline, baseline_lse = gsa_ref.sparse_attention(
                q[b : b + 1, rows],
                k[b : b + 1],
                v[b : b + 1],
                chosen,
                start=first,
                value_gate_logits=None if value_gate is None else value_gate[b : b + 1],
                output_gate_logits=gate,
            )
            for method, (out, lse) in zip(METHODS, results, strict=True):
                yield _of_method(
                    method,
                    error_budget(numpy(out[b, rows]), numpy(baseline[0]), gold, dtype, tolerance=tolerance, cap=cap),
                )
                yield _of_method(
                    method,
                    error_budget(
                        numpy(lse[b, rows]), numpy(baseline_lse[0]), gold_lse, torch.float32, tolerance=lse_tolerance
                    ),
                )


def nonfinite_verdicts(
    arguments: dict[str, Any], results: list[tuple[Tensor, Tensor]], b: int, s: int
) -> Iterator[Verdict]:
    """With ∞ in one channel of value [b, s], and NaN in another of its neighbour, who selected what is what shows.

    Outputs are not finite in these channels of the queries that selected them, and nowhere else; queries that selected
    neither see no difference, not in a single bit.
    """
    v, (indices, counts) = arguments["v"].clone(), arguments["selection"]
    S, out = v.shape[1], results[0][0]
    slot = torch.arange(indices.shape[-1], device=v.device)
    position = torch.arange(out.shape[1], device=v.device) + S - out.shape[1]
    finite = torch.ones_like(out, dtype=torch.bool)
    for poisoned, channel, value in ((s, 0, torch.inf), ((s + 1) % S, -1, torch.nan)):
        v[b, poisoned, :, channel] = value
        hit = ((indices[b] == poisoned) & (slot < counts[b, :, None])).any(-1) & (position >= poisoned)
        finite[b, hit, :, channel] = False
    untouched = finite.all(-1)
    for method, (out, lse) in zip(METHODS, results, strict=True):
        with poisoned_memory(), attention_method(method):
            poisoned_out, poisoned_lse = gsa_fast.sparse_attention(**{**arguments, "v": v}, impl="triton")
        different = (poisoned_out.isfinite() != finite) | (untouched[..., None] & (poisoned_out != out))
        n = int(different.sum()) + int((untouched & (poisoned_lse != lse)).sum())
        yield _of_method(method, Verdict(n == 0, float(n), 0.0, f"∞ and NaN from v[{b}, {s}] on: {n} numbers wrong"))


def _of_method(method: str, verdict: Verdict) -> Verdict:
    """The verdict, and if it is negative, whose it is."""
    return verdict if verdict else dataclasses.replace(verdict, detail=f"{method}: {verdict.detail}")


def filled(selection: Selection, start: int, n_keys: int) -> list[np.ndarray]:
    """The non-empty slots of each row of a batch of one: inside the count, inside [0, n_keys), not in the future."""
    rows = []
    for t, (indices, count) in enumerate(zip(numpy(selection.indices[0]), numpy(selection.counts[0]), strict=True)):
        prefix = indices[:count]
        rows.append(prefix[(prefix >= 0) & (prefix < n_keys) & (prefix <= start + t)])
    return rows


GRADIENTS = ("q", "k", "v", "value_gate_logits", "output_gate_logits")


def check_attention_backward(case: cases.AttentionBackwardCase, device: str) -> Iterator[Verdict]:
    """Gradients within three times the error of the reference in the same dtype, or proven bounds, summed either way.

    Gold is the reference in float64. In a fixed order a rerun gives the same bits; keys that nobody selected get 0.
    """
    arguments = case.arguments(device)
    names = [name for name in GRADIENTS if arguments[name] is not None]
    dout, dlse = case.output_gradients(device)

    def gradients(
        function: Callable[..., tuple[Tensor, Tensor]], given: dict[str, Any], **options: Any
    ) -> list[Tensor]:
        leaves = [given[name].detach().requires_grad_() for name in names]
        out, lse = function(**{**given, **dict(zip(names, leaves, strict=True))}, **options)
        lse = torch.where(lse == -torch.inf, 0, lse)  # of an empty row, whose gradient is 0
        outputs, weights = [out], [dout.to(out.dtype)]
        if case.lse_gradient:
            outputs, weights = [*outputs, lse], [*weights, dlse.to(lse.dtype)]
        return list(torch.autograd.grad(outputs, leaves, weights))

    results = []
    for deterministic in (True, True, False):
        with poisoned_memory():
            results.append(gradients(gsa_fast.sparse_attention, arguments, deterministic=deterministic, impl="triton"))
    for name, first, second in zip(names, *results[:2], strict=True):
        yield Verdict(torch.equal(first, second), 0.0, 0.0, f"a rerun changes the gradient of {name}")
    baseline = gradients(gsa_ref.sparse_attention, arguments)
    gold = gradients(gsa_ref.sparse_attention, arguments | {name: arguments[name].double() for name in names})
    bounds = [gradient_bounds(case, arguments, dout[b], dlse[b], b) for b in range(case.B)]
    for i, name in enumerate(names):
        tolerance = np.stack([bound[name] for bound in bounds])
        for how, result in (("in order", results[0][i]), ("atomic", results[2][i])):
            verdict = error_budget(
                numpy(result), numpy(baseline[i]), numpy(gold[i]), result.dtype, factor=3.0, tolerance=tolerance
            )
            yield verdict if verdict else dataclasses.replace(verdict, detail=f"{name}, {how}: {verdict.detail}")
            if name in ("k", "v"):
                unused = numpy(result)[~np.stack([bound["selected"].any(0) for bound in bounds])]
                largest = float(np.abs(unused).max(initial=0))
                yield Verdict(largest == 0, largest, 0.0, f"d{name} of keys that nobody selected")


def gradient_bounds(
    case: cases.AttentionBackwardCase, arguments: dict[str, Any], dout: Tensor, dlse: Tensor, b: int
) -> dict[str, np.ndarray]:
    """Proven bounds for the gradients of sequence b, by argument; and who selected whom, [L, S]."""
    q, k, v = (numpy(arguments[name][b]) for name in "qkv")
    dtype, first = arguments["q"].dtype, case.S - case.L
    u = unit_roundoff(dtype)
    chosen = filled(Selection(*(x[b : b + 1] for x in arguments["selection"])), first, case.S)
    selected = np.zeros((case.L, case.S), dtype=bool)
    for t, S_t in enumerate(chosen):
        selected[t, S_t] = True
    do, grad = numpy(dout), numpy(dout)
    output_gate, value_gate = arguments["output_gate_logits"], arguments["value_gate_logits"]
    bounds: dict[str, np.ndarray] = {"selected": selected}
    value, weight = v, np.ones_like(v)
    if value_gate is not None:
        weight = equations.sigmoid(numpy(value_gate[b]))
        value = v * weight
    if output_gate is not None:
        gate = equations.sigmoid(numpy(output_gate[b]))
        grad = do * gate
        out, _ = equations.sparse_attention(q, k, value, chosen)
        error = attention_tolerance(q, k, value, chosen, dtype)[0] + 2 * u * np.abs(value).max(initial=0)
        bounds["output_gate_logits"] = np.abs(do) * gate * (1 - gate) * (error + 6 * u * np.abs(out)) + np.finfo(
            np.float16
        ).smallest_subnormal * (dtype == torch.float16)
    bounds["q"], bounds["k"], dv = attention_gradient_tolerance(q, k, value, selected, grad, numpy(dlse), dtype)
    # Values that were rounded by their gate reach every dp; a gradient of v' is rounded before its gate.
    size = 8 * u * np.abs(grad).sum(-1).max(initial=0) * np.abs(value).max(initial=0) * (value_gate is not None)
    scale = q.shape[-1] ** -0.5
    bounds["q"] = bounds["q"] + scale * size * np.abs(k).max(initial=0)
    bounds["k"] = bounds["k"] + scale * size * np.abs(q).max(initial=0) * case.L * case.group
    total = np.abs(grad).reshape(case.L, case.H_kv, case.group, -1).sum((0, 2))  # a bound on |dv'|
    bounds["v"] = weight * (dv + 4 * u * total)
    bounds["value_gate_logits"] = np.abs(v) * weight * (1 - weight) * (dv + 6 * u * total)
    return bounds


def check_gates(case: cases.GateCase, device: str) -> Iterator[Verdict]:
    """Within twice the error of the reference in the same dtype, or the proven bound."""
    x, gate_logits = case.arguments(device)
    with poisoned_memory():
        out = gsa_fast.apply_gate(x, gate_logits, impl="triton")
    gold = equations.apply_gate(numpy(x), numpy(gate_logits))
    tolerance = gate_tolerance(gold, numpy(gate_logits), out.dtype)
    yield error_budget(numpy(out), numpy(gsa_ref.apply_gate(x, gate_logits)), gold, out.dtype, tolerance=tolerance)


def check_layer(case: cases.LayerCase, device: str) -> Iterator[Verdict]:
    """The selection by its certificate, and the output given that selection by its error budget."""
    config, arguments = case.config, case.arguments(device)
    torch.manual_seed(case.seed)
    reference = gsa_ref.GatedSparseAttention(config).eval()
    reference.mean_variance.fill_(0.01)
    reference.to(device=device, dtype=arguments["h"].dtype)
    fast = gsa_fast.GatedSparseAttention(config, impl="triton").eval()
    fast.to(device=device, dtype=arguments["h"].dtype)
    fast.load_state_dict(reference.state_dict())

    recorded: dict[str, Any] = {}
    run_kernel = fast._indexed_selection

    def record(*tensors: Tensor, **keywords: Any) -> Any:
        selection, variance = run_kernel(*tensors, **keywords)
        inputs = dict(zip(("q_idx", "k_idx", "head_logits", "bias"), tensors, strict=True))
        recorded.update(
            arguments={**inputs, "start": keywords["start"], "lengths": keywords["lengths"]},
            mean_variance=float(keywords["mean_variance"]),
            selection=selection,
            variance=variance,
        )
        return selection, variance

    fast._indexed_selection = record
    with torch.no_grad(), poisoned_memory():
        hidden = fast(**arguments).hidden
    yield from indexed_selection_verdicts(
        recorded["arguments"],
        config,
        recorded["mean_variance"],
        recorded["selection"],
        recorded["variance"],
        case.seed,
    )
    reference._indexed_selection = lambda *_, **__: (recorded["selection"], recorded["variance"])
    with torch.no_grad():
        baseline = reference(**arguments).hidden
        gold = reference.double()(arguments["h"].double(), lengths=arguments["lengths"]).hidden
    yield error_budget(numpy(hidden), numpy(baseline), numpy(gold), hidden.dtype)


def check_decode(case: cases.DecodeCase, device: str) -> Iterator[Verdict]:
    """The verdicts of `indexed_selection`, and those of `sparse_attention` given the selection.

    With NaN in every key and value that no query of a sequence selected, not a bit of the result changes. The seed
    decides between the exact and the approximate sigmoid.
    """
    indexer, attended = case.arguments(device), case.attention_arguments(device)
    sigmoid_mode = gsa_fast.selection.SIGMOID_MODES[case.seed % 2]

    def decode(**inputs: Tensor) -> gsa_fast.DecodeOutput:
        with poisoned_memory():
            return gsa_fast.decode_attention(
                **{**indexer, **attended, **inputs},
                mean_variance=case.mean_variance,
                config=case.config,
                sigmoid_mode=sigmoid_mode,
                impl="triton",
                return_selection=True,
            )

    out, lse, variance, selection = result = decode()
    assert selection is not None
    yield from indexed_selection_verdicts(
        indexer, case.config, case.mean_variance, selection, variance, case.seed, sigmoid_mode
    )
    selected = torch.zeros(case.B, case.S + 1, dtype=torch.bool, device=out.device)
    selected.scatter_(1, selection.indices.flatten(1).long() % (case.S + 1), True)  # −1 becomes S
    nobody = ~selected[:, :-1, None, None]
    poisoned = decode(k=attended["k"].masked_fill(nobody, torch.nan), v=attended["v"].masked_fill(nobody, torch.nan))
    n = sum(int(((x != y) & ~(x.isnan() & y.isnan())).sum()) for x, y in zip(result[:3], poisoned[:3], strict=True))
    yield Verdict(n == 0, float(n), 0.0, f"NaN in unselected keys and values: {n} numbers changed")

    dtype = out.dtype
    q, k, v, gate = (attended[name] for name in ("q", "k", "v", "output_gate_logits"))
    for b in range(case.B):
        key, value = numpy(k[b]), numpy(v[b])
        start = sequence_value(indexer["start"], b, 0)
        chosen = Selection(*(x[b : b + 1] for x in selection))
        S_t = filled(chosen, start, case.S)
        gold, gold_lse = equations.sparse_attention(numpy(q[b]), key, value, S_t)
        tolerance, lse_tolerance = attention_tolerance(numpy(q[b]), key, value, S_t, dtype)
        if gate is not None:
            gold = equations.apply_gate(gold, numpy(gate[b]))
            tolerance = tolerance + gate_tolerance(gold, numpy(gate[b]), dtype)
        baseline, baseline_lse = gsa_ref.sparse_attention(
            q[b : b + 1],
            k[b : b + 1],
            v[b : b + 1],
            chosen,
            start=start,
            output_gate_logits=None if gate is None else gate[b : b + 1],
        )
        cap = 8 * unit_roundoff(dtype) * float(np.abs(value).max())
        yield error_budget(numpy(out[b]), numpy(baseline[0]), gold, dtype, tolerance=tolerance, cap=cap)
        yield error_budget(numpy(lse[b]), numpy(baseline_lse[0]), gold_lse, torch.float32, tolerance=lse_tolerance)


def check_training(case: cases.TrainingCase, device: str) -> Iterator[Verdict]:
    """The loss and its gradients within three times the error of the reference in the same dtype, or proven bounds.

    Gold is the reference in float64. The kernels get NaN in rows that do not count and in keys that none reads.
    """
    arguments = case.training_arguments(device)
    learned = ("q_idx", "k_idx", "head_logits", "bias")
    over = kl_positions(arguments)

    def loss_and_gradients(function: Callable[..., Tensor], given: dict[str, Any]) -> list[Tensor]:
        leaves = {name: given[name].detach().requires_grad_() for name in learned}
        loss = function(**{**given, **leaves})
        gradients = torch.autograd.grad(4 * loss, list(leaves.values()))
        return [loss.detach(), *(x / 4 for x in gradients)]

    poisoned = case.training_arguments(device)
    for name in ("q_idx", "head_logits", "q", "k_idx", "k"):
        poisoned[name][~over.any(1 if name.startswith("k") else 2)] = torch.nan
    with poisoned_memory():
        results = loss_and_gradients(partial(gsa_fast.indexer_kl_loss, impl="triton"), poisoned)
    baseline = loss_and_gradients(gsa_ref.indexer_kl_loss, arguments)
    wide = {name: arguments[name].double() for name in (*learned, "q", "k", "lse") if name in arguments}
    gold = loss_and_gradients(gsa_ref.indexer_kl_loss, {**arguments, **wide})

    n_rows = max(1, int(over.any(-1).sum()))
    factors = {"indexer_scale": case.scale, "scale": case.d_h**-0.5, "temperature": case.temperature}
    bounds = []
    for b in range(case.B):
        q_idx, k_idx, head_logits, q, k = (numpy(arguments[n][b]) for n in ("q_idx", "k_idx", "head_logits", "q", "k"))
        inputs = q_idx, k_idx, head_logits, numpy(arguments["bias"]), q, k
        bounds.append(kl_tolerance(*inputs, numpy(over[b]), **factors))
    for name, got, plain, exact in zip(("loss", *learned), results, baseline, gold, strict=True):
        tolerance = np.stack([bound[name] for bound in bounds]) / (n_rows * case.temperature)
        tolerance = tolerance.sum(0) if name in ("loss", "bias") else tolerance
        largest = np.abs(numpy(exact)) + torch.finfo(got.dtype).smallest_normal
        tolerance = tolerance + unit_roundoff(got.dtype) * largest
        verdict = error_budget(numpy(got), numpy(plain), numpy(exact), got.dtype, factor=3.0, tolerance=tolerance)
        yield verdict if verdict else dataclasses.replace(verdict, detail=f"{name}: {verdict.detail}")


def kl_positions(arguments: dict[str, Any]) -> Tensor:
    """Which positions the distributions of `indexer_kl_loss` run over, bool [B, L, S]: visible, or filled slots."""
    (B, L), S = arguments["q"].shape[:2], arguments["k"].shape[1]
    over = visible(L, S, arguments["start"], arguments["lengths"], arguments["q"].device).expand(B, L, S)
    if "selection" not in arguments:
        return over
    indices, counts = arguments["selection"]
    filled = (torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]) & (indices >= 0)
    return over & ((indices[..., None] == torch.arange(S, device=indices.device)) & filled[..., None]).any(2)


CHECKS: dict[str, Callable[[Any, str], Iterator[Verdict]]] = {
    "indexer": check_indexer,
    "budget": check_budget,
    "selection": check_selection,
    "indexed_selection": check_indexed_selection,
    "attention": check_attention,
    "attention_backward": check_attention_backward,
    "gates": check_gates,
    "layer": check_layer,
    "decode": check_decode,
    "training": check_training,
}
