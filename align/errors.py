"""The errors that a user can cause; the command prints them without a stack trace."""

import signal


class AlignError(Exception):
    """A failure with a message for the user. ``exit_code`` is what the command returns."""

    exit_code = 1


class InputError(AlignError, ValueError):
    """Something given to us is wrong: exit code 2.

    Refused before anything is written wherever it can be known before; a reward function that
    fails in the middle of PPO cannot.
    """

    exit_code = 2


class RecipeError(InputError):
    """A recipe file or an override does not say what a recipe may say."""


class DataError(InputError):
    """A data file or one of its rows cannot be used."""


class ParentError(InputError):
    """The stage that this one builds on is missing, of another kind, or does not match."""


class TrainingError(AlignError, RuntimeError):
    """Training was stopped before damage: a non-finite loss, a broken step-0 check."""


def stopped_by(signum: int) -> str:
    """Return what to tell a user whose signal has ended a process."""
    name = signal.Signals(signum).name
    return f"stopped by {name}; the same command makes what is not finished"


def printable(text: str) -> str:
    """Return a text from a file as a message may hold it: nothing in it steers a terminal."""
    return text if text.isprintable() else ascii(text)


def printable_lines(text: str) -> str:
    """Return a message of several lines so that it can be shown; see ``printable``."""
    return "\n".join(map(printable, text.split("\n")))
