"""Measurements of the program itself; not part of the wheel."""
