"""Exam questions with answers. The page exam.md is made from this file, and tests/test_teach.py runs every check.

In an answer «name» stands for a figure. `values` holds it as it is printed, and `check` has to compute it: after it has
run, the variable of that name must equal the value. `properties` names entries of docs/hooks/register.py.
"""

from typing import NamedTuple


class Question(NamedTuple):
    """One question. `level` is easy, medium or hard; `topic` a stem or the name of a page; `check` runs by itself."""

    level: str
    topic: str
    minutes: int
    question: str
    answer: str
    values: dict[str, str] = {}
    check: str = ""
    properties: tuple[int, ...] = ()


QUESTIONS = (
    # ---- easy ----
    Question(
        "easy",
        "indexer",
        2,
        "An indexer has four heads. Which number can no score exceed, whatever the weights and the input?",
        "«bound». A score is a sum of four products of two sigmoids, each below 1. In floating point σ may round to 1, so "
        "that the bound itself can appear.",
        {"bound": "4"},
        """
import numpy as np
from gsa_ref.equations import indexer_scores

extreme = np.full((1, 4, 8), 1e3), np.full((1, 8), 1e3), np.full((1, 4), 1e3), np.zeros(4)
bound = int(indexer_scores(*extreme, scale=1.0)[0, 0])
""",
        (1,),
    ),
    Question(
        "easy",
        "indexer",
        4,
        "One query, two heads with head logits 0 and 0, biases 0, scale 1. The inner products with a key are $\\ln 3$ and 0. "
        "What is the score?",
        "«score»: both head weights are σ(0) = ½, the matches are σ(ln 3) = ¾ and ½, and ½ · ¾ + ½ · ½ is «score».",
        {"score": "0.625"},
        """
import numpy as np
from gsa_ref.equations import indexer_scores

q = np.array([[[np.log(3.0)], [0.0]]])
score = round(float(indexer_scores(q, np.ones((1, 1)), np.zeros((1, 2)), np.zeros(2), scale=1.0)[0, 0]), 6)
""",
    ),
    Question(
        "easy",
        "budget",
        5,
        "$k_{\\text{base}}$ = 100, $k_{\\min}$ = 20, $k_{\\max}$ = 200, $\\bar V$ = 0.04. Which budgets do rows with variance "
        "0.004, 0.05 and 0.2 get that see 1000 keys? And under the inverse rule?",
        "«proportional», and «inverse». The clamp decides the outer two rows.",
        {"proportional": "20, 125, 200", "inverse": "200, 80, 20"},
        """
import numpy as np
from gsa_ref.equations import token_budget

sizes = dict(k_base=100, k_min=20, k_max=200)
proportional, inverse = (
    ", ".join(map(str, token_budget(np.array([0.004, 0.05, 0.2]), 0.04, [1000] * 3, **sizes, rule=rule)))
    for rule in ("proportional", "inverse")
)
""",
        (16,),
    ),
    Question(
        "easy",
        "budget",
        2,
        "A row sees 12 keys, and Eq. 8 gives $k_{\\min}$ = 20. How many tokens are read?",
        "«read». The budget is at most what there is to read.",
        {"read": "12"},
        """
import numpy as np
from gsa_ref.equations import token_budget

read = token_budget(np.array([0.0]), 0.04, [12], k_base=100, k_min=20, k_max=200, rule="proportional")[0]
""",
        (11,),
    ),
    Question(
        "easy",
        "selection",
        3,
        "The scores of a row are 0.2, 0.7, 0.7, 0.9, 0.7 and its budget is 3. Which positions are selected, and in which "
        "order are they stored?",
        "«selected». 0.9 comes first, then two of the three that tie: the lower positions. They are stored ascending.",
        {"selected": "[1, 2, 3]"},
        """
import numpy as np
from gsa_ref.equations import select_tokens

selected = select_tokens(np.array([[0.2, 0.7, 0.7, 0.9, 0.7]]), [3])[0].tolist()
""",
        (23, 24),
    ),
    Question(
        "easy",
        "attention",
        4,
        "A query selects two keys with the logits 0 and $\\ln 3$ and the values 4 and 8. What are o and $e^{\\text{lse}}$?",
        "o = «o» and $e^{\\text{lse}}$ = «total»: the weights are ¼ and ¾.",
        {"o": "7", "total": "4"},
        """
import numpy as np
from gsa_ref.equations import sparse_attention

k, v = np.array([0.0, np.log(3.0)]).reshape(2, 1, 1), np.array([4.0, 8.0]).reshape(2, 1, 1)
out, lse = sparse_attention(np.ones((1, 1, 1)), k, v, [np.array([0, 1])])
o, total = round(out.item()), round(np.exp(lse).item())
assert np.isclose(out.item(), o) and np.isclose(np.exp(lse).item(), total)
""",
    ),
    Question(
        "easy",
        "gates",
        3,
        "Which gate can be applied once and kept in the cache, and which cannot? Why?",
        "The value gate, Eq. 9, depends on the source token alone, so the gated value serves every later query. The output "
        "gate, Eq. 10, depends on the query, which is new at every step.",
    ),
    Question(
        "easy",
        "layer",
        4,
        "How many numbers does the cache of one layer hold for a token at the default sizes, and how many of them are the "
        "indexer's?",
        "«held», of which «indexer» are the indexer's key: $2 H_{kv} d_h + d_I$.",
        {"held": "2112", "indexer": "64"},
        """
from gsa_ref import GSACache, GSAConfig

held = GSACache.bytes_per_token(GSAConfig()) // 4
indexer = held - GSACache.bytes_per_token(GSAConfig().variant("gated")) // 4
""",
    ),
    # ---- medium ----
    Question(
        "medium",
        "indexer",
        6,
        "Four heads, and 4096 keys of which one has the score 4 and all others 0. Which weight does softmax(I) give to the "
        "best key, and which does softmax(I/0.1)?",
        "«plain» and «sharp». Bounded scores make a flat softmax, which is why the loss of the indexer has a temperature. "
        "It changes no selection, since the order stays.",
        {"plain": "1.3%", "sharp": "100.0%"},
        """
import numpy as np

scores = np.zeros(4096)
scores[0] = 4.0
weights = [np.exp(scores / tau)[0] / np.exp(scores / tau).sum() for tau in (1.0, 0.1)]
plain, sharp = (f"{100 * w:.1f}%" for w in weights)
""",
        (25,),
    ),
    Question(
        "medium",
        "indexer",
        6,
        "Two heads of equal weight, biases 0. The inner products of key A are 6 and 0, those of key B are 2 and 2. Which key "
        "ranks first at scale 1, and which at scale ⅛? Could the answer change with a single head?",
        "«one» at scale 1, «eighth» at ⅛: σ saturates at the larger scale, and is nearly a line at the smaller one. With one "
        "head it could not, because σ is strictly increasing.",
        {"one": "B", "eighth": "A"},
        """
import numpy as np
from gsa_ref.equations import indexer_scores

q, keys = np.eye(2)[None], np.array([[6.0, 0.0], [2.0, 2.0]])
one, eighth = (
    "AB"[indexer_scores(q, keys, np.zeros((1, 2)), np.zeros(2), scale=scale, start=1)[0].argmax()]
    for scale in (1.0, 1 / 8)
)
""",
    ),
    Question(
        "medium",
        "budget",
        6,
        "A row has 25 scores of 1 and 75 masked entries. What is its variance? And what would it be if masked entries "
        "counted as zeros? What does the second number measure?",
        "«valid» and «zeros». The second is the variance of a mixture, $\\frac nL(1 - \\frac nL)$ here: it measures the "
        "position of the query in the text.",
        {"valid": "0.0", "zeros": "0.1875"},
        """
import numpy as np
from gsa_ref.equations import score_variance

row = np.array([1.0] * 25 + [-np.inf] * 75)
valid = float(score_variance(row[None])[0])
zeros = float(np.where(np.isinf(row), 0.0, row).var())
""",
        (12,),
    ),
    Question(
        "medium",
        "budget",
        6,
        "Half of the rows have variance 1, the other half 3, and $\\bar V$ is their mean. Nothing is clamped or rounded. How "
        "many times $k_{\\text{base}}$ is the mean budget under either rule? What follows for a fair comparison?",
        "«proportional» times and «inverse» times. The mean of V̄/Var is at least 1 (Jensen), so the inverse rule reads more at "
        "the same $k_{\\text{base}}$: hold the mean budget equal, not $k_{\\text{base}}$.",
        {"proportional": "1.000", "inverse": "1.333"},
        """
import numpy as np
from gsa_ref.equations import token_budget

sizes = dict(k_base=3000, k_min=1, k_max=10**6)  # large, so that rounding does not show
proportional, inverse = (
    f"{token_budget(np.array([1.0, 3.0]), 2.0, [10**6] * 2, **sizes, rule=rule).mean() / 3000:.3f}"
    for rule in ("proportional", "inverse")
)
""",
    ),
    Question(
        "medium",
        "attention",
        6,
        "The selection of a query is cut into parts a and b, with outputs 2 and 6 and $e^{\\text{lse}}$ of 1 and 3. What is "
        "the output of the whole? Why is the plain mean wrong?",
        "«whole»: the weights are ¼ and ¾. A plain mean gives both parts the same weight, whatever their softmax "
        "denominators are.",
        {"whole": "5.0"},
        """
import numpy as np
from gsa_ref.equations import sparse_attention

k, v = np.log([1.0, 3.0]).reshape(2, 1, 1), np.array([2.0, 6.0]).reshape(2, 1, 1)  # one key for each part
whole = round(sparse_attention(np.ones((1, 1, 1)), k, v, [np.array([0, 1])])[0].item(), 6)
""",
        (35,),
    ),
    Question(
        "medium",
        "gates",
        6,
        "A colleague says: “Without gates a head's output has rank $d_h$; gates break that.” Correct the sentence, and name "
        "a head with $d$ = 2 and $d_h$ = 1 that shows it.",
        "A gate breaks linearity, not rank: the output stays in the row space of $W_O$. With $W_V = (1, 0)^\\top$ and "
        "$W^g = (0, 1)^\\top$ the output is $x_1\\sigma(x_2)$ times the one row of $W_O$. Its rank over 50 random inputs is "
        "«rank», and the best fixed matrix misses «missed» of it.",
        {"rank": "1", "missed": "38%"},
        """
import numpy as np
from gsa_ref.theory.expressiveness import head_output

x = np.random.default_rng(0).standard_normal((50, 2))
W_V, W_g, W_O = np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]]), np.array([[3.0, 4.0]])
u = head_output(x, np.eye(50), W_V, W_O, W_Vg=W_g)
rank = np.linalg.matrix_rank(u)
M = np.linalg.lstsq(x, u, rcond=None)[0]
missed = f"{100 * np.linalg.norm(u - x @ M) / np.linalg.norm(u):.0f}%"
""",
    ),
    Question(
        "medium",
        "gates",
        5,
        "A query spends the weight 0.9 on a sink, whose value gate is then closed. Its other values are all 1. What is its "
        "output? What would it be if the sink had been masked before the softmax?",
        "«closed» and «masked». The gate comes after the softmax: the weight is spent, and nothing is read for it.",
        {"closed": "0.1", "masked": "1.0"},
        """
import numpy as np
from gsa_ref.equations import apply_gate, sparse_attention

q, k = np.ones((1, 1, 1)), np.log([9.0, 0.5, 0.5]).reshape(3, 1, 1)
v = apply_gate(np.ones((3, 1, 1)), np.array([-np.inf, np.inf, np.inf]).reshape(3, 1, 1))
closed = round(sparse_attention(q, k, v, [np.arange(3)])[0].item(), 6)
masked = round(sparse_attention(q, k, v, [np.array([1, 2])])[0].item(), 6)
""",
        (43,),
    ),
    Question(
        "medium",
        "complexity",
        6,
        "Read $L^2 d\\,/\\,(L^2 H_I d_I + L k d)$ at L = 131,072, d = 4096, $H_I d_I$ = 256 and k = 2048, and for L → ∞. Why "
        "is neither number a speed-up?",
        "«at» and «limit». They count operations, and every constant is taken to be 1. A time depends on bytes as well: a "
        "query that gathers its own keys shares them with nobody.",
        {"at": "12.8", "limit": "16"},
        """
from gsa_ref import GSAConfig
from gsa_ref.theory import complexity

at = float(complexity.printed_speedup(131_072, GSAConfig()))
limit = complexity.printed_speedup_limit(GSAConfig())
""",
    ),
    Question(
        "medium",
        "complexity",
        5,
        "At which length does the indexer do half of the printed count at the default sizes? What is its share at 1,048,576 "
        "tokens? What follows for a smaller k there?",
        "At «half» tokens; «share». It saves next to nothing: what remains is the indexer, which is quadratic in L and does "
        "not depend on k.",
        {"half": "32768", "share": "97%"},
        """
from fractions import Fraction
from gsa_ref import GSAConfig
from gsa_ref.theory import complexity

half = next(L for L in (2**n for n in range(10, 21)) if complexity.printed_indexer_share(L, GSAConfig()) >= Fraction(1, 2))
assert complexity.printed_indexer_share(half, GSAConfig()) == Fraction(1, 2)
share = f"{100 * float(complexity.printed_indexer_share(2**20, GSAConfig())):.0f}%"
""",
    ),
    Question(
        "medium",
        "convergence",
        5,
        "Every inner product $z_j$ of a score is off by at most 0.01; the head weights are ½ each, and there are four heads. "
        "By how much may the score be off? Where does the factor come from?",
        "«bound». σ' = σ(1 − σ) is a product of two numbers with sum 1, so at most ¼, and 4 · ½ · ¼ · 0.01 = «bound». The "
        "same factor bounds gradients.",
        {"bound": "0.005"},
        """
import numpy as np
from gsa_ref.equations import sigmoid
from gsa_ref.theory.convergence import SLOPE

bound = 4 * 0.5 * SLOPE * 0.01
z = np.random.default_rng(0).standard_normal((10_000, 4))
error = 0.5 * np.abs(sigmoid(z + 0.01) - sigmoid(z)).sum(-1)
assert 0.9 * bound < error.max() <= bound
""",
    ),
    Question(
        "medium",
        "training",
        5,
        "Attention weights of a row are 0.9, 0.05 and five times 0.01; two tokens may be selected. Selection A takes the first "
        "and the last, selection B the second and third. What are their recall and their captured mass? Which of the two "
        "judges an indexer?",
        "Recall «recall_a» and «recall_b», captured «mass_a» and «mass_b». Recall counts a token that attention hardly reads "
        "as much as the one that it reads most.",
        {"recall_a": "0.5", "recall_b": "0.5", "mass_a": "0.91", "mass_b": "0.06"},
        """
import numpy as np

p = np.array([0.9, 0.05, *[0.01] * 5])
best = set(np.argsort(-p, kind="stable")[:2].tolist())
(recall_a, mass_a), (recall_b, mass_b) = (
    (len(best & chosen) / 2, round(p[list(chosen)].sum(), 6)) for chosen in ({0, 6}, {1, 2})
)
""",
    ),
    # ---- hard ----
    Question(
        "hard",
        "verification",
        8,
        "Gold scores are 0.9, 0.8, 0.503, 0.5, 0.1, each known to within 0.002, and the budget is 3. Which of the selections "
        "{0, 1, 3}, {0, 1, 4} and {0, 2, 3} are accepted by the top-k certificate? What is the recall of each?",
        "Accepted: «accepted». Recall: «recall». The first two have the same recall, and only one of them can come from scores "
        "within the tolerance.",
        {"accepted": "[0, 1, 3]", "recall": "2/3, 2/3, 2/3"},
        """
import numpy as np
from gsa_ref.check import topk_certificate

scores = np.array([0.9, 0.8, 0.503, 0.5, 0.1])
tried = [0, 1, 3], [0, 1, 4], [0, 2, 3]
(accepted,) = (chosen for chosen in tried if topk_certificate(np.array(chosen), 3, scores, 0.002, 3))
recall = ", ".join(f"{len({0, 1, 2} & set(chosen))}/3" for chosen in tried)
""",
        (19,),
    ),
    Question(
        "hard",
        "which property?",
        8,
        "A kernel lets query t see key t + 1. Its scores lie in the right range, and it runs. Which property catches it, and "
        "why does a comparison of one sequence's *last* row not?",
        "The last query has no later key, so its row is right. Other inputs at the last position must leave all earlier rows "
        "equal to the bit; here «changed» of the 5 earlier rows changes.",
        {"changed": "1"},
        """
import numpy as np
from gsa_ref.equations import indexer_scores

rng = np.random.default_rng(0)
q, k, logits, b = rng.standard_normal((6, 2, 4)), rng.standard_normal((6, 4)), rng.standard_normal((6, 2)), np.zeros(2)
other = k.copy()
other[5] += 1
right, wrong = ([indexer_scores(q, keys, logits, b, scale=0.5, start=start) for keys in (k, other)] for start in (0, 1))
assert np.array_equal(right[0][:5], right[1][:5])
changed = (wrong[0][:5] != wrong[1][:5]).any(axis=1).sum()
""",
        (5,),
    ),
    Question(
        "hard",
        "which property?",
        8,
        "A kernel that merges tiles of a row forgets the factor $e^{m - m'}$ on acc, and applies it to l. Which property "
        "catches it with the simplest input? What does it return for four equal values 1 with the logits 0, 1, 2, 3 in tiles "
        "of two?",
        "Equal values have to come out unchanged. It returns «returned» in place of 1.",
        {"returned": "1.76"},
        """
import numpy as np
from gsa_ref.equations import sparse_attention

z, m, l, acc = np.arange(4.0), -np.inf, 0.0, 0.0
for first in (0, 2):
    tile = z[first : first + 2]
    m_new = max(m, tile.max())
    p = np.exp(tile - m_new)
    l, acc, m = l * np.exp(m - m_new) + p.sum(), acc + p.sum(), m_new  # acc is not rescaled
returned = f"{acc / l:.2f}"
ones = np.ones((4, 1, 1))
assert np.isclose(sparse_attention(np.ones((1, 1, 1)), z.reshape(4, 1, 1), ones, [np.arange(4)])[0].item(), 1)
""",
        (32,),
    ),
    Question(
        "hard",
        "which property?",
        8,
        "A kernel adds up the $M_2$ of a row's tiles and forgets the term for the distance of their means. Why does “a "
        "constant added to the scores leaves their variance” not catch it? Which property does? What is the variance of 0, 1, "
        "…, 7 in two tiles of four, with the fault and without?",
        "A shift moves the means of all tiles alike, so the faulty result does not change either. Merged tiles have to give "
        "what two passes give: «wrong» against «right».",
        {"wrong": "1.25", "right": "5.25"},
        """
import numpy as np
from gsa_ref.equations import score_variance

row = np.arange(8.0)
faulty = lambda x: (x.reshape(2, 4).var(axis=1) * 4).sum() / 8
wrong, right = faulty(row), score_variance(row[None])[0]
assert faulty(row + 100) == wrong
""",
        (13, 15),
    ),
    Question(
        "hard",
        "which property?",
        8,
        "A decoder keeps keys and values and forgets the indexer's keys, so that a step scores its own token only. All tests "
        "of its author use prompts of at most $k_{\\min}$ tokens, and pass, with the missing keys as zeros. Why? Which "
        "property catches the fault, and on which inputs?",
        "Up to $k_{\\min}$ tokens everything is selected, whatever the scores are. Decoding has to give the rows of one pass, on "
        "texts longer than the budget. With $k_{\\min}$ = 4, scores of zero select «short» of 4 tokens rightly, and of 12 "
        "tokens only «long» of the 4 best.",
        {"short": "4", "long": "2"},
        """
import numpy as np
from gsa_ref.equations import select_tokens

scores = np.random.default_rng(3).random((1, 12))
same = lambda n: len(set(*map(tuple, select_tokens(scores[:, :n], [4]))) & set(range(4)))  # zeros tie: the first four
short, long = same(4), same(12)
""",
        (53,),
    ),
    Question(
        "hard",
        "indexer",
        8,
        "Training code adds the language model's loss only. The indexer's weights do not move, and no error is raised. Why? "
        "How do you prove it with one backward pass, and what is missing?",
        "A top-k returns indices, and nothing flows through them. After `backward()` the gradient of every parameter of the "
        "indexer is None or 0: «reached» of its parameters have one. Missing is the indexer's own loss; with it, all "
        "«learning» have one.",
        {"reached": "0", "learning": "4"},
        """
import torch
from gsa_ref import GatedSparseAttention, GSAConfig

config = GSAConfig(d=16, H=2, H_kv=1, d_h=8, H_I=2, d_I=8, k_base=4, k_min=2, k_max=8)


def reached_by(loss):
    torch.manual_seed(0)
    layer = GatedSparseAttention(config).train()
    layer.set_phase("sparse")
    loss(layer(torch.randn(1, 24, config.d))).backward()
    return sum(p.grad is not None and bool((p.grad != 0).any()) for p in layer.indexer.parameters())


reached = reached_by(lambda output: output.hidden.square().sum())
learning = reached_by(lambda output: output.hidden.square().sum() + output.indexer_loss)
""",
        (51, 52),
    ),
    Question(
        "hard",
        "attention",
        8,
        "One sequence of 131,072 tokens, 8 key/value heads of width 128 in 16 bits, k = 2048. How many bytes of keys and "
        "values do all queries gather if they share nothing, and how many does dense attention load in tiles of 128 queries, "
        "about? Which of the two does 3% of the operations?",
        "Gathered: «gathered» TiB. Dense: about «dense» TiB, since a tile sees half of the keys on average. The sparse one does 3% of "
        "the operations and loads several times the bytes.",
        {"gathered": "1.0", "dense": "0.25"},
        """
from gsa_ref import GSAConfig
from gsa_ref.theory.complexity import gathered_bytes

L = 131_072
gathered = round(gathered_bytes(L, GSAConfig()) / 2**40, 1)
dense = round(L // 128 * L / 2 * (2 * 8 * 128 * 2) / 2**40, 2)
""",
    ),
    Question(
        "hard",
        "verification",
        8,
        "“The kernel is verified.” Name what such a sentence can mean here, and three things that it does not.",
        "On every case that was tried, the result lay within a bound that follows from the arithmetic, or equalled the "
        "expected one where it can. It does not mean that there is no race between programs beyond what a sanitizer watched, "
        "that another device gives the same, that lengths or inputs that nobody tried are right, or that the mechanism is a "
        "good idea. See [what is not verified](../verify/index.md#what-is-not-verified).",
    ),
)
