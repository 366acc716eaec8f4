"""Before a run: what it will need and how fast it will go, computed from its configuration; and what a machine has."""
