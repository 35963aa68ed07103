"""The one type of errors that a user can correct."""


class InputError(ValueError):
    """Something given from outside is wrong: an argument, a setting, a file, a prompt.

    The message is one line that names what is wrong and what to do. Commands print it and end with status 2. Any other
    exception is a fault of this package, and keeps its traceback.
    """
