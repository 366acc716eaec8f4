"""The parallel room; see docs/architecture.md."""
