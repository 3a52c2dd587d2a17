"""One sentence through the whole layer (Eq. 6), shown step by step in a terminal: `python -m gsa_ref tour`.

Every figure on the page comes from a function of `gsa_ref`; this file only prepares the input and draws. Nothing is
trained. `embed` makes words of similar spelling similar, and `build_layer` sets one indexer head by hand to look for
similar words, so that a reader can judge a selection by eye; all other weights are random.
"""

import argparse
import os
import re
import sys
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from gsa_ref import equations
from gsa_ref._arguments import RULES
from gsa_ref.attention import sparse_attention
from gsa_ref.budget import score_variance, token_budget
from gsa_ref.config import GSAConfig
from gsa_ref.gates import apply_gate
from gsa_ref.indexer import indexer_scores
from gsa_ref.layer import GatedSparseAttention
from gsa_ref.rope import apply_rope
from gsa_ref.selection import Selection, select_tokens

DEFAULT_TEXT = (
    "A gate that opens for one token may close for another: the layer selects a few tokens, "
    "attends only to the selected ones, and gates what comes out of attention."
)
MOST_TOKENS = 64  # what fits side by side in a terminal of 100 columns
MOST_CHARACTERS = 1 << 20  # read from a file; far more than MOST_TOKENS words
SEED_LIMIT = 2**63
COLUMNS = 100


# ---- the input -------------------------------------------------------------------------------------------------------


def tokenize(text: str) -> list[str]:
    """Words and punctuation marks. An apostrophe or a hyphen inside a word belongs to it."""
    return re.findall(r"\w+(?:['’-]\w+)*|[^\w\s]", text)


def embed(tokens: Sequence[str], d: int, *, seed: int = 0) -> Float[Tensor, "1 L d"]:
    """Hidden states for a list of words: deterministic, untrained, similar for words of similar spelling.

    A word is the sum of the vectors of its letter trigrams (of "<gate>": "<ga", "gat", "ate", "te>"), scaled to a root
    mean square of 1; the vector of a trigram is drawn from a normal distribution, seeded by its CRC-32 and `seed`.
    Then h_t = e_t + ⅓ h_{t−1}, scaled alike: as in a model, h_t also carries some of what came before, so two
    occurrences of a word differ.

    Returns:
        float64 [1, L, d].
    """
    rows = np.zeros((len(tokens), d))
    for t, token in enumerate(tokens):
        marked = f"<{token.lower()}>"
        for i in range(len(marked) - 2):
            trigram = marked[i : i + 3].encode("utf-8", "surrogatepass")
            rows[t] += np.random.default_rng([seed, zlib.crc32(trigram)]).standard_normal(d)
        rows[t] /= np.sqrt(np.mean(rows[t] ** 2))
        if t:
            rows[t] += rows[t - 1] / 3
            rows[t] /= np.sqrt(np.mean(rows[t] ** 2))
    return torch.from_numpy(rows)[None]


