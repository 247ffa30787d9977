"""The errors that users are meant to read: no traceback, one message that says what to do."""


class BismoothError(Exception):
    """Bad input or a missing requirement; the command line prints the message and exits with status 2.

    The message has the form ``subject: what happened. Expected …, got …. How to fix it.``
    """


class UnfinishedRunError(BismoothError):
    """What an unfinished run has left, or what that run has read, was changed: there is no going on from it."""


class GateError(BismoothError):
    """A result missed its gate (an accuracy threshold, an audit); the command line exits with status 1."""
