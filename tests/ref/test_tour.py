"""The terminal tour: what it shows is what the layer computes, and wrong arguments are refused by name."""

import io
import re
import subprocess
import sys

import pytest
import torch

from gsa_ref import token_budget, tour
from gsa_ref.__main__ import main

TEXT = "The rabbit-hole went straight on like a tunnel, and the tunnels went on and on"


def run(capsys, *options: str) -> str:
    assert main(["tour", *options]) == 0
    return capsys.readouterr().out


def section(page: str, title: str) -> list[str]:
    """The lines between a heading that starts with `title` and the next blank line."""
    lines = page.splitlines()
    (first,) = (i for i, line in enumerate(lines) if line.startswith(title))
    return lines[first + 2 : lines.index("", first) if "" in lines[first:] else None]


def rows(page: str, title: str) -> dict[int, str]:
    """The rows of a section's table by position: what follows the word."""
    found = (re.match(r" {0,2}(\d+) .{12} (.*)", line) for line in section(page, title))
    return {int(m[1]): m[2] for m in found if m}


def refused(capsys, *options: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["tour", *options])
    assert stop.value.code == 2
    return capsys.readouterr().err


def traced(text: str, **sizes):
    tokens = tour.tokenize(text)
    config = tour.build_config(**sizes)
    h = tour.embed(tokens, config.d)
    layer = tour.build_layer(config, h)
    return tokens, layer, h, tour.trace(layer, h)


def test_tokens_are_words_and_marks():
    assert tour.tokenize("The rabbit-hole's end,\n 'so' it IS.") == [
        *("The", "rabbit-hole's", "end", ",", "'", "so", "'", "it", "IS", "."),
    ]


def test_embeddings_repeat_from_the_seed_and_are_alike_for_similar_words():
    words = ["selected", "selects", "umbrella"]
    h = tour.embed(words, 512)
    assert torch.equal(h, tour.embed(words, 512))
    assert not torch.equal(h, tour.embed(words, 512, seed=1))
    alone = torch.cat([tour.embed([w], 512)[0] for w in words])
    torch.testing.assert_close(alone.pow(2).mean(-1), torch.ones(3, dtype=torch.float64))
    similarity = alone @ alone.T / 512
    assert similarity[0, 1] > 0.4 > 0.2 > similarity[0, 2].abs()


def test_embeddings_do_not_look_ahead():
    tokens = tour.tokenize(TEXT)
    assert torch.equal(tour.embed(tokens, 32)[:, :5], tour.embed(tokens[:5], 32))


@pytest.mark.parametrize("rule", ["proportional", "inverse", "fixed"])
def test_the_pieces_give_the_output_of_the_layer_and_of_the_equations(rule):
    _, layer, h, t = traced(TEXT, k_base=4, rule=rule)
    assert t.budget.max() < len(tour.tokenize(TEXT))  # something is left out
    assert max(tour.disagreement(layer, h, t.u)) < 1e-12


def test_budgets_are_token_budget_of_the_variance():
    _, layer, _, t = traced(TEXT, k_base=4)
    c = layer.config
    sizes = {"k_base": c.k_base, "k_min": c.k_min, "k_max": c.k_max, "rule": c.rule}
    assert t.mean_variance > 0
    assert torch.equal(t.budget, token_budget(t.variance, t.mean_variance, t.n_valid, **sizes))


def test_attention_weights_add_up_to_one_on_the_selection_and_vanish_elsewhere():
    _, _, _, t = traced(TEXT, k_base=4)
    torch.testing.assert_close(t.attention.sum(-1), torch.ones_like(t.attention[..., 0]))
    selected = torch.zeros_like(t.scores, dtype=torch.bool)
    for row, indices in zip(selected[0], t.selection.indices[0], strict=True):
        row[indices[indices >= 0].long()] = True
    assert torch.equal(t.attention.gt(0), selected[:, :, None].expand_as(t.attention))