def build_config(*, k_base: int = 6, rule: str = "proportional") -> GSAConfig:
    """Sizes small enough to look at. k_max is 2 k_base, as in the paper; k_min is k_base / 2."""
    return GSAConfig(
        d=128,
        H=4,
        H_kv=2,
        d_h=16,
        H_I=2,
        d_I=64,
        k_base=k_base,
        k_min=max(1, k_base // 2),
        k_max=2 * k_base,
        rule=rule,  # type: ignore[arg-type]
    )


def build_layer(config: GSAConfig, h: Float[Tensor, "1 L d"], *, seed: int = 0) -> GatedSparseAttention:
    """A float64 layer in eval mode: random weights from `seed`, one indexer head set by hand, V̄ measured on h.

    Indexer head 0 asks for words like its own, q = 2k, and its bias −3 keeps it quiet about all others.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = GatedSparseAttention(config).double()
    with torch.no_grad():
        layer.indexer.W_iq.weight[: config.d_I] = 2 * layer.indexer.W_ik.weight
        layer.indexer.bias[0] = -3
        layer.train()(h)  # V̄ is a running mean of training; here one pass over this text sets it
        layer.update_mean_variance()
    return layer.eval()


# ---- the layer, piece by piece ---------------------------------------------------------------------------------------


class Trace(NamedTuple):
    """Every tensor of one pass through the layer, batch axis included.

    Attributes:
        scores: I, −inf in the future.
        variance: variance of each row of I.
        mean_variance: V̄.
        n_valid: n_t, how many tokens query t sees.
        budget: k_t.
        selection: S_t.
        attention: softmax weights p[t, h, s], 0 where s is not selected.
        value_gate: σ of the value gate's logits, per source token.
        output_gate: σ of the output gate's logits, per query token.
        u: output of the layer.
    """

    scores: Float[Tensor, "B L L"]
    variance: Float[Tensor, "B L"]
    mean_variance: float
    n_valid: Int32[Tensor, "B L"]
    budget: Int32[Tensor, "B L"]
    selection: Selection
    attention: Float[Tensor, "B L H L"]
    value_gate: Float[Tensor, "B L H_kv d_h"]
    output_gate: Float[Tensor, "B L H d_h"]
    u: Float[Tensor, "B L d"]


def attention_weights(
    q: Float[Tensor, "B L H d_h"], k: Float[Tensor, "B S H_kv d_h"], selection: Selection
) -> Float[Tensor, "B L H S"]:
    """The softmax weights p[t, h, s] that `sparse_attention` uses, read off its output.

    With a 1 in channel c of value s and 0 elsewhere, channel c of the output IS the weight of s.
    """
    (B, S, H_kv, d_h), weights = k.shape, []
    for first in range(0, S, d_h):
        v = torch.zeros(B, S, H_kv, d_h, dtype=k.dtype, device=k.device)
        for c in range(min(d_h, S - first)):
            v[:, first + c, :, c] = 1
        weights.append(sparse_attention(q, k, v, selection)[0][..., : S - first])
    return torch.cat(weights, dim=-1)


@torch.no_grad()
def trace(layer: GatedSparseAttention, h: Float[Tensor, "B L d"]) -> Trace:
    """What `GatedSparseAttention.forward` does with indexer and both gates on, one public function after another."""
    c = layer.config
    B, L, _ = h.shape
    q = apply_rope(layer.W_q(h).unflatten(-1, (c.H, c.d_h)), theta=c.rope_theta)
    k = apply_rope(layer.W_k(h).unflatten(-1, (c.H_kv, c.d_h)), theta=c.rope_theta)
    v = layer.W_v(h).unflatten(-1, (c.H_kv, c.d_h))
    value_logits = layer.W_vg(h).unflatten(-1, (c.H_kv, c.d_h))
    output_logits = layer.W_og(h).unflatten(-1, (c.H, c.d_h))

    q_idx, k_idx, head_logits = layer.indexer(h)
    scores = indexer_scores(q_idx, k_idx, head_logits, layer.indexer.bias, scale=c.effective_indexer_scale)
    variance = score_variance(scores)
    n_valid = torch.arange(1, L + 1, dtype=torch.int32, device=h.device).expand(B, L)
    budget = token_budget(
        variance, layer.mean_variance, n_valid, k_base=c.k_base, k_min=c.k_min, k_max=c.k_max, rule=c.rule
    )
    selection = select_tokens(scores, budget)
    o, _ = sparse_attention(q, k, v, selection, value_gate_logits=value_logits, output_gate_logits=output_logits)
    return Trace(
        scores=scores,
        variance=variance,
        mean_variance=float(layer.mean_variance),
        n_valid=n_valid,
        budget=budget,
        selection=selection,
        attention=attention_weights(q, k, selection),
        value_gate=apply_gate(torch.ones_like(value_logits), value_logits),
        output_gate=apply_gate(torch.ones_like(output_logits), output_logits),
        u=layer.W_o(o.flatten(2)),
    )


@torch.no_grad()
def disagreement(
    layer: GatedSparseAttention, h: Float[Tensor, "1 L d"], u: Float[Tensor, "1 L d"]
) -> tuple[float, float]:
    """Largest difference between u and the layer's own forward pass, and between u and the equations in NumPy."""
    weights = {name: value.numpy() for name, value in layer.state_dict().items()}
    gold = equations.gated_sparse_attention(h[0].numpy(), weights, layer.config)
    return float((u - layer(h).hidden).abs().max()), float(np.abs(u[0].numpy() - gold).max())


# ---- the page --------------------------------------------------------------------------------------------------------

# What an encoding without these symbols shows instead.
PLAIN = {"V̄": "Vbar", "σ": "sigmoid", "Σ": "sum", "·": "*", "⊙": "*", "√": "sqrt", "⅓": "1/3", "½": "1/2"}


@dataclass
class Page:
    """Lines of at most `COLUMNS` columns, in characters that `encoding` has."""

    encoding: str

    def __post_init__(self) -> None:
        self.lines: list[str] = []
        try:
            "".join((*PLAIN, "·░▒▓█")).encode(self.encoding)
            self.unicode = True
        except UnicodeEncodeError:
            self.unicode = False
        self.shades, self.full, self.empty, self.cut = (
            ("·░▒▓█", "█", "·", "…") if self.unicode else (".:+#@", "#", ".", "~")
        )

    def plain(self, text: str) -> str:
        if not self.unicode:
            for symbol, substitute in PLAIN.items():
                text = text.replace(symbol, substitute)
        return text

    def heading(self, title: str, formula: str = "") -> None:
        self.lines += ["", title, "-" * _columns(title)]
        if formula:
            self.say(formula)

    def say(self, text: str) -> None:
        """A paragraph."""
        self.flow(self.plain(text).split(" "))

    def flow(self, items: Sequence[str], *, gap: str = " ", label: str = "") -> None:
        """Items side by side, on as many lines as they need; the further lines start below the end of the label."""
        line, indent = label, " " * _columns(label)
        for item in items:
            if line in (label, indent):
                line += item
            elif _columns(line + gap + item) <= COLUMNS:
                line += gap + item
            else:
                self.lines.append(line)
                line = indent + item
        self.lines.append(line)

    def row(self, text: str) -> None:
        """A line whose characters have all been chosen to fit."""
        self.lines.append(text.rstrip())

    def word(self, token: str, width: int = 0) -> str:
        """A token without control characters or any that the encoding lacks, cut or padded to width."""
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)
        shown = shown.encode(self.encoding, "backslashreplace").decode(self.encoding)
        limit = width or 24
        if _columns(shown) > limit:
            while _columns(shown) > limit - 1:
                shown = shown[:-1]
            shown += self.cut
        return shown + " " * (width - _columns(shown))

    def bar(self, share: float, width: int) -> str:
        """`share` of `width` cells filled."""
        n = round(min(max(share, 0.0), 1.0) * width)
        return self.full * n + self.empty * (width - n)

    def shade(self, value: float, low: float, high: float) -> str:
        """One of five shades for a value between low and high."""
        position = (value - low) / (high - low) if high > low else 0.0
        return self.shades[min(int(position * len(self.shades)), len(self.shades) - 1)]


