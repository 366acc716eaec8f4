"""Conversions between checkpoints and others' formats, tensor by tensor. docs/conversion.md says how."""
