"""Experts and routing."""
