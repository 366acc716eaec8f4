"""The parametrization room; see docs/architecture.md."""
