"""What stands behind `python -m gsa_fast verify`: checks, ahead-of-time compilation, the interpreter's settings."""
