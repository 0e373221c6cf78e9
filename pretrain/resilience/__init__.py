"""Stopping and failing well."""
