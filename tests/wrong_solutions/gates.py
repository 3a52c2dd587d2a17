"""Near misses of the puzzles on the gates."""

import numpy as np

from gsa_ref.equations import sigmoid


def _attend(q, k, v):
    p = np.exp(k @ q / np.sqrt(len(q)))
    return p / p.sum() @ v


def gates_the_sum(q, k, v, value_logits, output_logits):
    return _attend(q, k, v) * sigmoid(value_logits).mean(0) * sigmoid(output_logits)


def gates_of_the_query_s_token(q, k, v, value_logits, output_logits):
    return _attend(q, k, v * sigmoid(value_logits[-1])) * sigmoid(output_logits)


def gates_the_keys(q, k, v, value_logits, output_logits):
    gate = sigmoid(value_logits)
    return _attend(q, k * gate, v * gate) * sigmoid(output_logits)


def gates_before_the_sigmoid(q, k, v, value_logits, output_logits):
    return _attend(q, k, v * value_logits) * sigmoid(output_logits)


def _gradients(h, W, dz):
    return dz @ W.T, h.T @ dz, dz.sum(0)


def forgets_the_value(h, v, W, b, dout):
    z = h @ W + b
    return _gradients(h, W, dout * sigmoid(z) * sigmoid(-z))


def forgets_the_derivative(h, v, W, b, dout):
    return _gradients(h, W, dout * v * sigmoid(h @ W + b))


def forgets_the_bias(h, v, W, b, dout):
    z = h @ W
    return _gradients(h, W, dout * v * sigmoid(z) * sigmoid(-z))


def averages_over_tokens(h, v, W, b, dout):
    z = h @ W + b
    dz = dout * v * sigmoid(z) * sigmoid(-z)
    return dz @ W.T, h.T @ dz, dz.mean(0)


WRONG = {
    "gated_head": [gates_the_sum, gates_of_the_query_s_token, gates_the_keys, gates_before_the_sigmoid],
    "gate_gradients": [forgets_the_value, forgets_the_derivative, forgets_the_bias, averages_over_tokens],
}