def test_attention_weights_reproduce_the_attention_output():
    # More keys than channels, so that the probe runs in several blocks.
    _, _, _, t = traced(TEXT, k_base=4)
    g = torch.Generator().manual_seed(0)
    L = t.scores.shape[1]
    q, k, v = (torch.randn(1, L, heads, 4, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    p = tour.attention_weights(q, k, t.selection)
    o, _ = tour.sparse_attention(q, k, v, t.selection)
    torch.testing.assert_close(torch.einsum("blhs,bshd->blhd", p, v.repeat_interleave(2, dim=2)), o)


def test_shown_selection_is_the_layers_and_lies_in_the_past(capsys):
    page = run(capsys, "--text", TEXT, "--k-base", "4")
    tokens, _, _, t = traced(TEXT, k_base=4)
    shown = rows(page, "4. Selection")
    assert sorted(shown) == list(range(len(tokens)))
    for i, words in shown.items():
        indices = [s for s in t.selection.indices[0, i].tolist() if s >= 0]
        assert max(indices) <= i
        assert words.split() == [tokens[s] for s in indices]


def test_shown_budgets_and_variances_are_the_layers(capsys):
    page = run(capsys, "--text", TEXT, "--k-base", "4", "--rule", "inverse")
    _, _, _, t = traced(TEXT, k_base=4, rule="inverse")
    for i, row in rows(page, "3. Budgets").items():
        variance, _, k, bar = row.split()
        assert variance == f"{float(t.variance[0, i]):.4f}"
        assert int(k) == int(t.budget[0, i]) == bar.count("█")
        assert len(bar) == i + 1


def test_the_future_is_blank_in_the_heat_map(capsys):
    for i, row in rows(run(capsys, "--text", TEXT), "2. Indexer").items():
        assert re.fullmatch(f"[·░▒▓█]{{{2 * (i + 1)}}}", row)


def test_the_query_to_detail_is_the_last_word_unless_given(capsys):
    assert "5. Attention of query 3 (four)" in run(capsys, "--text", "one two three four !")
    page = run(capsys, "--text", "one two three four !", "--query", "1")
    assert sorted(rows(page, "5. Attention of query 1 (two)")) == [0, 1]


def test_reads_a_file_and_says_what_it_cuts(capsys, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\ufeff" + "alpha beta gamma delta " * 30, encoding="utf-8")
    page = run(capsys, "--file", str(path), "--max-tokens", "10")
    assert "CUT: text.txt has 120 tokens; this tour shows the first 10 (--max-tokens, at most 64)." in page
    assert "9 beta" in page
    assert "10 gamma" not in page
    path.write_text("alpha beta", encoding="utf-8")
    assert "CUT" not in run(capsys, "--file", str(path))


def test_says_that_a_huge_file_was_not_read_to_its_end(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tour, "MOST_CHARACTERS", 1000)
    path = tmp_path / "text.txt"
    path.write_text("word " * 300, encoding="utf-8")
    assert "has more than 200 tokens" in run(capsys, "--file", str(path))


def test_a_long_text_is_cut_aloud_too(capsys):
    assert "CUT: the text has 100 tokens; this tour shows the first 36" in run(capsys, "--text", "so " * 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--file", "no/such/file"), "argument --file: cannot read 'no/such/file': No such file"),
        (("--file", "."), "argument --file: cannot read '.'"),
        (("--text", " \n"), "argument --text: expected at least one word"),
        (("--max-tokens", "0"), "argument --max-tokens: expected a whole number from 1 to 64, got '0'"),
        (("--max-tokens", "65"), "argument --max-tokens: expected a whole number from 1 to 64, got '65'"),
        (("--k-base", "2.5"), "argument --k-base: expected a whole number from 1 to 64, got '2.5'"),
        (("--seed", "-1"), "argument --seed: expected a whole number from 0"),
        (("--query", "-1"), "argument --query: expected a whole number of at least 0, got '-1'"),
        (("--text", "one two", "--query", "2"), "argument --query: expected a position from 0 to 1, got 2"),
        (("--rule", "both"), "argument --rule: invalid choice"),
        (("--text", "a", "--file", "pyproject.toml"), "argument --file: not allowed with argument --text"),
    ],
)
def test_refuses_wrong_arguments_by_name(capsys, options, message):
    assert message in refused(capsys, *options)


def test_refuses_files_without_words_or_with_other_bytes(capsys, tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    assert "argument --file: expected at least one word" in refused(capsys, "--file", str(tmp_path / "empty"))
    assert "argument --file: expected UTF-8 text" in refused(capsys, "--file", str(tmp_path / "bytes"))


def test_needs_a_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "command" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
@pytest.mark.parametrize("length", [1, 2, 36, 64])
def test_fits_100_columns_in_every_encoding(monkeypatch, encoding, length):
    text = "naïve 北京大学生物系 \x1b[31m " + "incomprehensibilities " * length
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)  # strict: a character that it lacks would raise
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["tour", "--text", text, "--max-tokens", str(length), "--k-base", "40"]) == 0
    page = raw.getvalue().decode(encoding)
    assert max(map(tour._columns, page.splitlines())) <= 100
    assert "\x1b" not in page
    assert ("σ" in page) == (encoding == "utf-8")


def test_a_disagreement_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(tour, "disagreement", lambda *_: (1e-3, 0.0))
    assert main(["tour", "--text", "one two"]) == 1
    assert "THEY DISAGREE" in capsys.readouterr().out


def test_the_command_starts_and_a_closed_pipe_is_no_error():
    command = [sys.executable, "-m", "gsa_ref", "tour", "--text", "one two"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # the reader goes before the first line comes
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 0


def test_needs_nothing_but_numpy_torch_and_jaxtyping():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'hypothesis', 'triton', 'tqdm', 'beartype']));"
        "import gsa_ref.tour"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
