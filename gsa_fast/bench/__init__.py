"""Speed: what `python -m gsa_fast bench` measures, and how."""
