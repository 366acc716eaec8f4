"""The optim room; see docs/architecture.md."""
