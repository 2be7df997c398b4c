"""Errors whose text is meant for the person at the terminal."""


class UserError(ValueError):
    """Something the user can put right; the message is one line and says how."""
