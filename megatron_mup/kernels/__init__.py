"""The kernels room; see docs/architecture.md."""
