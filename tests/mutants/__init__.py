"""Faults for the kernels, each in a copy of `gsa_fast`: the checks of `python -m gsa_fast verify` must turn red.

A check that stays green under a fault checks nothing. `hand` holds faults that somebody thought of, `generated` draws
faults from the kernels' syntax trees, `runner` applies them and looks for a case that fails, `python -m tests.mutants`
reports.
"""
