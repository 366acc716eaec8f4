"""The training room; see docs/architecture.md."""
