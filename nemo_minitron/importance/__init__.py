"""Scoring a teacher through ModelOpt."""
