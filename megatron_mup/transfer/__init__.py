"""The transfer room; see docs/architecture.md."""
