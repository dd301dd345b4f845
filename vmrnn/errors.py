"""The one exception for what a user got wrong."""


class UserError(ValueError):
    """A missing or damaged file, an impossible shape, a wrong option.

    The message is one line that says what, where and what to do. The programs print it and end
    with exit code 2 (vmrnn.runtime.run_program); a library caller sees a ValueError.
    """