def _columns(text: str) -> int:
    """Columns that a terminal gives to the text."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def draw(page: Page, tokens: list[str], layer: GatedSparseAttention, h: Tensor, t: Trace, query: int) -> bool:
    """Write the whole tour on the page. Returns whether the pieces agree with the layer."""
    c, L = layer.config, len(tokens)
    name = [page.word(token) for token in tokens]
    label = [f"{s:3d} {page.word(token, 12)} " for s, token in enumerate(tokens)]
    cell = 2 if 18 + 2 * L <= COLUMNS else 1
    ruler = "".join(f"{s:<{5 * cell}d}" for s in range(0, L, 5))
    scores, selection = t.scores[0], t.selection.indices[0]
    chosen = [row[row >= 0].tolist() for row in selection]

    page.heading(f"1. Words become hidden states h: [{L}, {c.d}]")
    page.flow([f"{s} {word}" for s, word in enumerate(name)], gap="   ")
    page.say(
        f"Width d = {c.d}; {c.H} query heads and {c.H_kv} key/value heads of width {c.d_h}; {c.H_I} indexer heads of "
        f"width {c.d_I}. Nothing is trained: a word's vector is made from its letter trigrams, so similar spelling "
        "gives similar vectors, plus ⅓ of the vector before it. Weights are random, except one indexer head, set by "
        "hand to look for similar words."
    )

    page.heading("2. Indexer scores, Eq. 7", "I[t,s] = Σ_j σ(h_t·W_j) · σ(scale q[t,j]·k[s] + b_j), 0 < I < H_I")
    visible = scores[scores > -torch.inf]
    low, high = float(visible.min()), float(visible.max())
    page.say("Row: the query t. Column: the key s, same numbers. Blank: the future, which a query may not see.")
    page.row(" " * 17 + ruler)
    for i in range(L):
        page.row(label[i] + "".join(page.shade(float(x), low, high) * cell for x in scores[i, : i + 1]))
    step = (high - low) / len(page.shades)
    levels = (f"{s} {low + i * step:.2f} to {low + (i + 1) * step:.2f}" for i, s in enumerate(page.shades))
    page.row("Shades: " + "   ".join(levels))
    page.say("Look at: the diagonal, where a word meets itself, and the dark cells off it.")
    if L > 1:
        best = scores.masked_fill(torch.eye(L, dtype=torch.bool), -torch.inf)  # the future is −inf already
        i, s = divmod(int(best.argmax()), L)
        page.say(f"The darkest: query {i} ({name[i]}) finds {s} ({name[s]}), I = {float(scores[i, s]):.2f}.")

    page.heading(f'3. Budgets, Eq. 8, rule "{c.rule}"', f"k_t = clamp(k_base · {_ratio(c.rule)}, k_min, k_max)")
    mean = t.mean_variance
    source = "the mean variance of this text; in training, a running mean" if mean > 0 else "unset, so k_t = k_base"
    page.say(
        f"k_base = {c.k_base}, k_min = {c.k_min}, k_max = {c.k_max}; rounded down, and at most n_t, the number of "
        "words up to t."
    )
    page.say(f"V̄ = {mean:.4f} ({source}).")
    page.row(" " * 17 + "   Var " + ("   Var/V̄" if page.unicode else "Var/Vbar") + " k_t of n_t")
    for i in range(L):
        variance, k, n = float(t.variance[0, i]), int(t.budget[0, i]), int(t.n_valid[0, i])
        ratio = f"{variance / mean:.2f}" if mean > 0 else "-"
        page.row(f"{label[i]}{variance:6.4f} {ratio:>8s} {k:2d} {page.full * k}{page.empty * (n - k)}")
    page.say(_look_at_budget(c))

    page.heading("4. Selection", "S_t = the k_t words with the highest scores; a tie goes to the earlier word")
    for i in range(L):
        page.flow([name[s] for s in chosen[i]], label=label[i])
    page.say("Look at: each query reads only these words. All heads share them, and none lies in the future.")

    page.heading(f"5. Attention of query {query} ({name[query]})", "weight of s = softmax over S_t of q·k[s] / √d_h")
    page.row(" " * 17 + "score I   weight" + " " * 28 + "by head")
    weight = t.attention[0, query]  # [H, S]
    for s in sorted(chosen[query], key=lambda s: -float(weight[:, s].mean())):
        p = float(weight[:, s].mean())
        heads = " ".join(f"{float(x):.2f}" for x in weight[:, s])
        page.row(f"{label[s]}{float(scores[query, s]):7.2f}   {p:6.2f} {page.bar(p, 24)}   {heads}")
    page.say(f"{_threshold(scores[query, : query + 1], chosen[query])} The weights of a head add up to 1.")

    page.heading("6. Gates, Eq. 9 and Eq. 10", "v'[s] = v[s] ⊙ σ(h_s W_V^g)   and   o'[t] = o[t] ⊙ σ(h_t W_O^g)")
    page.row(" " * 17 + f"{'value gate G2':33s}{'output gate G1'}")
    page.row(" " * 17 + f"{'mean':16s}{'least   most':17s}{'mean':16s}{'least   most'}")
    for i in range(L):
        row = label[i]
        for gate in (t.value_gate[0, i], t.output_gate[0, i]):
            opening = float(gate.mean())
            row += f"{opening:.2f} {page.bar(opening, 10)} {float(gate.min()):5.2f} {float(gate.max()):6.2f}     "
        page.row(row)
    page.say(
        "Look at: 0 closes a channel, 1 leaves it as it is. Untrained gates stay near ½ on average; single channels "
        "already differ. The paper's trained gates are mostly closed (mean 0.108)."
    )

    page.heading(f"7. Output, Eq. 6: [{L}, {c.d}]", "u_t = Concat_h(o'[t,h]) W_O")
    norm = t.u[0].norm(dim=-1)
    least, most = int(norm.argmin()), int(norm.argmax())
    page.row(" " * 17 + ruler)
    page.row(
        f"    {'|u_t|':13s}" + "".join(page.shade(float(x), float(norm.min()), float(norm.max())) * cell for x in norm)
    )
    page.say(
        f"Smallest {float(norm[least]):.2f} at {least} ({name[least]}), largest {float(norm[most]):.2f} at {most} "
        f"({name[most]}). Look at: where k_t is small, u averages over few values, and less cancels out."
    )

    from_layer, from_equations = disagreement(layer, h, t.u)
    tolerance = 1e-12 * max(1.0, float(t.u.abs().max()))
    agrees = max(from_layer, from_equations) <= tolerance
    page.heading("Check")
    page.say(
        f"Largest difference of the u above from GatedSparseAttention.forward: {from_layer:.1e}; from the equations in "
        f"NumPy: {from_equations:.1e}; allowed: {tolerance:.1e}. "
        + ("They agree." if agrees else "THEY DISAGREE: this is a bug.")
    )
    return agrees


def _ratio(rule: str) -> str:
    return {"proportional": "Var(I[t]) / V̄", "inverse": "V̄ / Var(I[t])", "fixed": "1"}[rule]


def _look_at_budget(c: GSAConfig) -> str:
    return {
        "proportional": "Look at: a row with a few outstanding scores has a high variance and gets more words.",
        "inverse": "Look at: a row with a few outstanding scores has a high variance and gets fewer words.",
        "fixed": "Look at: the variance plays no part; every row gets k_base, or all it sees.",
    }[c.rule] + " Word 0 sees only itself."


def _threshold(row: Tensor, chosen: list[int]) -> str:
    """How the selected scores compare with the others."""
    rejected = [float(row[s]) for s in range(len(row)) if s not in chosen]
    if not rejected:
        return "Look at: this query sees no more words than its budget, so it keeps all of them."
    lowest = min(float(row[s]) for s in chosen)
    return (
        f"Look at: the lowest score kept is {lowest:.3f}, the highest of the {len(rejected)} left out "
        f"{max(rejected):.3f}. A high score lets a word in; how much it then counts, the attention decides."
    )


# ---- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m gsa_ref tour`."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", type=_text, help="the sentence (default: a fixed one about gates)")
    source.add_argument("--file", type=_file, metavar="PATH", help="read the text from a UTF-8 file")
    parser.add_argument(
        "--max-tokens",
        type=_whole_number(1, MOST_TOKENS),
        default=36,
        metavar="N",
        help=f"keep the first N words and marks, 1 to {MOST_TOKENS} (default: %(default)s)",
    )
    parser.add_argument(
        "--query", type=_whole_number(0), metavar="T", help="position to detail (default: the last word)"
    )
    parser.add_argument(
        "--k-base",
        type=_whole_number(1, MOST_TOKENS),
        default=6,
        metavar="K",
        help="mean budget (default: %(default)s)",
    )
    parser.add_argument(
        "--rule", choices=RULES, default="proportional", help="direction of Eq. 8 (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=_whole_number(0, SEED_LIMIT - 1),
        default=0,
        metavar="S",
        help="of vectors and weights (default: 0)",
    )


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Show the tour. Returns the exit status: 0, or 1 if the pieces and the layer disagree."""
    page = Page(getattr(sys.stdout, "encoding", None) or "utf-8")
    text, name, complete = args.file or (args.text or DEFAULT_TEXT, "the text", True)
    found = tokenize(text)
    tokens = found[: args.max_tokens]
    query = args.query
    if query is None:
        query = max((i for i, token in enumerate(tokens) if token[0].isalnum()), default=len(tokens) - 1)
    elif query >= len(tokens):
        parser.error(f"argument --query: expected a position from 0 to {len(tokens) - 1}, got {query}")

    config = build_config(k_base=args.k_base, rule=args.rule)
    h = embed(tokens, config.d, seed=args.seed)
    layer = build_layer(config, h, seed=args.seed)
    page.say("Gated Sparse Attention (Eq. 6): one sentence through the whole layer")
    if len(found) > len(tokens):
        total = f"{len(found):,}" if complete else f"more than {len(found):,}"
        page.say(
            f"CUT: {page.word(name)} has {total} tokens; this tour shows the first {len(tokens)} "
            f"(--max-tokens, at most {MOST_TOKENS})."
        )
    agrees = draw(page, tokens, layer, h, trace(layer, h), query)
    try:
        print("\n".join(page.lines), flush=True)
    except BrokenPipeError:  # `… | head`: what was read is what was wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if agrees else 1


def _text(value: str) -> str:
    if not tokenize(value):
        raise argparse.ArgumentTypeError("expected at least one word, got an empty text")
    return value


def _file(value: str) -> tuple[str, str, bool]:
    """The text, the file's name, and whether all of it was read."""
    try:
        with Path(value).open(encoding="utf-8-sig") as file:
            text = file.read(MOST_CHARACTERS)
            complete = not file.read(1)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {value!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"expected UTF-8 text, got other bytes in {value!r}") from None
    if not tokenize(text):
        raise argparse.ArgumentTypeError(f"expected at least one word, got an empty text in {value!r}")
    return text, Path(value).name, complete


def _whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argument type: a whole number in a range."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = None
        if number is None or number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, got {value!r}")
        return number

    return parse
