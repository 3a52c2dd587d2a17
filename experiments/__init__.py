"""Training runs behind the claims: each module is a command, `python -m experiments.<name>`."""
