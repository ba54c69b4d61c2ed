"""The one exception that means: the user must change something."""


class UserError(Exception):
    """A mistake in what the user gave: a setting, a file, a layout.

    The message is one line that names the setting or file, its value, and what would be valid. Commands print
    it and exit with code 2; a traceback would only hide it. Programming errors are ordinary exceptions.
    """


class NotFiniteNumbers(UserError):
    """A model's numbers came out NaN or infinite: its weights are at fault, or what it was given."""
